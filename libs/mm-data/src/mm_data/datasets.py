"""Data sets by index: videos as pixels, and their encoded features."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

from safetensors import safe_open
from torch import Tensor

from mm_data.cache import FORMAT


class Features(TypedDict):
    """One encoded sample."""

    id: str
    latents: Tensor  # C F H W
    text: list[Tensor]  # S D, one per caption
    extras: dict[str, Tensor]  # whatever else the model is conditioned on


@dataclass(frozen=True)
class Record:
    """Where the tensors of a sample lie: `names` maps latents, text.0, … to names in `file`."""

    id: str
    file: Path
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def load(self, only: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        with safe_open(self.file, "pt") as file:
            return {name: file.get_tensor(self.names[name]) for name in only or self.names}


class FeatureDataset:
    """The finished features in a folder, in the order of the manifest they were made from.

    `dataset[i]` reads a sample from disk. `dataset.shapes[i]` is the shape C F H W of its latents, known without
    reading: samples of equal shape form a bucket. All samples of a bucket have the same extras. Raises ValueError for a
    folder whose extraction has not finished.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header, self.records = read_index(self.path)
        self._empty = header["empty_text"]
        self.ids = [record.id for record in self.records]
        self.shapes = [record.shapes["latents"] for record in self.records]
        first: dict[tuple[int, ...], Record] = {}
        for record in self.records:
            other = first.setdefault(record.shapes["latents"], record)
            if _extras(record.shapes) != _extras(other.shapes):
                raise ValueError(
                    f"{self.path}: samples {other.id} and {record.id} have latents of the same shape but different conditions, "
                    f"{_extras(other.shapes)} and {_extras(record.shapes)}: they cannot share a batch; extract them into two folders"
                )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Features:
        record = self.records[index]
        tensors = record.load()
        text = [tensors[f"text.{i}"] for i in range(len(record.names)) if f"text.{i}" in tensors]
        return Features(
            id=record.id,
            latents=tensors["latents"],
            text=text,
            extras={name: tensors[name] for name in _extras(record.shapes)},
        )

    @cached_property
    def empty_text(self) -> Tensor | None:
        """The encoding (S D) of the empty prompt, or None if the extraction stored none."""
        if self._empty is None:
            return None
        return _record(self.path, {"id": "", **self._empty}).load(("text.0",))["text.0"]


def _extras(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in sorted(shapes.items()) if name != "latents" and not name.startswith("text.")}


def read_index(path: Path) -> tuple[dict, list[Record]]:
    """Header and records of a folder's dataset.jsonl."""
    index = path / "dataset.jsonl"
    if not index.exists():
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder of features")
        some = any(path.glob("shards/*.safetensors"))
        why = (
            "the extraction into it has not finished: run the same command again, it continues"
            if some
            else "it holds no features"
        )
        raise ValueError(f"{path} has no dataset.jsonl: {why}")
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    if not lines or lines[0].get("format") != FORMAT:
        raise ValueError(f"{index}: expected {FORMAT!r} in its first line")
    if len(lines) == 1:
        raise ValueError(f"{index} lists no samples: see {path / 'failures.jsonl'}")
    return lines[0], [_record(path, line) for line in lines[1:]]


def _record(path: Path, line: dict) -> Record:
    names = {name: f"{line['key']}/{name}" for name in line["shapes"]}
    return Record(
        line["id"], path / line["shard"], names, {name: tuple(shape) for name, shape in line["shapes"].items()}
    )
