"""Writing a checkpoint folder: our own, or one under published names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert.checkpoint import FORMAT, VERSION
from mm_convert.content import Content, understand
from mm_convert.families.family import Config
from mm_convert.progress import Progress
from mm_convert.store.folder import Files, name_shards, new_folder, refuse_target, split, write_folder
from mm_convert.tensors import LazyTensor

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000


def save_checkpoint(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: Any,
    *,
    to: str = "mm",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    show_progress: bool = False,
) -> None:
    """Save tensors under our names as a checkpoint folder, moving one tensor at a time to the CPU.

    Args:
        tensors: our names to tensors, on any device. A lazy mapping is asked twice for each, for its shape and to write
            it; one that has a method `meta(name)`, which gives a tensor on the meta device, only to write it.
        config: the model's configuration, a dataclass or a mapping, for example a `WanConfig`.
        to: "mm", "original" or "diffusers".

    Raises ValueError, before anything is written, for names and shapes that are no whole model, for a config that
    contradicts them, and for a target that exists.
    """
    refuse_target(Path(path), overwrite)
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    items = {name: _lazy(tensors, name) for name in tensors}
    content = understand({name: item.shape for name, item in items.items()}, "what is to be saved")
    for field, value in content.config.items():
        if fields.get(field, value) != value:
            raise ValueError(f"the configuration says {field} {fields[field]}, the tensors say {value}")
    names = target_names(content, to)
    kept = {names[content.names[name]]: item for name, item in items.items()}
    shards = split(kept, shard_bytes)
    files = name_files(shards, to, {"format": "pt"})
    write(Path(path), files, config_for(content, {**fields, **content.config}, to), overwrite, show_progress)


def target_names(content: Content, to: str) -> dict[str, str]:
    """Our name -> name in the target."""
    dialects = content.family.table.dialects
    if to not in (FORMAT, *dialects):
        raise ValueError(f"cannot write {to!r}; choose one of {', '.join((FORMAT, *dialects))}")
    return content.translate(dialects[0] if to == FORMAT else to)


def name_files(shards: Sequence[Mapping[str, LazyTensor]], to: str, metadata: Mapping[str, str]) -> Files:
    return name_shards("model" if to == FORMAT else "diffusion_pytorch_model", shards, metadata, to == FORMAT)


def config_for(content: Content, config: Config, to: str) -> dict[str, Any]:
    """The config.json that belongs to the target."""
    family = content.family
    config, _ = family.complete(config)
    if to != FORMAT:
        return family.write_config[to](config)
    dialect = family.table.dialects[0]
    return {"format": FORMAT, "version": VERSION, "family": family.name, "dialect": dialect, "config": config}


def write(path: Path, files: Files, config: Mapping[str, Any] | bytes, overwrite: bool, show_progress: bool) -> None:
    """Let the folder appear, whole, under its name."""
    with new_folder(path, files.nbytes, overwrite) as folder:
        if not show_progress:
            write_folder(folder, files, config, lambda _: None)
            return
        with Progress(files.nbytes, path.name) as progress:
            write_folder(folder, files, config, progress)


def _lazy(tensors: Mapping[str, torch.Tensor], name: str) -> LazyTensor:
    from mm_convert.torch_tensors import lazy

    meta = tensors.meta(name) if hasattr(tensors, "meta") else tensors[name]
    return lazy(meta, lambda: tensors[name], name)
