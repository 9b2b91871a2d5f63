"""What lies at a path: which layout, and its tensors by the names on disk. Only headers are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mm_convert.files import brief, read_text, refuse_special
from mm_convert.lora.names import is_lora
from mm_convert.read.content import known_names, recognise
from mm_convert.read.experts import DIFFUSERS, FOLDERS
from mm_convert.read.quantised import METADATA, dequantise
from mm_convert.store import mindspeed
from mm_convert.store.dcp import Index
from mm_convert.store.gguf import read_gguf
from mm_convert.store.mm import FOLDER
from mm_convert.store.safetensors import INDEX_SUFFIX, read_files, read_folder, read_indexed
from mm_convert.store.torch_file import SUFFIXES as TORCH_SUFFIXES
from mm_convert.store.torch_file import read_torch_file
from mm_convert.tensors.views import LazyTensor

_PREFIXES = ("module.", "model.", "predictor.", "diffusion_model.", "model.diffusion_model.", "pipe.dit.")
_PREFIXES += ("generator.", "generator_ema.", "ema.", "ema_model.", "model_ema.", "transformer.", "dit.", "net.")
_PREFIXES += ("text_encoders.umt5xxl.transformer.",)
# What torch.compile, FSDP and activation checkpointing put into the names of the modules that they wrap.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# ComfyUI's files of several models: the one that generates, and those beside it.
_GENERATING = "model.diffusion_model."
_BESIDE = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.", "clip_vision.")
# How programs that train call the model in a torch file; where several are there, the first is meant.
_MODELS = ("ema_state_dict", "state_dict", "gen_model", "model", "module", "model_state_dict", "generator")
_AVERAGES = ("ema_model", "ema", "generator_ema", "model_ema", "ema_state_dict")
_MAX_DEPTH = 8  # dictionaries in one another, until the weights
_MAX_TENSORS, _MAX_NAME = 20_000, 1_000


class NotThere(ValueError):
    """A path that was asked for does not exist: whoever typed it can mend it, so programs end with 2 and not with 1."""


@dataclass
class Source:
    """`tensors` by their names on disk, whole and with the layer numbers of the model; `folder` may say more.

    kinds: how many weights were quantised, and are views, by the words for their format.
    """

    tensors: dict[str, LazyTensor]
    layout: str
    files: list[Path]
    folder: Path
    metadata: dict[str, str] = field(default_factory=dict)
    is_part: bool = False  # of a torch file that holds more, as trainers save
    split: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


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
    refuse_special(path)
    prefixes = (*_PREFIXES, *([f"{prefix.rstrip('.')}."] if prefix else []))
    if path.is_file():
        return _unwrap(_file(path, part), prefixes)
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
    return _unwrap(made or (_safetensors(path) if has_safetensors else _torch_folder(path, part)), prefixes)


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
        if (run / "latest").exists():
            folder = run / Path(read_text(run / "latest", limit=4096).strip()).name
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
    files = sorted({tensor.file for tensor in tensors.values()})
    _refuse_rivals(Source(dict(tensors), "safetensors", files, folder))
    return Source(dict(tensors), "safetensors", files, folder, metadata)


def _file(path: Path, part: str) -> Source:
    if path.suffix == ".safetensors" and part == "ema":
        raise ValueError(f"{path} holds no moving average (ema), only the weights")
    if path.suffix == ".safetensors":
        tensors, metadata = read_files([path])
        return Source(dict(tensors), "safetensors", [path], path.parent, metadata)
    if path.name.endswith(INDEX_SUFFIX):
        tensors, metadata = read_indexed(path)
        files = sorted({tensor.file for tensor in tensors.values()})
        return Source(dict(tensors), "safetensors", files, path.parent, metadata)
    if path.suffix == ".gguf":
        if part == "ema":
            raise ValueError(f"{path} holds no moving average (ema), only the weights")
        gguf = read_gguf(path)
        return Source(gguf.tensors, "gguf", [path], path.parent, kinds=gguf.kinds)
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"{path} is not a checkpoint file (.safetensors, .gguf, {', '.join(TORCH_SUFFIXES)})")
    content = read_torch_file(path)
    tensors, notes = _state_dict(content, path, part)
    is_part = not set(tensors) <= set(content)
    return Source(tensors, "torch", [path], path.parent, notes=notes, is_part=is_part)


def _torch_folder(folder: Path, part: str) -> Source:
    there = [file for file in sorted(folder.iterdir()) if not file.is_dir()]
    files = [file for file in there if file.suffix in TORCH_SUFFIXES]
    files = files or [file for file in there if file.suffix == ".gguf"]
    if len(files) != 1:
        if index := next(folder.glob("*.bin.index.json"), None):
            raise ValueError(
                f"{index} names parts in torch's own format, which are not joined here: load the model with "
                "transformers and save it anew (`save_pretrained`), which writes safetensors"
            )
        found = ", ".join(file.name for file in files[:5])
        what = f"several others ({found}); name one of them" if files else "no checkpoint"
        raise ValueError(f"{folder} holds no *.safetensors file and {what}")
    return _file(files[0], part)


def _state_dict(content: Any, path: Path, part: str) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors in what a torch file holds: itself, or the part of it that is known to be the model; and notes."""
    wanted = {
        "model": (*_MODELS, *_AVERAGES),
        "ema": _AVERAGES,
        "state_dict": _MODELS[1:],
        "ema_state_dict": _MODELS,
    }[part]
    averaged, notes = False, []
    for _ in range(_MAX_DEPTH):
        if not isinstance(content, Mapping):
            break
        tables = [key for key, value in content.items() if isinstance(value, Mapping) and value]
        inner = next((key for key in wanted if key in tables), None)
        if inner is None:
            tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, LazyTensor)}
            if not tensors or (part == "ema" and not averaged):
                break
            return tensors, notes
        averaged = averaged or inner in _AVERAGES
        if len(tables) > 1:
            others = ", ".join(str(key)[:_MAX_NAME] for key in tables if key != inner)
            notes.append(f"{others} of {path.name} is left out: {inner} is taken")
        content = content[inner]
    there = [str(key)[:80] for key in content][:5] if isinstance(content, Mapping) else []
    holds = f"; it holds {', '.join(there)}" if there else ""
    raise ValueError(f"{path} holds no tensors under names, at its top or in {', '.join(dict.fromkeys(wanted))}{holds}")


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
    if dialect != "mindspeed" and len(files) == len(ranks[0]) == 1:
        return Source(ranks[0][0], "torch", files, folder, is_part=True)  # what dcp_to_torch makes of a run of ours
    if family.cuts is None or dialect != "mindspeed":
        raise ValueError(f"{folder} is a MindSpeed-MM tree, but its names are those of {family.name} ({dialect})")
    if names != bases and len(ranks) > 1:
        raise ValueError(f"{folder} holds tensor-parallel slices of LoRA; only whole adapters (tp 1) can be read")
    tensors, layers = mindspeed.join_ranks(ranks, family.cuts)
    pp = len({file.parent.name[11:] for file in files})
    split = {"tp": len(ranks), "pp": pp, "vpp": len(ranks[0]) // pp, "layers": layers}
    return Source(tensors, "mindspeed", files, folder, split=split)


def _refuse_rivals(source: Source) -> None:
    """Raises ValueError where another file in the folder holds weights of the same model, whole or in part.

    VAE and text encoder, which are published in the same folder, are other models; an adapter is none.
    """
    chosen = {file.name for file in source.files}
    others = [file for file in sorted(source.folder.iterdir()) if file.name not in chosen and not file.is_dir()]
    for file in others:
        if file.suffix in (".safetensors", *TORCH_SUFFIXES) and _is_rival(file, source):
            raise ValueError(
                f"{source.folder} holds {source.files[0].name}"
                + (f" and {len(source.files) - 1} more files" if len(source.files) > 1 else "")
                + f", and {file.name} with weights of the same model: which is meant is not clear. Move one of them "
                f"elsewhere, or name the file that is meant; of several, their …{INDEX_SUFFIX}"
            )


def _is_rival(file: Path, source: Source) -> bool:
    try:
        other = _unwrap(_file(file, "model"), _PREFIXES)
    except ValueError:  # what cannot be read would not have been taken; but a broken copy is one
        return file.name.partition(".")[0] == source.files[0].name.partition(".")[0].partition("-00001-of-")[0]
    names = list(other.tensors)
    if is_lora(names) or is_lora(source.tensors):
        return is_lora(names) and is_lora(source.tensors)
    if not known_names(names):
        return False
    mine = list(_unwrap(replace(source, tensors=dict(source.tensors), notes=[]), _PREFIXES).tensors)
    return 2 * known_names(names) > len(names) and recognise(names, "")[0] is recognise(mine, "")[0]


def _unwrap(source: Source, prefixes: Sequence[str]) -> Source:
    """Under the names that the model itself gives its tensors."""
    if len(source.tensors) > _MAX_TENSORS:
        raise ValueError(f"{source.folder} holds {len(source.tensors):,} tensors, more than any model here")
    if odd := [name for name in source.tensors if not isinstance(name, str) or len(name) > _MAX_NAME]:
        raise ValueError(f"{source.folder} holds a tensor that is called {brief(odd[0])}, as in no model")
    bare = {_WRAPPERS.sub("", name): tensor for name, tensor in source.tensors.items()}
    if len(bare) == len(source.tensors):
        source.tensors = bare
    if not is_lora(source.tensors):
        source = _dequantise(source)
    return _strip_prefix(_without_beside(source), prefixes)


def _dequantise(source: Source) -> Source:
    """With views in place of quantised weights."""
    found = dequantise(source.tensors, source.metadata, str(source.files[0] if source.files else source.folder))
    metadata = {key: text for key, text in source.metadata.items() if key != METADATA}
    return replace(
        source,
        tensors=found.tensors,
        metadata=metadata,
        notes=[*source.notes, *found.notes],
        kinds=source.kinds + found.kinds,
    )


def _without_beside(source: Source) -> Source:
    """Of ComfyUI's files of several models, the one that generates."""
    beside = [name for name in source.tensors if name.startswith(_BESIDE)]
    model = {name: tensor for name, tensor in source.tensors.items() if name.startswith(_GENERATING)}
    if model and beside and len(model) + len(beside) == len(source.tensors):
        models = ", ".join(sorted({f"{name.partition('.')[0]}.*" for name in beside}))
        source.tensors = model
        source.notes.append(f"{len(beside)} tensors of other models are left out ({models}): {_GENERATING}* is taken")
    return source


def _strip_prefix(source: Source, prefixes: Sequence[str], depth: int = 3) -> Source:
    """Without the prefixes that all names share and that no family knows."""
    names = list(source.tensors)
    known = known_names(names)
    unusual = prefixes[-1] if len(prefixes) > len(_PREFIXES) and known < len(names) else ""
    if not all(name.startswith(unusual) for name in names):
        raise ValueError(f"{source.folder}: not all names begin with {unusual}, for example {names[0]}")
    shared = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]
    for prefix in shared if depth and known < len(names) else ():
        shorter = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items()}
        inside = _strip_prefix(replace(source, tensors=shorter), _PREFIXES, depth - 1)
        if (now := known_names(inside.tensors)) > known:
            source, known = inside, now
    return source
