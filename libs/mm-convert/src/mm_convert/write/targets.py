"""The forms that a checkpoint can take, each as the files of a target."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_convert.families.family import Config, Family
from mm_convert.read.content import Content, join_fused
from mm_convert.read.experts import expert_of
from mm_convert.store import mm
from mm_convert.store.dcp import write_dcp
from mm_convert.store.mindspeed import TRACKER, RankFiles, tree_files
from mm_convert.store.torch_file import SUFFIXES
from mm_convert.tensors.rules import GGUF
from mm_convert.tensors.stages import Places, Split, check
from mm_convert.tensors.views import FP8, Computed, LazyTensor
from mm_convert.write.destinations import Among, Folder, OneFile
from mm_convert.write.outputs import (
    Files,
    Output,
    describe,
    safetensors_file,
    safetensors_files,
    split_shards,
    text_file,
    torch_file,
)

FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what a dtype may be
FP8_SCALED = "fp8_scaled"  # for ComfyUI: matrices in fp8 with a scale, the rest as it is
COMFYUI = "comfyui"
SHARD_BYTES = 5_000_000_000  # of a file, where nothing else says how large

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Target:
    """What is wanted; `to`, `split` and `shard_bytes` as in `convert`.

    `shards`: our names by file, where neither `split` nor `shard_bytes` says otherwise.
    `in_place`: `path` is the folder of the source, which is to stay.
    `metadata`: free text for the headers of safetensors files.
    `fp8_scaled`: of ComfyUI's single files, whether matrices are written in fp8, each with a scale.
    """

    path: Path
    to: str
    split: Split = field(default_factory=Split)
    shards: list[list[str]] | None = None
    shard_bytes: int | None = None
    in_place: bool = False
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    fp8_scaled: bool = False

    @property
    def is_file(self) -> bool:
        return self.path.suffix in (*SUFFIXES, ".safetensors")


def split_of(family: Family, pp_layers: Mapping[str, Any] | Sequence[Any], tp_size: int) -> Split:
    """The split that a person asks for: lists by ladder, or one list for a family of one ladder."""
    if isinstance(pp_layers, Mapping):
        return Split.of(pp_layers, tp_size)
    if not pp_layers:
        return Split.of({}, tp_size)
    if not family.cuts:
        raise ValueError(f"{family.name} is not cut into pipeline stages")
    return Split.of({family.cuts.ladders[0].name: pp_layers}, tp_size)


def prepare_target(
    target: Target, content: Content, tensors: Tensors, config: Config, *, source: str, source_form: str
) -> Files:
    """The files that hold these tensors (by our names) in the wanted form. Raises ValueError for what cannot be."""
    family, to, split = content.family, target.to, target.split
    dialect = _dialect(family, to)
    if family.cuts and (split.layers or split.tp > 1 or to == "mindspeed"):
        split = check(split, family.cuts, content.layers, config)
    _refuse_impossible(target, split, family)
    names = content.translate(dialect)
    theirs = join_fused({names[ours]: tensor for ours, tensor in tensors.items()}, family, dialect, config)
    stated = {"pp": split.pp, "vpp": split.vpp, "tp": split.tp, "layers": split.layers} if split.layers else None
    manifest = describe(source, family.name, config, source_form, f"{to}, {dialect} names", split=stated)
    files = Files(Folder(target.path), [], {"": manifest})
    if split.tp > 1 and to != "mindspeed":
        files.notes.append(f"tensors stay whole in this layout; each of {split.tp} ranks reads its slice of them")

    if target.fp8_scaled:
        rows = family.table.names(dialect, content.layers, content.groups)
        theirs = _scale_fp8(theirs, {name for name, row in rows.items() if len(row.shape.split()) == 2})
    if target.is_file:
        safetensors = target.path.suffix == ".safetensors"
        file = safetensors_file(target.path.name, theirs, target.metadata) if safetensors else None
        files.destination, files.outputs = OneFile(target.path), [file or torch_file(target.path.name, theirs)]
    elif to == COMFYUI:
        files.outputs = [safetensors_file(_name_single(target.path), theirs, target.metadata)]
        if target.in_place:
            files.destination = Among(target.path)
    elif to == "dcp":
        nbytes = sum(tensor.nbytes for tensor in theirs.values())
        files.outputs = [Output(".", nbytes, lambda path, progress: write_dcp(path, {"model": theirs}, progress))]
    elif to == "mindspeed":
        _add_tree(files, theirs, split, family, config, target)
    else:
        if split.stages > 1:
            shards = _by_stage(content, theirs, split, config, dialect)
        elif target.shard_bytes or target.shards is None:
            shards = split_shards(theirs, target.shard_bytes or SHARD_BYTES)
        else:
            shards = [{names[ours]: theirs[names[ours]] for ours in group} for group in target.shards]
        _add_folder(files, shards, family, config, target, dialect)
    return files


def _refuse_impossible(target: Target, split: Split, family: Family) -> None:
    """Raises ValueError for what the form or the family does not have."""
    to = target.to
    if not family.cuts and (split.layers or split.tp > 1):
        raise ValueError(f"{family.name} is not split over stages or ranks")
    if to == "dcp" and target.is_file:
        raise ValueError(f"{target.path}: torch DCP is a folder; name one")
    if to == "mindspeed" and not target.is_file and not family.cuts:
        raise ValueError(f"MindSpeed-MM has {family.name} as one file; give the target a name in .pt")
    if to == COMFYUI and target.path.suffix in SUFFIXES:
        raise ValueError(f"{target.path}: ComfyUI's single files end in .safetensors")
    if target.fp8_scaled and (to != COMFYUI or not family.cuts):
        raise ValueError(
            f"fp8_scaled is for transformers in ComfyUI's single files (--to comfyui), not for {family.name} as {to}"
        )
    if split.tp > 1 and (target.is_file or to == COMFYUI):
        raise ValueError(f"{target.path} is one file, which holds whole tensors; leave the tp_size out")
    if target.shard_bytes is not None and target.shard_bytes < 1:
        raise ValueError(f"shard_bytes is {target.shard_bytes}; a file must hold something")
    if split.stages > 1 and (target.is_file or to in ("dcp", COMFYUI)):
        raise ValueError(f"{target.path} in the form {to} is not split into stages; leave the pp_layers out")
    if target.shard_bytes and (target.is_file or to in ("mindspeed", "dcp", COMFYUI) or split.stages > 1):
        raise ValueError("a size of files is for folders of safetensors that are not split into stages")


def _add_tree(files: Files, theirs: Tensors, split: Split, family: Family, config: Config, target: Target) -> None:
    assert family.cuts
    tree = tree_files(theirs, split, family.cuts, config)
    if target.in_place:
        files.destination = Folder(target.path / "release", pointer=(target.path / TRACKER, "release"))
        files.outputs = [Output(name, nbytes, write) for name, (nbytes, write) in tree.items()]
    else:
        files.outputs = release(tree)


def release(tree: RankFiles) -> list[Output]:
    """A tree of MindSpeed-MM's in a folder of its own, and what names it."""
    files = [Output(f"release/{name}", nbytes, write) for name, (nbytes, write) in tree.items()]
    return [*files, text_file(TRACKER, b"release", "release")]


def _add_folder(
    files: Files, shards: list[dict[str, LazyTensor]], family: Family, config: Config, target: Target, dialect: str
) -> None:
    ours = target.to == mm.FORMAT
    metadata = dict(target.metadata)
    if dialect.startswith(("diffusers", "transformers")):
        metadata.setdefault("format", "pt")  # transformers refuses files that do not say it
    stem = "model" if ours or dialect.startswith("transformers") else "diffusion_pytorch_model"
    files.outputs = safetensors_files(stem, shards, metadata, always_index=ours)
    if ours or dialect in family.write_config:  # the original VAEs and text encoders are published without
        files.outputs.append(text_file("config.json", mm.as_json(_config_json(family, config, target.to))))
    if target.in_place:
        files.destination = Folder(target.path / mm.FOLDER) if ours else Among(target.path)


def _dialect(family: Family, to: str) -> str:
    dialects = [dialect for dialect in family.table.dialects if dialect != GGUF]
    forms = [mm.FORMAT, *dialects, *(["dcp"] if "mindspeed" in dialects else [])]
    forms += [COMFYUI] if family.comfyui else []
    if to not in forms:
        raise ValueError(f"cannot write {family.name} as {to!r}; choose one of {', '.join(forms)}")
    return {mm.FORMAT: dialects[0], "dcp": "mindspeed", COMFYUI: family.comfyui}.get(to, to)


def _name_single(folder: Path) -> str:
    """Of a file for ComfyUI in a folder. It has all models in one folder, where those of two experts need two names."""
    expert = expert_of(folder)
    return f"{folder.parent.name}_{expert}_noise.safetensors" if expert else f"{folder.name}.safetensors"


def _scale_fp8(tensors: Tensors, matrices: Collection[str]) -> dict[str, LazyTensor]:
    """The matrices as codes of fp8, each with a scale beside it, as Comfy-Org publishes them; biases, norms and
    convolutions as they are.
    """
    from mm_convert.tensors.torch import quantise_fp8

    # Two elements say that products are not to be made in fp8: for that, scales of activations would be needed.
    found: dict[str, LazyTensor] = {"scaled_fp8": Computed("F8_E4M3", (2,), lambda start, stop: bytes(stop - start))}
    for name, tensor in tensors.items():
        if name in matrices:
            found[name], found[f"{name.removesuffix('.weight')}.scale_weight"] = quantise_fp8(tensor, name)
        else:
            found[name] = tensor
    return found


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
    if to != mm.FORMAT:
        return family.write_config[to](config)
    dialect = family.table.dialects[0]
    return {"format": mm.FORMAT, "version": mm.VERSION, "family": family.name, "dialect": dialect, "config": config}


def cast_all(tensors: Mapping[str, LazyTensor], dtype: str) -> dict[str, LazyTensor]:
    """The tensors with all of floating point in this dtype: one of `FLOATS`."""
    from mm_convert.tensors.torch import cast

    if dtype == FP8_SCALED:
        raise ValueError(f"{dtype} is for whole models in ComfyUI's single files (--to comfyui), not for this")
    if dtype not in FLOATS:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
    floating = {"F16", "BF16", "F32", "F64", *FP8}
    return {n: cast(tensor, FLOATS[dtype]) if tensor.dtype in floating else tensor for n, tensor in tensors.items()}
