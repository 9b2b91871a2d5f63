"""What programs write with: `convert`, from files; `save_checkpoint` and `save_lora`, from memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert.lora.names import PEFT
from mm_convert.lora.reading import read_lora
from mm_convert.read.checkpoint import Checkpoint, open_checkpoint
from mm_convert.read.content import identify
from mm_convert.store.mm import FORMAT, as_json, name_of
from mm_convert.tensors.mapping import lazy_tensors
from mm_convert.tensors.stages import Layers
from mm_convert.write.outputs import copy_file, text_file
from mm_convert.write.prepare import config_of, prepare_adapter, prepare_conversion, state_dtype
from mm_convert.write.targets import Target, cast_all, prepare_target, split_of

if TYPE_CHECKING:
    import torch


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "mm",
    *,
    pp_layers: Layers | Mapping[str, Layers] = (),
    tp_size: int = 1,
    shard_bytes: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
    sha256: bool = False,
) -> Checkpoint:
    """Rewrite a checkpoint under the names and with the files of `to`; tensors keep their bytes, but for `dtype`.

    Args:
        source: anything that `open_checkpoint` reads.
        target: a folder that does not exist yet (with `overwrite`: or that holds nothing but a checkpoint); a name in
            .safetensors or .pt makes one file. The same as `source`: published files stay, and what is made of them
            goes into `mm/` or `release/` beside them.
        to: "mm" (our own layout), "comfyui" (one file as ComfyUI reads it), "mindspeed" (MindSpeed-MM's tree), "dcp"
            (torch DCP with MindSpeed-MM's names), or one of the family's dialects: "original", "diffusers",
            "transformers".
        pp_layers: layers of each pipeline stage, flat or one list per virtual stage; by ladder where there are several
            ({"llm": …, "vit": …}). In our own layout a stage is a file.
        tp_size: tensor-parallel ranks. In our own layout tensors stay whole, any rank reads its slice of them.
        shard_bytes: regroup into files of at most so many bytes; None keeps the grouping of the source.
        dtype: "float32", "bfloat16" or "float16" for all tensors of floating point (needs torch); with "comfyui" also
            "fp8_scaled": every matrix in fp8, with a scale, the rest as it is.
        sha256: note the sum of every written tensor in `mm_convert.json`.

    Returns the source as it was opened; its `notes` say what was dropped. Raises ValueError before anything is
    written.
    """
    checkpoint = open_checkpoint(source)
    files = prepare_conversion(
        checkpoint, target, to, pp_layers=pp_layers, tp_size=tp_size, shard_bytes=shard_bytes, dtype=dtype
    )
    files.write(overwrite=overwrite, show_progress=show_progress, sha256=sha256)
    return checkpoint


def save_checkpoint(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: Any,
    *,
    to: str = "mm",
    pp_layers: Mapping[str, Any] | Sequence[Any] = (),
    tp_size: int = 1,
    dtype: str | None = None,
    published: str | Path | None = None,
    copies: Sequence[str] = (),
    overwrite: bool = False,
    shard_bytes: int | None = None,
    show_progress: bool = False,
) -> None:
    """Save tensors under our names as a checkpoint, moving one tensor at a time to the CPU.

    Args:
        tensors: our names to tensors, on any device. A lazy mapping is asked twice for each, for its shape and to write
            it; one that has a method `meta(name)`, which gives a tensor on the meta device, only to write it.
        config: the model's configuration, a dataclass or a mapping, for example a `WanConfig`.
        to, pp_layers, tp_size, shard_bytes, dtype: as in `convert`; files hold at most 5 GB where nothing else is said.
        published: a folder of the hub, as that from which these weights were trained. Where its config.json is of the
            same architecture, it is kept, with our dtype in it. For published forms, not for our own.
        copies: names of its files that go along where they are there, as those of a tokenizer.

    Raises ValueError, before anything is written, for names and shapes that are no whole model, for a config that
    contradicts them, and for a target that exists.
    """
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    items = lazy_tensors(tensors, tensors)
    content = identify({name: item.shape for name, item in items.items()}, "what is to be saved")
    for field, value in content.config.items():
        if fields.get(field, value) != value:
            raise ValueError(f"the configuration says {field} {fields[field]}, the tensors say {value}")
    ours = {content.names[name]: item for name, item in items.items()}
    ours = ours if dtype is None else cast_all(ours, dtype)
    complete, _ = content.family.complete({**fields, **content.config})
    target = Target(Path(path), to, split_of(content.family, pp_layers, tp_size), shard_bytes=shard_bytes)
    files = prepare_target(target, content, ours, complete, source="memory", source_form="our names")
    if "config.json" in files.names and to != FORMAT and (published or dtype):
        folder = None if published is None else Path(published)
        json_ = config_of(folder, content.family, complete) or content.family.write_config[to](complete)
        said = text_file("config.json", as_json(state_dtype(json_, dtype)))
        files.outputs = [said if output.name == said.name else output for output in files.outputs]
        files.outputs += [] if folder is None else [copy_file(folder / n) for n in copies if (folder / n).is_file()]
    files.write(overwrite=overwrite, show_progress=show_progress)


def save_lora(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    alpha: float,
    *,
    dropout: float = 0.0,
    base: str | Path = "",
    trained_on: Mapping[str, str] | None = None,
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
        base: the model that the adapters are for, a name or a path; its name is recorded, for people and for peft.
        trained_on: facts of that model, recorded in the header; see `mm_convert.lora.base`.
        to: "mm" or "peft" (they are one), "diffusers", "comfyui" or "mindspeed".

    Returns the path. Raises ValueError, before anything is written, for a target that exists, for tensors of which none
    is an adapter, and for adapters of no known family.
    """
    factors = lazy_tensors(tensors, (name for name in tensors if ".lora_" in name))
    if not factors:
        raise ValueError(f"nothing to write to {path}: none of {len(tensors)} tensors is a LoRA adapter")
    named = {f"{PEFT}{name.removeprefix(PEFT).replace('.default.', '.')}": factor for name, factor in factors.items()}
    adapter = read_lora(named, {}, None, "what is to be saved", alpha)
    adapter = dataclasses.replace(adapter, base=name_of(base), dropout=dropout, trained_on=trained_on or {})
    prepare_adapter(adapter, None, path, to).write(overwrite=overwrite)
    return Path(path)
