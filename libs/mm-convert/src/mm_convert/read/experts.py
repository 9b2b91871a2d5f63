"""Two experts of one architecture as one directory: one for high noise, one for low.

high_noise_model/  low_noise_model/                    as Wan-AI and alibaba-pai publish them
high_noise_model/  low_noise_model/  experts.json      ours: it also says where one takes over from the other
transformer/  transformer_2/  model_index.json         a diffusers repository: transformer is the one for high noise
…high_noise….safetensors  …low_noise….safetensors      two single files as ComfyUI has them, and nothing else; or .gguf

In each folder lies a whole model, or an adapter for one; a single file is a whole model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from mm_convert.files import read_json
from mm_convert.lora.names import is_lora
from mm_convert.store.safetensors import read_file, refuse_link_out
from mm_convert.write.install import replace_file

FOLDERS = {"high": "high_noise_model", "low": "low_noise_model"}
DIFFUSERS = {"high": "transformer", "low": "transformer_2"}
FILE, INDEX = "experts.json", "model_index.json"
FORMAT = "mm experts 1"
HALF = re.compile(r"(?<![a-z])(high|low)(?=$|[^a-z]|noise)", re.IGNORECASE)  # in the name of a file that has another
_NOISE = re.compile(r"(?<![a-z])(high|low)[ _-]?noise", re.IGNORECASE)  # in the name of any file


class Pair(NamedTuple):
    """Where the two experts lie: folders, or files.

    boundary: the noise level (sigma) from which on `high` generates, if it is said.
    """

    high: Path
    low: Path
    boundary: float | None


def open_experts(path: str | Path) -> Pair | None:
    """The two experts in a directory, or None if it is no such directory. What lies in their folders is not read.

    Raises ValueError for one of which only one expert is there, for one that holds experts of two layouts, and for a
    boundary that cannot be or is said twice.
    """
    path = Path(path)
    ours, theirs = ({e: f for e, f in names.items() if (path / f).is_dir()} for names in (FOLDERS, DIFFUSERS))
    if not ours and "low" not in theirs:
        return None if theirs or not path.is_dir() else _find_files(path)  # `transformer` alone is one model
    if ours and theirs:
        folders = ", ".join(f"{folder}/" for folder in (*ours.values(), *theirs.values()))
        raise ValueError(f"{path} holds {folders}: which two are meant is not clear; move the others elsewhere")
    folders, there = (FOLDERS, ours) if ours else (DIFFUSERS, theirs)
    missing = [expert for expert in folders if expert not in there]
    if missing:
        (expert,), (other,) = missing, there.values()
        raise ValueError(
            f"{path} holds one expert of two: {folders[expert]}/, the one for {expert} noise, is missing. Train it "
            f"into the same output (--expert), or copy the published one there; to use the other alone, "
            f"name {path / other}"
        )
    return Pair(path / folders["high"], path / folders["low"], _boundary(path))


def _find_files(path: Path) -> Pair | None:
    """Two files of whole models whose names say high and low. Raises ValueError for more of them than two."""
    files = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".gguf")]
    said = [{match[1].lower() for match in HALF.finditer(file.stem)} for file in files]
    halves = {e: [file for file, names in zip(files, said, strict=True) if names == {e}] for e in FOLDERS}
    if not all(halves.values()) or len(files) != sum(map(len, halves.values())) or any(path.glob("*.index.json")):
        return None
    for file in files:
        refuse_link_out(file)
    if any(file.suffix == ".safetensors" and is_lora(read_file(file)[0]) for file in files):
        return None
    if len(files) > 2:
        counts = " and ".join(f"{len(those)} for {expert} noise" for expert, those in halves.items())
        raise ValueError(
            f"{path} holds {len(files)} files of experts, by their names {counts}: put the two that belong together "
            "into a folder of their own (`ln FILE FOLDER` copies nothing), and name that; or name one file"
        )
    return Pair(*(those[0] for those in halves.values()), _boundary(path))


def expert_of(path: str | Path) -> str | None:
    """ "high" or "low" by the name of an expert's folder or single file; None for a name that does not tell
    (transformer/ may be one model).
    """
    path = Path(path)
    names = {name: expert for expert, name in FOLDERS.items()} | {DIFFUSERS["low"]: "low"}
    said = {match[1].lower() for match in _NOISE.finditer(path.stem)} if path.is_file() else set()
    return said.pop() if len(said) == 1 else names.get(path.name)


def write_experts(path: str | Path, boundary: float | None) -> dict[str, Path]:
    """Makes `path` a directory for two experts, and gives the folder of each ("high", "low") to write into.

    Raises ValueError if it is one with another boundary.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    said = _boundary(path)
    if said is not None and said != boundary:
        raise ValueError(f"{path / FILE} says boundary {said}, but it should be {boundary}: choose another directory")
    if boundary is not None:
        replace_file(path / FILE, experts_json(boundary))
    return {expert: path / folder for expert, folder in FOLDERS.items()}


def experts_json(boundary: float) -> str:
    """The content of experts.json."""
    return json.dumps({"format": FORMAT, "boundary": _check_boundary(boundary, FILE)}, indent=2) + "\n"


def _boundary(path: Path) -> float | None:
    """As experts.json or model_index.json says it."""
    ours, theirs = _json(path / FILE), _json(path / INDEX)
    if ours and ours.get("format") != FORMAT:
        raise ValueError(f"{path / FILE}: expected format {FORMAT!r} and a boundary between 0 and 1, found {ours}")
    said = {FILE: ours.get("boundary"), INDEX: theirs.get("boundary_ratio")}
    said = {file: _check_boundary(value, path / file) for file, value in said.items() if value is not None}
    if len(set(said.values())) > 1:
        both = " and ".join(f"{value} ({file})" for file, value in said.items())
        raise ValueError(f"{path} says two boundaries, {both}: correct the wrong one")
    return next(iter(said.values()), None)


def _check_boundary(boundary: Any, where: str | Path) -> float:
    if not isinstance(boundary, float) or not 0 < boundary < 1:
        raise ValueError(f"{where}: the boundary is {boundary!r}, but must be a noise level between 0 and 1, as 0.875")
    return boundary


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
