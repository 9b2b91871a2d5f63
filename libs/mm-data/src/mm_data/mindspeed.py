"""Feature folders that MindSpeed-MM's extraction wrote, of both generations.

    data.jsonl           one sample per line; its file is named by `file` (2.2 and later) or `path` (before)
    features/<name>.pt   latents of the video under `video` (2.2 and later) or `latents`; embeddings of the caption,
                         512 D of which only the first rows count, under `prompt_ids` or `prompt`, with `prompt_mask`;
                         i2v: `i2v_clip_feature` 257 D and `i2v_vae_feature` (4 channels of mask, then latents);
                         VACE: `vace_context` (latents of what is kept and of what changes, then 64 of mask)

They come out under our names: `latents`, `text.0`, and as conditions `image`, `condition`, `control`, `control_mask`.
The mask of i2v is left out, as the task gives it. So is `first_frame_latents`, which is the first of the latents. Other
tensors keep their names.

Its writer allows three accidents, and there is a warning of each: samples that share a file name overwrote each other;
data.jsonl lists samples whose file was never written; without `prompt_mask` a file does not say which rows are padding.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_data.files import find_fault, parse_json, read_lines, shorten

LATENTS = ("video", "latents")
TEXT = ("prompt_ids", "prompt")


@dataclass(frozen=True)
class FileRecord:
    """One .pt file."""

    id: str
    shapes: dict[str, tuple[int, ...]]
    file: Path

    def load(self) -> dict[str, Tensor]:
        return _read(self.file)


def is_feature_folder(path: Path) -> bool:
    """Whether MindSpeed-MM has written here."""
    return (path / "data.jsonl").is_file() and (path / "features").is_dir()


def records(path: Path) -> list[FileRecord]:
    """A record per existing file, in the order of data.jsonl. Reads the header of every file."""
    names = []
    for number, line in read_lines(path / "data.jsonl"):
        if not line.strip():
            continue
        sample = parse_json(line, path / "data.jsonl", number)
        name = (sample.get("file") or sample.get("path")) if isinstance(sample, dict) else None
        if not isinstance(name, str) or not name.endswith(".pt"):
            raise ValueError(f"{path / 'data.jsonl'}, line {number}: neither file nor path names a .pt file")
        names.append(name)
    unique = list(dict.fromkeys(names))
    there = [name for name in unique if os.path.isfile(path / name)]
    if len(unique) < len(names):
        warnings.warn(
            f"{path}: {len(names)} samples share {len(unique)} files; where a name is shared, only the last "
            "sample was kept when they were extracted",
            stacklevel=3,
        )
    if len(there) < len(unique):
        written = set(there)
        absent = shorten(next(name for name in unique if name not in written))
        warnings.warn(
            f"{path}: {len(unique) - len(there)} listed files were never written, e.g. {absent}", stacklevel=3
        )
    if not there:
        raise ValueError(f"{path}: none of the {len(unique)} files that data.jsonl lists exists")
    found, unmasked = [], []
    for name in there:
        stored = _load(path / name)
        unmasked += [] if "prompt_mask" in stored else [name]
        shapes = {key: tuple(tensor.shape) for key, tensor in _name(stored, path / name).items()}
        found.append(FileRecord(name, shapes, path / name))
    if unmasked:
        warnings.warn(
            f"{path}: {len(unmasked)} of {len(there)} files have no prompt_mask, e.g. {shorten(unmasked[0])}: all rows "
            "of their captions count as text, the padding too. Extract again where captions were padded",
            stacklevel=3,
        )
    return found


def _read(file: Path) -> dict[str, Tensor]:
    """Tensors by our names, memory-mapped; the caption cut to its true length."""
    return _name(_load(file), file)


def _load(file: Path) -> dict:
    """What a file holds, memory-mapped."""
    if fault := find_fault(file):
        raise ValueError(f"{fault}: extract again")
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, MemoryError):  # the file may be right
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a file that was cut off
        raise ValueError(f"{file} is damaged or no feature file: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no feature file: it holds a {type(found).__name__}")
    return found


def _name(found: dict, file: Path) -> dict[str, Tensor]:
    """Its tensors by our names."""
    latents = next((name for name in LATENTS if name in found), None)
    text = next((name for name in TEXT if name in found), None)
    if latents is None or text is None:
        raise ValueError(f"{file} holds {sorted(map(str, found))}: expected one of {LATENTS} and one of {TEXT}")
    video = _tensor(latents, found[latents], 4, file)
    texts = found[text] if isinstance(found[text], list | tuple) else [found[text]]
    masks = found.get("prompt_mask")
    masks = masks if isinstance(masks, list | tuple) else [masks] * len(texts)
    if len(masks) != len(texts):
        raise ValueError(f"{file}: {len(texts)} texts ({text}), but {len(masks)} masks (prompt_mask): extract again")
    return {
        **_conditions(found, video.shape[0], file),
        "latents": video,
        **{f"text.{i}": _trim(text, t, m, file) for i, (t, m) in enumerate(zip(texts, masks, strict=True))},
    }


def _conditions(found: dict, channels: int, file: Path) -> dict[str, Tensor]:
    """`channels`: of the latents."""
    conditions = {}
    for name, value in found.items():
        if name in (*LATENTS, *TEXT, "prompt_mask", "first_frame_latents") or not isinstance(value, Tensor):
            continue
        if name == "i2v_clip_feature":
            conditions["image"] = _tensor(name, value, 2, file)
        elif name == "i2v_vae_feature":
            conditions["condition"] = _channels(name, value, 4 + channels, file)[4:]
        elif name == "vace_context":
            context = _channels(name, value, 2 * channels + 64, file)
            conditions["control"], conditions["control_mask"] = context[: 2 * channels], context[2 * channels :]
        elif not isinstance(name, str) or name.startswith("text.") or name in ("text", "text_mask"):
            raise ValueError(f"{file} holds a tensor {shorten(repr(name))}, a name that has another meaning here")
        else:
            conditions[name] = value
    return conditions


def _channels(name: str, value: Tensor, expected: int, file: Path) -> Tensor:
    """C F H W or 1 C F H W -> C F H W, with as many channels as expected."""
    value = _tensor(name, value, 4, file)
    if value.shape[0] != expected:
        raise ValueError(f"{file}: {name} has {value.shape[0]} channels, expected {expected}: is it of another model?")
    return value


def _trim(name: str, text: Tensor, mask: Tensor | None, file: Path) -> Tensor:
    """512 D or 1 512 D -> S D. Without a mask every row counts as a token."""
    text = _tensor(name, text, 2, file)
    if mask is None:
        return text
    tokens = _tensor("prompt_mask", mask, 1, file) != 0
    length = int(tokens.sum())
    if len(tokens) != len(text) or not tokens[:length].all():
        raise ValueError(
            f"{file}: prompt_mask marks {length} of {len(tokens)} tokens, not the first rows of {name}, which has "
            f"{len(text)}: pad captions at their end, and extract again"
        )
    return text[:length]


def _tensor(name: str, value: Any, dims: int, file: Path) -> Tensor:
    """The numbers, with so many dims: others before them must be 1. Raises ValueError for anything else."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{file}: {name} is a {type(value).__name__}, not a tensor: extract again")
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_complex():
        raise ValueError(f"{file}: {name} is a tensor of {value.layout} {value.dtype} on {value.device}: extract again")
    if value.ndim < dims or value.shape[:-dims].numel() != 1:
        raise ValueError(f"{file}: {name} has the shape {list(value.shape)}, not {dims} dims: extract again")
    return value.reshape(value.shape[-dims:])
