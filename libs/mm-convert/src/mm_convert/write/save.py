"""Writing a checkpoint: our own folder, one under published names, MindSpeed-MM's tree, torch DCP, or one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert.read.content import identify
from mm_convert.tensors.mapping import lazy_tensors
from mm_convert.write.targets import Target, prepare_target, split_of

if TYPE_CHECKING:
    import torch


def save_checkpoint(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: Any,
    *,
    to: str = "mm",
    pp_layers: Mapping[str, Any] | Sequence[Any] = (),
    tp_size: int = 1,
    overwrite: bool = False,
    shard_bytes: int | None = None,
    show_progress: bool = False,
) -> None:
    """Save tensors under our names as a checkpoint, moving one tensor at a time to the CPU.

    Args:
        tensors: our names to tensors, on any device. A lazy mapping is asked twice for each, for its shape and to write
            it; one that has a method `meta(name)`, which gives a tensor on the meta device, only to write it.
        config: the model's configuration, a dataclass or a mapping, for example a `WanConfig`.
        to, pp_layers, tp_size, shard_bytes: as in `convert`; files hold at most 5 GB where nothing else is said.

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
    complete, _ = content.family.complete({**fields, **content.config})
    target = Target(Path(path), to, split_of(content.family, pp_layers, tp_size), shard_bytes=shard_bytes)
    files = prepare_target(target, content, ours, complete, source="memory", source_form="our names")
    files.write(overwrite=overwrite, show_progress=show_progress)
