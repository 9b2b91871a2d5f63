"""A store of encoded features, filled by any number of processes, any of which may be killed at any moment.

    <path>/shards/<writer>-<n>.safetensors   some entries each; the header's metadata holds their descriptions
    <path>/failures/<writer>.jsonl           samples that could not be encoded, and why
    <path>/dataset.jsonl                     written by `finish`: the data set, in order, and where each tensor lies
    <path>/failures.jsonl                    written by `finish`: the failures that are still failures

The rename of a shard is the only commit: an entry is there, whole and described, or it is not there. Nothing is ever
changed in place, and a writer's file names are its own, so writers need no locks. Readers use `dataset.jsonl` alone: an
extraction that has not finished, or entries of another geometry or encoder that still lie in the store, cannot be
trained on by accident.
"""

import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor

from mm_data.files import (
    TEMPORARY,
    Content,
    file_stamp,
    fingerprint,
    open_file,
    parse_json,
    read_text,
    show,
    write_atomic,
)
from mm_data.geometry import Geometry, Unfit
from mm_data.keys import content_key, hash_control
from mm_data.layout import geometry_of
from mm_data.manifest import Sample
from mm_data.sets import SampleSet
from mm_data.shards import AGAIN, Shards, read_metadata
from mm_data.video import decoder_identity

FORMAT = "mm-data features 1"


@dataclass(frozen=True)
class ToDo:
    """What an extraction has to do. `keys` maps every readable sample's id to its entry; the lists keep the order of
    the samples.
    """

    encoder: str
    decoder: str
    keys: dict[str, str]
    done: list[Sample]
    to_encode: list[Sample]  # one sample per missing entry: the same video with the same captions is encoded once
    repeated: list[Sample]  # share the entry of a sample in `to_encode`
    failed: list[tuple[Sample, str]]  # cannot be opened, with the reason
    stale: int  # entries in the store that no sample asks for: another encoder, decoder, geometry, caption or file
    other_decoders: dict[str, int]  # how many of them come from which other decoder

    @property
    def sets(self) -> dict[str, SampleSet]:
        """Of every readable sample; empty where they are of none."""
        samples = (*self.done, *self.to_encode, *self.repeated)
        return {sample.id: sample.set for sample in samples if sample.set is not None}

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self.keys or any(sample.id == sample_id for sample, _ in self.failed)

    def __str__(self) -> str:
        total = len(self.keys) + len(self.failed)
        others = "".join(f", {count} from {decoder}" for decoder, count in sorted(self.other_decoders.items()))
        return (
            f"{total} sample{'s' * (total != 1)}: {len(self.done)} in the store, {len(self.to_encode)} to encode, "
            f"{len(self.repeated)} repeated, {len(self.failed)} unreadable; "
            f"{self.stale} stale {'entry' if self.stale == 1 else 'entries'}{others}"
            + (f"; videos are decoded by {self.decoder} now" if others else "")
        )


class FeatureCache:
    """Write and read entries: `with FeatureCache(path) as cache: cache.put(key, tensors, meta)`; then `cache.finish()`.

    An entry's tensors are `latents` (C F H W), `text.0`, `text.1`, … (S D, one for each caption), and the conditions of
    the model by their names. Entries are buffered, and committed together: when they reach `shard_bytes`, at `flush()`,
    and when the `with` block ends, also by an exception. Raises ValueError for a path that is a file, and for a shard
    that is damaged.
    """

    def __init__(self, path: str | Path, shard_bytes: int = 128 << 20):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: the feature store is a folder")
        self.shard_bytes = shard_bytes
        self._writer = uuid.uuid4().hex[:12]
        self._written = 0
        self._pending: dict[str, tuple[dict[str, Tensor], dict]] = {}
        self._pending_bytes = 0
        self._entries: dict[str, tuple[Path, dict]] = {}  # key -> shard, meta
        self._seen: set[Path] = set()
        self._shards = Shards()
        self.refresh()

    def __enter__(self) -> "FeatureCache":
        return self

    def __exit__(self, *_) -> None:
        self.flush()

    def __contains__(self, key: str) -> bool:
        return key in self._pending or key in self._entries

    def keys(self) -> set[str]:
        """Keys of all entries known to this process, committed or not."""
        return self._entries.keys() | self._pending.keys()

    def refresh(self) -> None:
        """Look for entries committed by others since this process last looked."""
        for shard in sorted(set(self.path.glob("shards/*.safetensors")) - self._seen):
            for key, meta in read_metadata(shard).items():
                self._entries.setdefault(key, (shard, check_meta(parse_json(meta, shard), shard)))
            self._seen.add(shard)

    def put(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping) -> None:
        """Add an entry (any device; copied to the CPU). `meta` is JSON: `id`, the sample's, is required; the rest of
        what a `Clip` has is kept for people, `find_work` and `notes`.
        """
        if "id" not in meta:
            raise ValueError(f"entry {key}: meta must hold the sample's id, it has {sorted(meta)}")
        if key in self:
            return  # same key, same content
        own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        described = {**meta, "shapes": {name: list(tensor.shape) for name, tensor in own.items()}}
        self._pending[key] = (own, described)
        self._pending_bytes += sum(tensor.nbytes for tensor in own.values())
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def put_empty_text(self, encoding: Tensor, encoder: str = "", files: Mapping[str, str] | None = None) -> None:
        """Store the encoding (S D) of the empty prompt: what text dropout trains on, and the negative prompt of a
        model without its text encoder. files: identities of the encoders' files, see `FeatureDataset.encoders`.
        """
        self.put(content_key("", None, encoder), {"text.0": encoding}, {"id": "", "encoders": dict(files or {})})

    def has_empty_text(self, encoder: str = "") -> bool:
        return content_key("", None, encoder) in self

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry; KeyError if it is not in the store (call `refresh` to see what others wrote)."""
        if key in self._pending:
            return dict(self._pending[key][0])
        shard, meta = self._entries[key]
        tensors = self._shards.read(shard, [f"{key}/{name}" for name in meta["shapes"]])
        return {name: tensors[f"{key}/{name}"] for name in meta["shapes"]}

    def meta(self, key: str) -> dict:
        """The description of an entry: what was given to `put`, and `shapes`."""
        return self._pending[key][1] if key in self._pending else self._entries[key][1]

    def notes(self, todo: ToDo) -> dict[str, list[str]]:
        """What the videos of entries are, as `VideoInfo.notes`, with the samples that are so, in their order."""
        found: dict[str, list[str]] = {}
        for sample_id, key in todo.keys.items():
            for note in self.meta(key).get("notes", ()) if key in self else ():
                found.setdefault(note, []).append(sample_id)
        return found

    def flush(self) -> None:
        """Commit what was put since the last commit. After it returns, the entries survive kill -9 and a power cut."""
        if not self._pending:
            return
        tensors = {f"{key}/{name}": tensor for key, (own, _) in self._pending.items() for name, tensor in own.items()}
        metadata = {key: json.dumps(meta) for key, (_, meta) in self._pending.items()}
        shard = self.path / "shards" / f"{self._writer}-{self._written:05d}.safetensors"
        shard.parent.mkdir(parents=True, exist_ok=True)
        (self.path / "dataset.jsonl").unlink(missing_ok=True)  # what was finished is being extended: finish it again
        write_atomic(shard, save(tensors, metadata))
        self._entries.update({key: (shard, meta) for key, (_, meta) in self._pending.items()})
        self._seen.add(shard)
        self._pending, self._pending_bytes = {}, 0
        self._written += 1

    def fail(self, sample_id: str, reason: str) -> None:
        """Record that a sample could not be encoded. Not a reason to skip it next time: a run that comes back tries
        it again.
        """
        log = self.path / "failures" / f"{self._writer}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"id": sample_id, "reason": reason}) + "\n")

    def failures(self) -> dict[str, str]:
        """Sample id -> reason, of every failure recorded so far, by any process."""
        found = {}
        for log in [self.path / "failures.jsonl", *sorted(self.path.glob("failures/*.jsonl"))]:
            # the last piece is empty, or a line that was cut off by a kill
            lines = read_text(log).split("\n")[:-1] if log.exists() else []
            for number, line in enumerate(lines, 1):
                record = parse_json(line, log, number)
                if not isinstance(record, dict) or not all(isinstance(record.get(k), str) for k in ("id", "reason")):
                    raise ValueError(f"{log}, line {number}: no failure of a sample (id and reason): delete the file")
                found[record["id"]] = record["reason"]
        return found

    def identify(self, samples: Iterable[Sample], threads: int = 8) -> Iterator[Sample]:
        """The samples with `contents`, the hashes of their files.

        The store remembers them of files whose path, size and a part of the bytes are the same. The others are read,
        several at a time. A sample with a file that cannot be read comes back without.
        """
        self.refresh()
        known: dict[tuple[str, str], str] = {}
        for _, meta in self._entries.values():
            if {"source", "sha256"} <= meta.keys():
                known[tuple(meta["source"])] = meta["sha256"]
            known.update({tuple(stamp): sha256 for *stamp, sha256 in meta.get("control", ())})

        def content(file: Path) -> Content:
            stamp = file_stamp(file)
            found = Content(stamp, known[stamp]) if stamp in known else fingerprint(file)
            known[found.stamp] = found.sha256
            return found

        def identify_one(sample: Sample) -> Sample:
            if sample.contents is not None:
                return sample
            try:
                return replace(sample, contents=tuple(map(content, sample.files)))
            except (OSError, ValueError):  # gone, or no file any more: `find_work` says which
                return sample

        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(identify_one, samples)

    def find_work(
        self,
        samples: Iterable[Sample],
        geometry: Geometry,
        encoder: str,
        seed: int = 0,
        *,
        backend: Literal["pyav", "decord"] = "pyav",
    ) -> ToDo:
        """Compare what `samples` ask for with what is in the store; hashes the files of those not yet identified.

        `backend` decodes them. Another version of it may give other pixels: what comes from one is stale.
        """
        decoder = decoder_identity(backend)
        keys: dict[str, str] = {}
        done, to_encode, repeated, failed, asked = [], [], [], [], set()
        for sample in self.identify(samples):
            if sample.contents is None:
                failed.append((sample, _why_unreadable(sample.files)))
                continue
            video, control = sample.contents[0].sha256, hash_control(sample)
            own = geometry_of(sample, geometry)
            key = content_key(video, own, encoder, sample.captions, sample.cut, seed, control, decoder)
            keys[sample.id] = key
            (done if key in self else repeated if key in asked else to_encode).append(sample)
            asked.add(key)
        stale = self._entries.keys() - asked - {content_key("", None, encoder)}
        metas = [self.meta(key) for key in stale]
        others = Counter(meta.get("decoder", "an unknown decoder") for meta in metas if meta["id"])  # "": no video
        del others[decoder]
        return ToDo(encoder, decoder, keys, done, to_encode, repeated, failed, len(stale), dict(others))

    def finish(self, todo: ToDo | None = None, dropped: Iterable[tuple[Sample, Unfit]] = ()) -> int:
        """Publish `dataset.jsonl`: the samples of `todo` that are in the store; without it, all entries, by id.

        Returns how many. All other samples stand in `failures.jsonl`, each with its reason: those of `todo` that
        failed, and those that were `dropped` before there was a plan (`Selection.dropped`). Call it once, when no other
        process writes any more: it also removes what killed writers left behind. Raises ValueError if there is no
        `todo`, and the store holds a sample in two versions.
        """
        self.flush()
        self.refresh()
        empty = content_key("", None, todo.encoder if todo else "")
        chosen = todo.keys if todo else self._by_id(empty)
        header = {"format": FORMAT, "empty_text": self._locate(empty) if empty in self._entries else None}
        lines = [header]
        for sample_id in chosen if todo else sorted(chosen):
            if chosen[sample_id] in self._entries:
                lines.append({"id": sample_id, **self._locate(chosen[sample_id])})
        if todo and (sets := todo.sets):
            header["sets"] = _describe_sets(sets[line["id"]] for line in lines[1:])
        there = {line["id"] for line in lines[1:]}
        failures = self.failures() | ({sample.id: reason for sample, reason in todo.failed} if todo else {})
        missing = {k: v for k, v in failures.items() if k not in there and (todo is None or k in todo)}
        missing |= {sample.id: str(reason) for sample, reason in dropped}
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "failures.jsonl", _jsonl({"id": k, "reason": v} for k, v in sorted(missing.items())))
        write_atomic(self.path / "dataset.jsonl", _jsonl(lines))
        for pattern in (f"{TEMPORARY}*", f"shards/{TEMPORARY}*", "failures/*.jsonl"):
            for leftover in self.path.glob(pattern):
                leftover.unlink()
        return len(lines) - 1

    def _by_id(self, empty: str) -> dict[str, str]:
        chosen: dict[str, str] = {}
        for key, (_, meta) in sorted(self._entries.items()):
            if key == empty:
                continue
            if meta["id"] in chosen:
                raise ValueError(
                    f"{self.path} holds sample {meta['id']} in two versions (another geometry, encoder or caption): "
                    "give finish() what plan() returned, which says which"
                )
            chosen[meta["id"]] = key
        return chosen

    def _locate(self, key: str) -> dict:
        shard, meta = self._entries[key]
        return {
            "key": key,
            "shard": os.path.relpath(shard, self.path),
            **{k: v for k, v in meta.items() if k in ("shapes", "captions", "sha256")},
        }


def check_meta(meta: Any, shard: Path) -> dict:
    """What a shard says of an entry. Raises ValueError for what `put` and `VideoDataset` never write."""

    def are(kind: type | UnionType, *values: Any) -> bool:
        return all(isinstance(value, kind) for value in values)

    def is_stamp(value: Any) -> bool:
        return are(list, value) and value != [] and are(str | int | float, *value)

    sound = are(dict, meta) and (
        are(str, meta.get("id"), meta.get("sha256", ""), meta.get("decoder", ""))
        and are(dict, meta.get("shapes"))
        and are(list, meta.get("notes", []), meta.get("control", []))
        and are(str, *meta.get("notes", []))
        and are(dict, meta.get("encoders", {}))
        and are(str, *meta.get("encoders", {}).values())
        and is_stamp(meta.get("source", [""]))
        and all(is_stamp(one) for one in meta.get("control", []))
    )
    if not sound:
        raise ValueError(f"{shard} is damaged: what it says of an entry is none ({show(meta)}): {AGAIN}")
    return meta


def _why_unreadable(files: Sequence[Path]) -> str:
    for path in files:
        try:
            open_file(path).close()
        except OSError as error:
            return f"{path}: {error.strerror}"
        except ValueError as error:
            return str(error)
    return f"{', '.join(map(str, files))}: could not be read to the end"


def _describe_sets(sets: Iterable[SampleSet]) -> list[dict]:
    """How many samples each set has, of samples in its order, and how often it is shown."""
    grouped = [list(group) for _, group in groupby(sets, key=lambda one: one.number)]
    return [
        {
            "name": one.name,
            "samples": len(group),
            "repeats": str(one.repeats),
            "weight": None if one.weight is None else str(one.weight),
        }
        for group in grouped
        for one in group[:1]
    ]


def _jsonl(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
