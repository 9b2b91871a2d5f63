"""Two experts, of models or of adapters, as one: converted expert by expert into one directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert.families.presets import published_boundary
from mm_convert.files import read_json
from mm_convert.lora.adapter import Adapter
from mm_convert.read.alike import refuse_unlike
from mm_convert.read.experts import DIFFUSERS, FILE, FOLDERS, INDEX, Pair, experts_json
from mm_convert.store.mm import as_json
from mm_convert.write.destinations import Folder
from mm_convert.write.outputs import Files, text_file

if TYPE_CHECKING:
    from mm_convert.read.checkpoint import Checkpoint

    PrepareOne = Callable[[str, Path, Path], tuple[Checkpoint | Adapter, Files]]


def prepare_pair(pair: Pair, target: Path, to: str, boundary: float | None, prepare_one: PrepareOne) -> Files:
    """What converting a pair would write: a folder for each expert, and what lies beside them.

    Args:
        to: the form; diffusers has other names for the folders, and the boundary in model_index.json.
        boundary: where the files do not say it; without, that of the published model, if it is one.
        prepare_one: opens an expert ("high" or "low") in one folder, and prepares writing it into another.

    Raises ValueError for experts that are not of one kind and architecture, for a boundary that contradicts the files,
    and for a target that is no folder or the source.
    """
    source = pair.high.parent
    if target.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin"):
        raise ValueError(f"{target} is one file, and {source} holds two experts: name a folder, or convert each alone")
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the source; name another target, or convert each expert in place: {pair.high}")
    names = DIFFUSERS if to == "diffusers" else FOLDERS
    high, high_files = prepare_one("high", pair.high, target / names["high"])
    low, low_files = prepare_one("low", pair.low, target / names["low"])
    refuse_unlike(pair, high, low)
    files = _join(target, {names["high"]: high_files, names["low"]: low_files})

    if None not in (boundary, pair.boundary) and boundary != pair.boundary:
        raise ValueError(f"{source} says boundary {pair.boundary}, not {boundary}: leave --boundary out")
    known = pair.boundary or boundary
    if known is None and not isinstance(high, Adapter):
        known, name = published_boundary(high.content.family, high.config)
        if known:
            files.notes.append(f"the boundary is not said and taken to be {known}, that of the published {name}")
    if known is None:
        files.notes.append("the boundary is not known, so it is not written: give --boundary")
    if to == "diffusers" and not isinstance(high, Adapter):
        files.outputs.append(text_file(INDEX, as_json(_model_index(source, high, known))))
    elif known is not None:
        files.outputs.append(text_file(FILE, experts_json(known).encode()))
    return files


def _join(target: Path, parts: dict[str, Files]) -> Files:
    """The files of several folders as those of one, which appears when all of them are whole."""
    joined = Files(Folder(target), [], {})
    for folder, files in parts.items():
        assert files.destination == Folder(target / folder), f"{folder} cannot be written with others"
        joined.outputs += [replace(output, name=f"{folder}/{output.name}") for output in files.outputs]
        joined.manifests |= {f"{folder}/{inside}": manifest for inside, manifest in files.manifests.items()}
        joined.needs_torch |= files.needs_torch
        joined.decodes |= files.decodes
        joined.notes += [note for note in files.notes if note not in joined.notes]
    return joined


def _model_index(source: Path, expert: Checkpoint, boundary: float | None) -> dict[str, Any]:
    """That of the source, or what diffusers has to know of a pair; the boundary in it."""
    said = read_json(source / INDEX) if (source / INDEX).is_file() else {}
    made = expert.content.family.write_config["diffusers"](expert.config)["_class_name"]
    image = expert.config["in_channels"] != expert.config["out_channels"]
    pipeline = {"vace": "WanVACEPipeline", "wan": "WanImageToVideoPipeline" if image else "WanPipeline"}
    experts = {name: ["diffusers", made] for name in DIFFUSERS.values()}
    index = {"_class_name": pipeline[expert.family], **experts}
    return index | said | ({} if boundary is None else {"boundary_ratio": boundary})
