"""The forms that a checkpoint can take, each as a plan of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_convert.families.family import Config, Family
from mm_convert.read.checkpoint import FORMAT, VERSION
from mm_convert.read.content import Content, join_fused
from mm_convert.read.source import MM_FOLDER, TORCH_SUFFIXES
from mm_convert.store.dcp import write_dcp
from mm_convert.store.mindspeed import TRACKER, tree_files
from mm_convert.tensors.stages import Places, Split, check
from mm_convert.tensors.views import LazyTensor
from mm_convert.write.outputs import (
    Output,
    Plan,
    as_json,
    describe,
    safetensors_file,
    safetensors_files,
    split_shards,
    text_file,
    torch_file,
)

SHARD_BYTES = 5_000_000_000  # of a file, where nothing else says how large

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Target:
    """What is wanted; `to`, `split` and `shard_bytes` as in `convert`.

    `shards`: our names by file, where neither `split` nor `shard_bytes` says otherwise.
    `beside_source`: `path` is the folder of the source, which is to stay.
    `metadata`: free text for the headers of safetensors files.
    """

    path: Path
    to: str
    split: Split = field(default_factory=Split)
    shards: list[list[str]] | None = None
    shard_bytes: int | None = None
    beside_source: bool = False
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def is_file(self) -> bool:
        return self.path.suffix in (*TORCH_SUFFIXES, ".safetensors")


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
    target: Target, content: Content, tensors: Tensors, config: Config, *, source: str, source_form: str
) -> Plan:
    """The files that hold these tensors (by our names) in the wanted form. Raises ValueError for what cannot be."""
    family, to, split = content.family, target.to, target.split
    dialect = _dialect(family, to)
    if family.cuts and (split.layers or split.tp > 1 or to == "mindspeed"):
        split = check(split, family.cuts, content.layers, config)
    elif split.layers or split.tp > 1:
        raise ValueError(f"{family.name} is not split over stages or ranks")
    if to == "dcp" and target.is_file:
        raise ValueError(f"{target.path}: torch DCP is a folder; name one")
    if to == "mindspeed" and not target.is_file and not family.cuts:
        raise ValueError(f"MindSpeed-MM has {family.name} as one file; give the target a name in .pt")
    if split.tp > 1 and target.is_file:
        raise ValueError(f"{target.path} is one file, which holds whole tensors; leave the tp_size out")
    if target.shard_bytes is not None and target.shard_bytes < 1:
        raise ValueError(f"shard_bytes is {target.shard_bytes}; a file must hold something")
    if split.stages > 1 and (target.is_file or to == "dcp"):
        raise ValueError(f"{target.path} in the form {to} is not split into stages; leave the pp_layers out")
    if target.shard_bytes and (target.is_file or to in ("mindspeed", "dcp") or split.stages > 1):
        raise ValueError("a size of files is for folders of safetensors that are not split into stages")

    names = content.translate(dialect)
    theirs = join_fused({names[ours]: tensor for ours, tensor in tensors.items()}, family, dialect, config)
    stated = {"pp": split.pp, "vpp": split.vpp, "tp": split.tp, "layers": split.layers} if split.layers else None
    about = describe(source, family.name, config, source_form, f"{to}, {dialect} names", split=stated)
    plan = Plan(target.path, [], about)
    if split.tp > 1 and to != "mindspeed":
        plan.notes.append(f"tensors stay whole in this layout; each of {split.tp} ranks reads its slice of them")

    if target.is_file:
        safetensors = target.path.suffix == ".safetensors"
        file = safetensors_file(target.path.name, theirs, target.metadata) if safetensors else None
        plan.outputs, plan.single_file = [file or torch_file(target.path.name, theirs)], True
    elif to == "dcp":
        nbytes = sum(tensor.nbytes for tensor in theirs.values())
        plan.outputs = [Output(".", nbytes, lambda path, progress: write_dcp(path, {"model": theirs}, progress))]
    elif to == "mindspeed":
        _plan_tree(plan, theirs, split, family, config, target.beside_source)
    else:
        if split.stages > 1:
            shards = _by_stage(content, theirs, split, config, dialect)
        elif target.shard_bytes or target.shards is None:
            shards = split_shards(theirs, target.shard_bytes or SHARD_BYTES)
        else:
            shards = [{names[ours]: theirs[names[ours]] for ours in group} for group in target.shards]
        _plan_folder(plan, shards, family, config, target, dialect)
    return plan


def _plan_tree(plan: Plan, theirs: Tensors, split: Split, family: Family, config: Config, beside: bool) -> None:
    assert family.cuts
    folder = "" if beside else "release/"
    files = tree_files(theirs, split, family.cuts, config)
    plan.outputs = [Output(folder + name, nbytes, write) for name, (nbytes, write) in files.items()]
    plan.inside = "release" if beside else ""
    plan.pointer = (TRACKER, "release")


def _plan_folder(
    plan: Plan, shards: list[dict[str, LazyTensor]], family: Family, config: Config, target: Target, dialect: str
) -> None:
    ours = target.to == FORMAT
    metadata = dict(target.metadata)
    if dialect.startswith(("diffusers", "transformers")):
        metadata.setdefault("format", "pt")  # transformers refuses files that do not say it
    stem = "model" if ours or dialect.startswith("transformers") else "diffusion_pytorch_model"
    plan.outputs = safetensors_files(stem, shards, metadata, always_index=ours)
    if ours or dialect in family.write_config:  # the original VAEs and text encoders are published without
        plan.outputs.append(text_file("config.json", as_json(_config_json(family, config, target.to))))
    plan.inside = MM_FOLDER if ours and target.beside_source else ""
    plan.among_others = target.beside_source and not ours


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
