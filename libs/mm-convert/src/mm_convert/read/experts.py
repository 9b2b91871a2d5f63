"""Two experts of one architecture as one directory: one for high noise, one for low.

high_noise_model/  low_noise_model/                    as Wan-AI and alibaba-pai publish them
high_noise_model/  low_noise_model/  experts.json      ours: it also says where one takes over from the other
transformer/  transformer_2/  model_index.json         a diffusers repository: transformer is the one for high noise

In each folder lies a whole model, or an adapter for one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mm_convert.files import read_json
from mm_convert.write.install import replace_file

FOLDERS = {"high": "high_noise_model", "low": "low_noise_model"}
DIFFUSERS = {"high": "transformer", "low": "transformer_2"}
FILE, INDEX = "experts.json", "model_index.json"
FORMAT = "mm experts 1"


class Pair(NamedTuple):
    """Where the two experts lie. boundary: the noise level (sigma) from which on `high` generates, if it is said."""

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
        return None  # `transformer` alone is one model
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


def expert_of(folder: str | Path) -> str | None:
    """ "high" or "low" by the name of an expert's folder; None for a name that does not tell (transformer/ may be one
    model).
    """
    names = {name: expert for expert, name in FOLDERS.items()} | {DIFFUSERS["low"]: "low"}
    return names.get(Path(folder).name)


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
