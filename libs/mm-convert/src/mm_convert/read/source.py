"""What lies at a path: which layout, and its tensors by the names on disk. Only headers are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_convert.read.content import known_names, recognise
from mm_convert.read.experts import DIFFUSERS, FOLDERS
from mm_convert.store import mindspeed
from mm_convert.store.dcp import Index
from mm_convert.store.mm import FOLDER
from mm_convert.store.safetensors import read_files, read_folder
from mm_convert.store.torch_file import SUFFIXES as TORCH_SUFFIXES
from mm_convert.store.torch_file import read_torch_file
from mm_convert.tensors.views import LazyTensor

_PREFIXES = ("module.", "model.", "predictor.", "diffusion_model.", "model.diffusion_model.", "pipe.dit.")


class NotThere(ValueError):
    """A path that was asked for does not exist: whoever typed it can mend it, so programs end with 2 and not with 1."""


@dataclass
class Source:
    """`tensors` by their names on disk, whole and with the layer numbers of the model; `folder` may say more."""

    tensors: dict[str, LazyTensor]
    layout: str
    files: list[Path]
    folder: Path
    metadata: dict[str, str] = field(default_factory=dict)
    is_part: bool = False  # of a torch file that holds more, as trainers save
    split: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find(path: Path, published: bool = False, part: str = "model", prefix: str = "") -> Source:
    """Look at a path and say what is there.

    Args:
        published: where a folder holds published files and what was made of them by converting in place, take the
            former.
        part: "model", or "ema" of a training checkpoint; "ema_state_dict" or "state_dict" of a torch file.
        prefix: what the names of the model begin with, besides what is known to be published.

    Raises ValueError when there is nothing that can be read, or when it is not clear what is meant; NotThere for a path
    that does not exist.
    """
    if not path.exists():
        raise NotThere(f"{path} does not exist")
    prefixes = (*_PREFIXES, *([f"{prefix.rstrip('.')}."] if prefix else []))
    if path.is_file():
        return _strip_prefix(_file(path, part), prefixes)
    made = None if published else _find_made(path, part)
    for experts in () if made else (DIFFUSERS.values(), FOLDERS.values()):
        present = [path / name for name in experts if (path / name).is_dir()]
        if len(present) == 2:
            raise ValueError(
                f"{path} holds two models; name one of {present[0]} (high noise) and {present[1]} (low); "
                "`mm-convert inspect` and `mm-convert convert` take both"
            )
        if present:
            return find(present[0], published, part, prefix)
    has_safetensors = any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.safetensors.index.json"))
    has_torch = any(file.suffix in TORCH_SUFFIXES for file in path.iterdir())
    if made and (has_safetensors or has_torch) and made.folder != path:
        made.notes.append(f"{path} also holds published files, which were not read")
    if published and not has_safetensors and not has_torch:
        made = _find_made(path, part)
    if made is None and has_safetensors and part == "ema":
        raise ValueError(f"{path} holds no moving average (ema), only the weights")
    return _strip_prefix(made or (_safetensors(path) if has_safetensors else _torch_folder(path, part)), prefixes)


def _find_made(path: Path, part: str) -> Source | None:
    """What a conversion or a training run has left."""
    if (path / FOLDER / "config.json").exists():
        if (path / mindspeed.TRACKER).exists():
            raise ValueError(f"{path} holds {FOLDER}/ and what {mindspeed.TRACKER} names; name one of the two")
        if part == "ema":
            raise ValueError(f"{path / FOLDER} holds no moving average (ema), only the weights")
        return _safetensors(path / FOLDER)
    folder = mindspeed.newest(path) or path
    if mindspeed.is_tree(folder):
        return _tree(folder, "ema_model" if part == "ema" else part)
    for run in (folder, folder / "checkpoints"):  # of mm_train
        if (run / "latest").is_file():
            folder = run / Path((run / "latest").read_text(encoding="utf-8").strip()).name
    if (folder / ".metadata").exists():
        return _dcp(folder, part)
    if any(re.fullmatch(r"model_\d+\.pt", file.name) for file in folder.glob("model_*.pt")):
        raise ValueError(
            f"{folder} holds the shards of LayerZeRO, which only MindSpeed can join: run its convert_to_megatron.py "
            "(--input_folder, --output_folder, --prefix predictor), then convert what it writes"
        )
    return None


def _safetensors(folder: Path) -> Source:
    tensors, metadata = read_folder(folder)
    return Source(dict(tensors), "safetensors", sorted({t.file for t in tensors.values()}), folder, metadata)


def _file(path: Path, part: str) -> Source:
    if path.suffix == ".safetensors" and part == "ema":
        raise ValueError(f"{path} holds no moving average (ema), only the weights")
    if path.suffix == ".safetensors":
        tensors, metadata = read_files([path])
        return Source(dict(tensors), "safetensors", [path], path.parent, metadata)
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"{path} is not a checkpoint file (.safetensors, {', '.join(TORCH_SUFFIXES)})")
    content = read_torch_file(path)
    tensors = _state_dict(content, path, part)
    return Source(tensors, "torch", [path], path.parent, is_part=not set(tensors) <= set(content))


def _torch_folder(folder: Path, part: str) -> Source:
    files = [file for file in sorted(folder.iterdir()) if file.suffix in TORCH_SUFFIXES and file.is_file()]
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:5])
        what = f"several torch files ({found}); name one of them" if files else "no checkpoint"
        raise ValueError(f"{folder} holds no *.safetensors file and {what}")
    return _file(files[0], part)


def _state_dict(content: Any, path: Path, part: str) -> dict[str, LazyTensor]:
    """The tensors in what a torch file holds: itself, or the part of it that is known to be the model."""
    models = ["ema_state_dict", "state_dict", "gen_model", "model"]
    wanted = {"model": models, "ema": ["ema_model", "ema"], "state_dict": models[1:], "ema_state_dict": models}[part]
    outermost = content
    while isinstance(content, Mapping):
        tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, LazyTensor)}
        inner = next((key for key in wanted if isinstance(content.get(key), Mapping) and content[key]), None)
        if inner is None:
            if tensors and not (part == "ema" and content is outermost):
                return tensors
            break
        content = content[inner]
    raise ValueError(f"{path} holds no tensors under names, at its top or in {', '.join(wanted)}")


def _dcp(folder: Path, part: str) -> Source:
    index = Index(folder)
    chosen = index.part(part)
    if not chosen and part != "model":
        raise ValueError(f"{folder} holds no {part}; it holds {', '.join(index.parts)}")
    notes = [f"{p} is left out: only the weights are converted" for p in index.parts if chosen and p != part]
    chosen = chosen or {name: index.tensor(name) for name in index.tensors}
    return Source(chosen, "dcp", sorted(folder.glob("*.distcp")), folder, notes=notes)


def _tree(folder: Path, part: str) -> Source:
    ranks, files = mindspeed.read_ranks(folder, part)
    names = [name for stage in ranks[0] for name in stage]
    bases = [re.sub(r"\.lora_[AB](\.default)?\.weight$", ".weight", name) for name in names]
    family, dialect = recognise(bases, str(folder))
    if family.cuts is None or dialect != "mindspeed":
        raise ValueError(f"{folder} is a MindSpeed-MM tree, but its names are those of {family.name} ({dialect})")
    if names != bases and len(ranks) > 1:
        raise ValueError(f"{folder} holds tensor-parallel slices of LoRA; only whole adapters (tp 1) can be read")
    tensors, layers = mindspeed.join_ranks(ranks, family.cuts)
    pp = len({file.parent.name[11:] for file in files})
    split = {"tp": len(ranks), "pp": pp, "vpp": len(ranks[0]) // pp, "layers": layers}
    return Source(tensors, "mindspeed", files, folder, split=split)


def _strip_prefix(source: Source, prefixes: Sequence[str]) -> Source:
    """Without a prefix that all names share and that no family knows."""
    names = list(source.tensors)
    known = known_names(names)
    unusual = prefixes[-1] if len(prefixes) > len(_PREFIXES) and known < len(names) else ""
    if not all(name.startswith(unusual) for name in names):
        raise ValueError(f"{source.folder}: not all names begin with {unusual}, for example {names[0]}")
    for prefix in prefixes if known < len(names) else ():
        if all(name.startswith(prefix) for name in names):
            shorter = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items()}
            if known_names(shorter) > known:
                source.tensors, known = shorter, known_names(shorter)
    return source
