"""From one checkpoint to another, and what a checkpoint is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mm_convert.checkpoint import Checkpoint, open_checkpoint
from mm_convert.content import fingerprint
from mm_convert.save import config_for, name_files, target_names, write
from mm_convert.store.folder import Files, refuse_target, split
from mm_convert.tensors import LazyTensor, Stored


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "mm",
    *,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Checkpoint:
    """Rewrite a checkpoint under the names and with the files of `to`; tensors keep their bytes.

    Args:
        source: anything that `open_checkpoint` reads.
        target: a folder that does not exist yet (with `overwrite`: or that holds nothing but a checkpoint).
        to: "mm" (our own layout), "original" (Wan-AI) or "diffusers".
        shard_bytes: regroup into files of at most so many bytes; None keeps the grouping of the source.

    Returns the source as it was opened; its `notes` say what was dropped. Raises ValueError before anything is
    written.
    """
    refuse_target(Path(target), overwrite)
    checkpoint = open_checkpoint(source)
    items = _items(checkpoint, target_names(checkpoint.content, to))
    shards = split(items, shard_bytes) if shard_bytes else _as_in_source(items)
    files = name_files(shards, to, checkpoint.metadata)
    config = config_for(checkpoint.content, checkpoint.config, to)
    write(Path(target), files, config, overwrite, show_progress)
    return checkpoint


def convert_like(
    source: str | Path,
    target: str | Path,
    like: str | Path,
    *,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Checkpoint:
    """Rewrite a checkpoint under the names, in the files and with the config.json of another, published one.

    Raises ValueError, besides what `convert` raises, when the two have other tensors or shapes.
    """
    refuse_target(Path(target), overwrite)
    checkpoint, model = open_checkpoint(source), open_checkpoint(like)
    published = model.content.translate(model.dialect)
    for name, tensor in model.tensors.items():
        if name not in checkpoint.tensors or checkpoint.shape(name) != tensor.shape:
            there = list(checkpoint.shape(name)) if name in checkpoint.tensors else "absent"
            raise ValueError(
                f"{like} is another model: its {published[name]} is {list(tensor.shape)}, in {source} {there}"
            )
    if extra := set(checkpoint) - set(model):
        raise ValueError(f"{like} is another model: it has no {sorted(extra)[0]}")

    shards: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in model.tensors.items():
        assert isinstance(tensor, Stored)
        shards.setdefault(tensor.file.name, {})[published[name]] = checkpoint.tensors[name]
    folder = tensor.file.parent
    index = next((path.name for path in folder.glob("*.safetensors.index.json")), None)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json to copy")
    config = (folder / "config.json").read_bytes()
    write(Path(target), Files(shards, index, model.metadata), config, overwrite, show_progress)
    return checkpoint


def _items(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, LazyTensor]:
    return {names[ours]: tensor for ours, tensor in checkpoint.tensors.items()}


def _as_in_source(items: Mapping[str, LazyTensor]) -> list[dict[str, LazyTensor]]:
    shards: dict[Path, dict[str, LazyTensor]] = {}
    for name, tensor in items.items():
        assert isinstance(tensor, Stored)
        shards.setdefault(tensor.file, {})[name] = tensor
    return list(shards.values())


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, from its headers alone; `str()` of it is for people."""

    path: Path
    family: str
    dialect: str
    layout: str
    files: int
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]  # tensors of each
    fingerprint: str  # md5 of our names and shapes
    config: Mapping[str, Any]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = {
            "family": self.family,
            "names": self.dialect,
            "layout": f"{self.layout}, {self.files} file{'s' * (self.files > 1)}",
            "tensors": f"{self.tensors:,}",
            "parameters": f"{self.parameters:,}",
            "bytes": f"{self.nbytes:,}",
            "dtype": ", ".join(f"{dtype} ({count})" for dtype, count in self.dtypes.items()),
            "fingerprint": self.fingerprint,
            **self.config,
        }
        lines = [f"{key:<14} {value}" for key, value in rows.items()] + [f"note: {note}" for note in self.notes]
        return "\n".join([str(self.path), *lines])


def inspect(path: str | Path) -> Inspection:
    """Say what a checkpoint is; reads headers only. Errors as `open_checkpoint`."""
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    return Inspection(
        path=checkpoint.path,
        family=checkpoint.family,
        dialect=checkpoint.dialect,
        layout=checkpoint.layout,
        files=len({t.file for t in tensors.values()}),
        tensors=len(tensors),
        parameters=sum(prod(t.shape) for t in tensors.values()),
        nbytes=sum(t.nbytes for t in tensors.values()),
        dtypes=dict(Counter(t.dtype for t in tensors.values()).most_common()),
        fingerprint=fingerprint({name: t.shape for name, t in tensors.items()}),
        config=checkpoint.config,
        notes=tuple(checkpoint.notes),
    )
