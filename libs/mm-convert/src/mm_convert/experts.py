"""Two experts of one architecture as one directory: one for high noise, one for low.

high_noise_model/  low_noise_model/                    as Wan-AI and alibaba-pai publish them
high_noise_model/  low_noise_model/  experts.json      ours: it also says where one takes over from the other
transformer/  transformer_2/  model_index.json         a diffusers repository: transformer is the one for high noise
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

FOLDERS = {"high": "high_noise_model", "low": "low_noise_model"}
DIFFUSERS = {"high": "transformer", "low": "transformer_2"}
FILE, FORMAT = "experts.json", "mm experts 1"


class Pair(NamedTuple):
    """Where the two experts lie. boundary: the noise level (sigma) from which on `high` generates, if it is said."""

    high: Path
    low: Path
    boundary: float | None


def open_experts(path: str | Path) -> Pair | None:
    """The two experts in a directory, or None if it is no such directory.

    Raises ValueError for one of which only one expert is there, and for an experts.json that cannot be read.
    """
    path = Path(path)
    if (path / FOLDERS["high"]).is_dir() or (path / FOLDERS["low"]).is_dir():
        folders, boundary = FOLDERS, _boundary(path)
    elif (path / DIFFUSERS["low"]).is_dir():
        folders, boundary = DIFFUSERS, _index(path).get("boundary_ratio")
    else:
        return None
    missing = [expert for expert, folder in folders.items() if not (path / folder).is_dir()]
    if missing:
        (expert,) = missing
        raise ValueError(
            f"{path} holds one expert of two: {folders[expert]}/, the one for {expert} noise, is missing. Train it into "
            "the same output (--expert), or copy the published one there"
        )
    return Pair(path / folders["high"], path / folders["low"], boundary)


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
        (path / FILE).write_text(json.dumps({"format": FORMAT, "boundary": boundary}, indent=2) + "\n")
    return {expert: path / folder for expert, folder in FOLDERS.items()}


def _boundary(path: Path) -> float | None:
    file = path / FILE
    if not file.is_file():
        return None
    read = _json(file)
    boundary = read.get("boundary")
    if read.get("format") != FORMAT or not isinstance(boundary, float) or not 0 < boundary < 1:
        raise ValueError(f"{file}: expected format {FORMAT!r} and a boundary between 0 and 1, found {read}")
    return boundary


def _index(path: Path) -> dict:
    file = path / "model_index.json"
    return _json(file) if file.is_file() else {}


def _json(file: Path) -> dict:
    try:
        return {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from error
