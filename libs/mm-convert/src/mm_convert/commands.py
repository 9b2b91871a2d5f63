"""The commands of `mm-convert`: what each asks for, and what it does."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mm_convert.arguments import nearest, parse
from mm_convert.checkpoint import Checkpoint
from mm_convert.conversion import convert, convert_like, inspect

POSITIONAL = {"positional": True}


@dataclass
class Inspect:
    """Say what a checkpoint is, from its headers alone."""

    path: Path = field(metadata=POSITIONAL)
    "a diffusers repository or its transformer folder, a Wan-AI folder, our folder, or one .safetensors file"


@dataclass
class Convert:
    """Rewrite a checkpoint under other names and in other files; tensors keep their bytes."""

    source: Path = field(metadata=POSITIONAL)
    "a diffusers repository or its transformer folder, a Wan-AI folder, our folder, or one .safetensors file"
    target: Path = field(metadata=POSITIONAL)
    "the folder to make"
    to: Literal["mm", "diffusers", "original"] = "mm"
    "mm: our own files; diffusers: WanTransformer3DModel; original: Wan-AI"
    shard_gb: float | None = None
    "regroup into files of at most so many GB (10^9 bytes); null: the source's grouping"
    overwrite: bool = False
    "replace the target if it holds a checkpoint and nothing else"

    def __post_init__(self) -> None:
        if self.shard_gb is not None and self.shard_gb <= 0:
            raise ValueError(f"shard_gb is {self.shard_gb}; a file must hold something")


@dataclass
class WanToMM:
    """Where from, where to."""

    source_path: Path
    "published files: diffusers or original names"
    target_path: Path
    "the folder to make, in our own layout"


@dataclass
class HfToMM:
    """Published Wan files to our own layout."""

    cfg: WanToMM
    overwrite: bool = False
    "replace the target if it holds a checkpoint and nothing else"


@dataclass
class WanToHF:
    """Where from, where to."""

    source_path: Path
    "our own folder"
    target_path: Path
    "the folder to make"
    hf_dir: Path | None = None
    "the published model: its names, its grouping into files and its config.json are taken; null: diffusers' names"
    hf_path: Path | None = None
    "the same, as some guides spell it"

    def __post_init__(self) -> None:
        if self.hf_dir and self.hf_path and self.hf_dir != self.hf_path:
            raise ValueError(f"cfg.hf_dir {self.hf_dir} and cfg.hf_path {self.hf_path} mean the same; give one")
        self.hf_dir = self.hf_path = self.hf_dir or self.hf_path


@dataclass
class MMToHf:
    """Our own layout to published names and files."""

    cfg: WanToHF
    overwrite: bool = False
    "replace the target if it holds a checkpoint and nothing else"


def run_inspect(options: Inspect) -> None:
    print(inspect(options.path))


def run_convert(options: Convert) -> None:
    shard_bytes = None if options.shard_gb is None else int(options.shard_gb * 1e9)
    source, target = options.source, options.target
    _report(
        convert(source, target, options.to, shard_bytes=shard_bytes, overwrite=options.overwrite, show_progress=True)
    )


def run_hf_to_mm(options: HfToMM) -> None:
    cfg = options.cfg
    _report(convert(cfg.source_path, cfg.target_path, "mm", overwrite=options.overwrite, show_progress=True))


def run_mm_to_hf(options: MMToHf) -> None:
    cfg, how = options.cfg, {"overwrite": options.overwrite, "show_progress": True}
    if cfg.hf_dir:
        _report(convert_like(cfg.source_path, cfg.target_path, cfg.hf_dir, **how))
    else:
        _report(convert(cfg.source_path, cfg.target_path, "diffusers", **how))


def _report(checkpoint: Checkpoint) -> None:
    for note in checkpoint.notes:
        sys.stderr.write(f"note: {note}\n")


COMMANDS = {
    ("inspect",): (Inspect, run_inspect),
    ("convert",): (Convert, run_convert),
    ("WanConverter", "hf_to_mm"): (HfToMM, run_hf_to_mm),
    ("WanConverter", "mm_to_hf"): (MMToHf, run_mm_to_hf),
}


def run(argv: list[str]) -> None:
    """Run the command at the head of `argv`; SystemExit(2) for one that does not exist."""
    for words, (options, action) in COMMANDS.items():
        if tuple(argv[: len(words)]) == words:
            action(parse(options, argv[len(words) :], prog=f"mm-convert {' '.join(words)}"))
            return
    said = " ".join(argv[:2] if argv[0].endswith("Converter") else argv[:1])
    sys.stderr.write(f"mm-convert: error: unknown command {said}{nearest(said, map(' '.join, COMMANDS))}\n")
    sys.exit(2)
