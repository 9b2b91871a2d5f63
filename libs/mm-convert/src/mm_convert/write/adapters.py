"""Writing adapters (LoRA), in any format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mm_convert.lora.adapter import Adapter
from mm_convert.lora.names import FILES, PEFT
from mm_convert.lora.reading import read_lora
from mm_convert.lora.writing import lora_tensors
from mm_convert.store.mindspeed import rank_files
from mm_convert.store.mm import as_json
from mm_convert.store.torch_file import SUFFIXES
from mm_convert.tensors.mapping import lazy_tensors
from mm_convert.tensors.stages import Split
from mm_convert.write.destinations import Folder, OneFile
from mm_convert.write.outputs import Files, describe, safetensors_file, text_file
from mm_convert.write.targets import cast_all, release

if TYPE_CHECKING:
    import torch


def save_lora(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    alpha: float,
    *,
    dropout: float = 0.0,
    base: str = "",
    to: str = "mm",
    overwrite: bool = False,
) -> Path:
    """Save the low-rank adapters that are among some tensors, moving one tensor at a time to the CPU.

    Args:
        path: a folder to make, or one file in .safetensors.
        tensors: as a model's state_dict has them, `….lora_A.weight` or peft's `….lora_A.default.weight`; all others are
            left out. A lazy mapping is asked as by `save_checkpoint`.
        alpha: W becomes W + alpha/rank · B A.
        dropout: on the input of A in training; recorded in adapter_config.json.
        base: the model that the adapters are for, a name or a path; recorded for people and for peft.
        to: "mm" or "peft" (they are one), "diffusers", "comfyui" or "mindspeed".

    Returns the path. Raises ValueError, before anything is written, for a target that exists, for tensors of which none
    is an adapter, and for adapters of no known family.
    """
    factors = lazy_tensors(tensors, (name for name in tensors if ".lora_" in name))
    if not factors:
        raise ValueError(f"nothing to write to {path}: none of {len(tensors)} tensors is a LoRA adapter")
    named = {f"{PEFT}{name.removeprefix(PEFT).replace('.default.', '.')}": factor for name, factor in factors.items()}
    adapter = replace(read_lora(named, {}, None, "what is to be saved", alpha), base=base, dropout=dropout)
    prepare_adapter(adapter, None, path, to).write(overwrite=overwrite)
    return Path(path)


def prepare_adapter(
    adapter: Adapter, source: str | Path | None, target: str | Path, to: str, dtype: str | None = None
) -> Files:
    """What writing an adapter in a format would write: a folder, or one file for a target in .safetensors.

    `source` is where the adapter lies; None if it lies in memory.
    """
    target = Path(target)
    here, there = Path(source or "memory").resolve(), target.resolve()
    if source and (here == there or there in here.parents or here in there.parents):
        raise ValueError(f"{target} is the adapter itself, or holds it, or lies in it; name another target")
    tensors, metadata, config = lora_tensors(adapter, to)
    if dtype is not None:  # of the factors; alpha is no weight
        tensors |= cast_all({name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}, dtype)
    more = {"metadata": metadata} if to == "mindspeed" else {}
    family = adapter.family
    about = describe(
        str(here) if source else "memory", family.name, {}, f"LoRA, {adapter.format}", f"LoRA, {to}", **more
    )
    files = Files(Folder(target), [], {"": about}, notes=list(adapter.notes))
    if to == "mindspeed":
        if target.suffix in (".safetensors", *SUFFIXES):
            raise ValueError(f"{target}: MindSpeed-MM's adapters are folders; name one")
        assert family.cuts
        files.outputs = release(rank_files([tensors], Split(), family.cuts))
        return files
    if target.suffix in SUFFIXES:
        raise ValueError(f"{target}: adapters are written as safetensors; name a folder, or a file in .safetensors")
    files.needs_torch = dtype is not None
    if target.suffix == ".safetensors":
        files.destination, files.outputs = OneFile(target), [safetensors_file(target.name, tensors, metadata)]
        return files
    files.outputs = [safetensors_file(FILES[to], tensors, metadata)]
    if config:
        files.outputs.append(text_file("adapter_config.json", as_json(config)))
    return files
