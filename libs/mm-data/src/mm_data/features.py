"""Encoded features, by index: what training reads."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from mm_data import mindspeed
from mm_data.batch import Batch, Pick, pad_texts
from mm_data.cache import FORMAT, check_meta
from mm_data.captions import OWN, Captions
from mm_data.files import parse_json, read_lines, shorten, show
from mm_data.sets import Portion, SampleSet, is_sets_file, mix, read_sets, weights_of
from mm_data.shards import Shards, check_shard, read_metadata


class Features(TypedDict):
    """One encoded sample."""

    id: str
    latents: Tensor  # C F H W
    text: list[Tensor]  # S D, one per caption
    conditions: dict[str, Tensor]  # whatever else the model is conditioned on


class Record(Protocol):
    """Where a sample lies. Names of tensors: latents, text.0, text.1, ..., and of conditions anything else."""

    id: str
    shapes: dict[str, tuple[int, ...]]
    file: Path

    def load(self) -> dict[str, Tensor]: ...


class FeatureDataset:
    """The finished features in a folder, in the order of the manifest that they were made from.

    `path` is a folder filled by `FeatureCache`, or one that MindSpeed-MM's feature extraction has written; or a file of
    sets (`mm_data.sets`) of such folders. `portions` says how often samples are shown, as the sets say from which the
    features were made, and those of the file.

    `dataset[i]` reads a sample from disk. `ids[i]` is unique. `buckets[i]` is the shape C F H W of the latents, known
    without reading: all samples of a bucket have the same conditions. `captions` says which text a batch shows; with
    None batches hold no text, and samples need none.

    Raises ValueError for a folder that holds no features, whose extraction has not finished, or that lacks the texts
    that `captions` may draw; and for folders that other encoders have filled.
    """

    def __init__(self, path: str | Path, captions: Captions | None = OWN):
        self.path = Path(path)
        self.captions = captions
        found = _read_sets(self.path) if is_sets_file(self.path) else _read_folder(self.path)
        self.records, self._empty, self.portions, self._indices = found
        self.ids = [record.id for record in self.records]
        self.buckets = [record.shapes["latents"] for record in self.records]
        self.num_captions = [sum(name.startswith("text.") for name in record.shapes) for record in self.records]
        if captions:
            captions.check(self.path, self.ids, self.num_captions, self._empty is not None)
        first: dict[tuple[int, ...], Record] = {}
        for record in self.records:
            other = first.setdefault(record.shapes["latents"], record)
            if _conditions(record.shapes) != _conditions(other.shapes):
                raise ValueError(
                    f"{self.path}: samples {other.id} and {record.id} have latents of one shape but different "
                    f"conditions, {_conditions(other.shapes)} and {_conditions(record.shapes)}, so they cannot share a "
                    "batch: extract them into two folders"
                )

    def __len__(self) -> int:
        return len(self.records)

    @property
    def times(self) -> list[Fraction]:
        """How often each sample is shown in an epoch."""
        return [portion.times for portion in self.portions for _ in range(portion.samples)]

    @property
    def sets(self) -> list[tuple[int, Fraction]]:
        """As `mm_data.order` takes them."""
        return weights_of(self.portions)

    @property
    def files(self) -> dict[str, Path]:
        """What samples are read from, by the path below the folder (from the file of sets): lists, files of tensors."""
        records = [*self.records, *([self._empty] if self._empty else [])]
        top = self.path.parent if is_sets_file(self.path) else self.path
        files = dict.fromkeys([*self._indices, *(record.file for record in records)])
        return {os.path.relpath(file, top): file for file in files}

    @property
    def encoding(self) -> str | None:
        """Changes with the encoders that made these features, their dtype and tiles, and the task; None where the
        folder does not say it.
        """
        return self._empty.key if self._empty else None

    @cached_property
    def encoders(self) -> dict[str, str]:
        """Identities of the files of the encoders (`identify_files`), by their names as `vae/config.json`; {} where the
        folder does not say them.
        """
        if self._empty is None:
            return {}
        file = self._empty.file
        return check_meta(parse_json(read_metadata(file)[self._empty.key], file), file).get("encoders", {})

    @property
    def contents(self) -> list[str | None]:
        """Of every sample, what identifies the file that it was made from; None where the folder does not say it."""
        return [getattr(record, "content", None) for record in self.records]

    def check_files(self) -> None:
        """Raise ValueError, naming it, for a file of tensors that is gone, damaged or cut off, by their headers."""
        files = dict.fromkeys(record.file for record in [*self.records, *([self._empty] if self._empty else [])])
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(check_shard, (file for file in files if file.suffix == ".safetensors")))  # others were read

    def __getitem__(self, index: int) -> Features:
        record = self.records[index]
        tensors = record.load()
        return Features(
            id=record.id,
            latents=tensors["latents"],
            text=[tensors[f"text.{i}"] for i in range(self.num_captions[index])],
            conditions={name: tensors[name] for name in _conditions(record.shapes)},
        )

    def batch(self, picks: Sequence[Pick]) -> Batch:
        """Samples of one bucket: `latents` B C F H W, `text` and `text_mask` as of `pad_texts`, and every condition
        B ... by its name.
        """
        samples = [self[pick.index] for pick in picks]
        tensors = {"latents": torch.stack([sample["latents"] for sample in samples])}
        if self.captions:
            texts = [self._text(sample, pick.epoch) for sample, pick in zip(samples, picks, strict=True)]
            tensors |= pad_texts(texts)
        for name in samples[0]["conditions"]:
            tensors[name] = torch.stack([sample["conditions"][name] for sample in samples])
        return Batch(tensors, [sample["id"] for sample in samples], [pick.epoch for pick in picks])

    def _text(self, sample: Features, epoch: int) -> Tensor:
        chosen = self.captions.choose(len(sample["text"]), epoch, sample["id"])
        return self.empty_text if chosen is None else sample["text"][chosen]

    @property
    def longest_text(self) -> tuple[int, str]:
        """Rows of the longest text, and the id of its sample; known without reading."""
        rows = [
            max((s[0] for name, s in r.shapes.items() if name.startswith("text.")), default=0) for r in self.records
        ]
        return max(rows), self.ids[rows.index(max(rows))]

    @cached_property
    def empty_text(self) -> Tensor | None:
        """The encoding (S D) of the empty prompt, or None if the extraction stored none."""
        return self._empty.load()["text.0"] if self._empty else None


@dataclass(frozen=True)
class ShardRecord:
    """A line of dataset.jsonl."""

    id: str
    shapes: dict[str, tuple[int, ...]]
    file: Path
    key: str
    shards: Shards = field(repr=False, compare=False)
    content: str | None = None  # of the file that it was made from, where that is known

    def load(self) -> dict[str, Tensor]:
        """The tensors. Raises ValueError, naming the shard, where they are no longer what dataset.jsonl says."""
        found = self.shards.read(self.file, [f"{self.key}/{name}" for name in self.shapes])
        tensors = {name: found[f"{self.key}/{name}"] for name in self.shapes}
        for name, shape in self.shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(
                    f"{self.file}: {name} of sample {self.id} has shape {list(tensors[name].shape)}, dataset.jsonl "
                    f"says {list(shape)}: they are of two extractions, so extract again"
                )
        return tensors


Found = tuple[list[Record], ShardRecord | None, list[Portion], list[Path]]
"""Records, that of the empty prompt, how often they are shown, and the lists in which that stands."""


def _read_sets(path: Path) -> Found:
    """Those of several folders. Ids begin with the folder, as it is written."""
    records: list[Record] = []
    empty: dict[Path, ShardRecord] = {}
    filled, indices = [], []
    for one in read_sets(path, of_features=True):
        own, its_empty, portions, its_indices = _read_folder(one.path)
        records += [replace(record, id=f"{one.prefix}{record.id}") for record in own]
        empty |= {one.path: its_empty} if its_empty else {}
        filled.append((one, portions))
        indices += its_indices
    (first, kept), *others = empty.items() or [(path, None)]
    for other, its_empty in others:
        if its_empty.key != kept.key:
            raise ValueError(
                f"{path}: {first} and {other} were made by other encoders, with other tiles of the VAE, in another "
                "dtype, or for another task: extract one of them again as the other"
            )
    if twice := [name for name, count in Counter(record.id for record in records).items() if count > 1]:
        raise ValueError(
            f"{path}: {len(twice)} samples are in two sets, e.g. {shorten(twice[0])}: name each folder once; repeats "
            "shows its samples more often"
        )
    return records, kept, mix(filled), indices


def _read_folder(path: Path) -> Found:
    if mindspeed.is_feature_folder(path):
        records = mindspeed.records(path)
        return records, None, [Portion("", len(records))], [path / "data.jsonl"]
    return _read_index(path)


def _read_portions(said: Any, index: Path, count: int) -> list[Portion]:
    """Of the sets that the samples were made from, as dataset.jsonl has them."""
    if said is None:
        return [Portion("", count)]
    try:
        filled = [
            (
                SampleSet(
                    Path(),
                    str(one["name"]),
                    number,
                    repeats=Fraction(one["repeats"]),
                    weight=None if one["weight"] is None else Fraction(one["weight"]),
                ),
                [Portion("", int(one["samples"]))],
            )
            for number, one in enumerate(said)
        ]
        if sum(portion.samples for _, [portion] in filled) != count:
            raise ValueError(f"they are not {count} samples")
        return mix(filled)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{index}: its sets are none ({show(said)}; {error}): the same extraction again writes this file anew"
        ) from error


def _read_index(path: Path) -> Found:
    """Of a folder's dataset.jsonl."""
    index = path / "dataset.jsonl"
    expected = "expected a folder that `python -m mm_train.extract --output …` or MindSpeed-MM's extraction has filled"
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: {expected}")
    if not index.exists():
        started = any(path.glob("shards/*"))
        why = (
            "the extraction has not finished; run the same command again, it continues"
            if started
            else f"no features here; {expected}"
        )
        raise ValueError(f"{path} has no dataset.jsonl: {why}")
    shards = Shards()
    lines = ((number, parse_json(line, index, number)) for number, line in read_lines(index))
    _, header = next(lines, (1, None))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{index}: expected {FORMAT!r} in its first line")
    records = [_record(path, line, shards, f"{index}, line {number}") for number, line in lines]
    if not records:
        raise ValueError(f"{index} lists no samples: {path / 'failures.jsonl'} says why each failed")
    if twice := [name for name, count in Counter(record.id for record in records).items() if count > 1]:
        raise ValueError(
            f"{index} lists {len(twice)} samples twice, e.g. {shorten(twice[0])}: the same extraction again writes "
            "this file anew"
        )
    portions = _read_portions(header.get("sets"), index, len(records))
    empty = header.get("empty_text")
    if empty is None:
        return records, None, portions, [index]
    empty = empty | {"id": ""} if isinstance(empty, dict) else empty
    return records, _record(path, empty, shards, f"{index}, line 1", "text.0"), portions, [index]


def _record(path: Path, line: Any, shards: Shards, where: str, needed: str = "latents") -> ShardRecord:
    """`where` names file and line for messages; `needed`: a tensor that it must have."""
    try:
        told = [*(line[name] for name in ("id", "key", "shard")), line.get("sha256", "")]
        shapes = {name: tuple(shape) for name, shape in line["shapes"].items()}
        texts = [name for name in shapes if name.startswith("text.")]
        if not all(isinstance(one, str) for one in told):
            raise TypeError("id, key, shard and sha256 must be text")
        if not all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape):
            raise TypeError("shapes must be whole numbers")
        if needed not in shapes or set(texts) != {f"text.{n}" for n in range(len(texts))}:
            raise KeyError(f"{needed}, text.0, text.1, ...")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: no sample of a feature store ({type(error).__name__}: {error}); the same extraction again "
            "writes this file anew"
        ) from error
    content = line.get("sha256")
    return ShardRecord(line["id"], shapes, path / line["shard"], line["key"], shards, content)


def _conditions(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in sorted(shapes.items()) if name != "latents" and not name.startswith("text.")}
