"""Writing a checkpoint: our own folder, one under published names, MindSpeed-MM's tree, torch DCP, or one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert.checkpoint import FORMAT, VERSION
from mm_convert.content import Content, join_fused, understand
from mm_convert.families.family import Config, Family
from mm_convert.outputs import (
    Output,
    Plan,
    as_json,
    describe,
    safetensors_file,
    safetensors_files,
    text_file,
    torch_file,
)
from mm_convert.outputs import (
    split as split_shards,
)
from mm_convert.source import MM_FOLDER, TORCH_SUFFIXES
from mm_convert.stages import Places, Split, check
from mm_convert.store.dcp import write_dcp
from mm_convert.store.mindspeed import TRACKER, tree_files
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
    pp_layers: Mapping[str, Any] | Sequence[Any] = (),
    tp_size: int = 1,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    show_progress: bool = False,
) -> None:
    """Save tensors under our names as a checkpoint, moving one tensor at a time to the CPU.

    Args:
        tensors: our names to tensors, on any device. A lazy mapping is asked twice for each, for its shape and to write
            it; one that has a method `meta(name)`, which gives a tensor on the meta device, only to write it.
        config: the model's configuration, a dataclass or a mapping, for example a `WanConfig`.
        to, pp_layers, tp_size: as in `convert`.

    Raises ValueError, before anything is written, for names and shapes that are no whole model, for a config that
    contradicts them, and for a target that exists.
    """
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    items = {name: _lazy(tensors, name) for name in tensors}
    content = understand({name: item.shape for name, item in items.items()}, "what is to be saved")
    for field, value in content.config.items():
        if fields.get(field, value) != value:
            raise ValueError(f"the configuration says {field} {fields[field]}, the tensors say {value}")
    ours = {content.names[name]: item for name, item in items.items()}
    complete, _ = content.family.complete({**fields, **content.config})
    plan = target_plan(
        content,
        ours,
        complete,
        Path(path),
        to,
        split=split_of(content.family, pp_layers, tp_size),
        shard_bytes=shard_bytes,
        metadata={"format": "pt"},
        source="memory",
        source_form="our names",
    )
    plan.execute(overwrite=overwrite, show_progress=show_progress)


def split_of(family: Family, pp_layers: Mapping[str, Any] | Sequence[Any], tp_size: int) -> Split:
    """The split that a person asks for: lists by ladder, or one list for a family of one ladder."""
    if isinstance(pp_layers, Mapping):
        return Split.of(pp_layers, tp_size)
    if not pp_layers:
        return Split.of({}, tp_size)
    if not family.cuts:
        raise ValueError(f"{family.name} is not cut into pipeline stages")
    return Split.of({family.cuts.ladders[0].name: pp_layers}, tp_size)


def target_plan(
    content: Content,
    tensors: Mapping[str, LazyTensor],
    config: Config,
    target: Path,
    to: str,
    *,
    split: Split | None = None,
    shards: list[list[str]] | None = None,
    shard_bytes: int | None = None,
    metadata: Mapping[str, str],
    source: str,
    source_form: str,
    beside_source: bool = False,
) -> Plan:
    """The files that hold these tensors (our names) in the form `to`; arguments as in `convert`.

    Args:
        shards: our names by file, where neither `split` nor `shard_bytes` says otherwise.
        beside_source: `target` is the folder of the source; put what is made into a folder of it.
    """
    family = content.family
    dialect = _dialect(family, to)
    names = content.translate(dialect)
    split = split or Split()
    if family.cuts and (split.layers or split.tp > 1 or to == "mindspeed"):
        split = check(split, family.cuts, content.layers, config)
    elif split.layers or split.tp > 1:
        raise ValueError(f"{family.name} is not split over stages or ranks")
    about = describe(
        source,
        family.name,
        config,
        source_form,
        f"{to}, {dialect} names",
        split={"pp": split.pp, "vpp": split.vpp, "tp": split.tp, "layers": split.layers} if split.layers else None,
    )
    plan = Plan(target, [], about)
    if to in ("mindspeed", "dcp"):
        theirs = join_fused({names[n]: tensor for n, tensor in tensors.items()}, family, dialect, config)
        if to == "dcp":
            if split.layers or split.tp > 1:
                raise ValueError("a DCP folder holds whole tensors; every layout of ranks reads its part of them")
            nbytes = sum(tensor.nbytes for tensor in theirs.values())
            whole = {f"model.{name}": tensor for name, tensor in theirs.items()}
            plan.outputs = [Output(".", nbytes, lambda path, progress: write_dcp(path, whole, progress))]
            return plan
        assert family.cuts
        folder = "" if beside_source else "release/"
        files = tree_files(theirs, split, family.cuts, config)
        plan.outputs = [Output(folder + name, nbytes, write) for name, (nbytes, write) in files.items()]
        plan.inside = "release" if beside_source else ""
        plan.pointer = (TRACKER, "release")
        return plan

    theirs = join_fused({names[n]: tensor for n, tensor in tensors.items()}, family, dialect, config)
    if target.suffix in TORCH_SUFFIXES or target.suffix == ".safetensors":
        make = safetensors_file(target.name, theirs, metadata) if target.suffix == ".safetensors" else None
        plan.outputs, plan.single_file = [make or torch_file(target.name, theirs)], True
        return plan
    if split.layers and split.stages > 1:
        groups = _by_stage(content, theirs, split, config, dialect)
    elif shard_bytes or shards is None:
        groups = split_shards(theirs, shard_bytes or SHARD_BYTES)
    else:
        groups = [{names[n]: theirs[names[n]] for n in group} for group in shards]
    ours = to == FORMAT
    stem = "model" if ours or dialect.startswith("transformers") else "diffusion_pytorch_model"
    plan.outputs = safetensors_files(stem, groups, metadata, always_index=ours)
    plan.outputs.append(text_file("config.json", as_json(_config_json(family, config, to))))
    plan.inside = MM_FOLDER if ours and beside_source else ""
    return plan


def _dialect(family: Family, to: str) -> str:
    dialects = family.table.dialects
    forms = [FORMAT, *dialects, *(["dcp"] if "mindspeed" in dialects else [])]
    if to not in forms:
        raise ValueError(f"cannot write {family.name} as {to!r}; choose one of {', '.join(forms)}")
    return {FORMAT: dialects[0], "dcp": "mindspeed"}.get(to, to)


def _by_stage(
    content: Content, theirs: Mapping[str, LazyTensor], split: Split, config: Config, dialect: str
) -> list[dict[str, LazyTensor]]:
    """A file per stage, by where MindSpeed-MM would have each tensor."""
    assert content.family.cuts
    place = Places(split, content.family.cuts, config)
    named = zip(content.translate(dialect).values(), content.translate("mindspeed").values(), strict=True)
    groups: list[dict[str, LazyTensor]] = [{} for _ in range(split.stages)]
    for name, mindspeed_name in named:
        groups[place(mindspeed_name)[0]][name] = theirs[name]
    return groups


def _config_json(family: Family, config: Config, to: str) -> dict[str, Any]:
    """The config.json that belongs to the target."""
    if to != FORMAT:
        return family.write_config[to](config)
    dialect = family.table.dialects[0]
    return {"format": FORMAT, "version": VERSION, "family": family.name, "dialect": dialect, "config": config}


def _lazy(tensors: Mapping[str, torch.Tensor], name: str) -> LazyTensor:
    from mm_convert.torch_tensors import lazy

    meta = tensors.meta(name) if hasattr(tensors, "meta") else tensors[name]
    return lazy(meta, lambda: tensors[name], name)
