"""Data sets by index: videos as pixels, and their encoded features."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypedDict

from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from mm_data import random
from mm_data.cache import FORMAT
from mm_data.files import file_stamp, fingerprint
from mm_data.geometry import Geometry, choose_frames, crop_box, output_size, resample
from mm_data.manifest import Sample
from mm_data.transforms import crop_resize, to_model_range
from mm_data.video import probe, read_video


class Clip(TypedDict):
    """One decoded sample."""

    id: str
    video: Tensor  # 3 F H W float32 in [-1, 1]
    captions: tuple[str, ...]
    fps: float  # of the clip, after resampling
    meta: dict  # JSON: where the clip comes from; what `FeatureCache.put` wants


@dataclass(frozen=True)
class Failure:
    """A sample that could not be made into a clip."""

    sample: Sample
    reason: str


class VideoDataset(Dataset):
    """Clips, decoded when asked for: `dataset[i]` is a Clip.

    Which frames a random window takes is drawn from `seed` and the content of the file, so equal files give equal clips
    under whatever name. With on_error="return" a sample that cannot be used is returned as a Failure; with "raise" it
    raises ValueError. For a DataLoader with worker processes, as decoding is work: give collate_fn=list.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        geometry: Geometry,
        seed: int = 0,
        *,
        on_error: Literal["raise", "return"] = "raise",
        backend: Literal["pyav", "decord"] = "pyav",
    ):
        self.samples = list(samples)
        self.geometry = geometry
        self.seed = seed
        self.on_error = on_error
        self.backend = backend

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Clip | Failure:
        sample = self.samples[index]
        try:
            return self._decode(sample)
        except (ValueError, OSError, MemoryError) as error:
            if self.on_error == "return":
                return Failure(sample, str(error) or type(error).__name__)
            raise ValueError(f"sample {sample.id}: {error}") from error

    def _decode(self, sample: Sample) -> Clip:
        info = probe(sample.path)
        content = sample.content or fingerprint(sample.path)
        if content.stamp != file_stamp(sample.path):
            raise ValueError(f"{sample.path} was changed while it was in use")
        size = output_size(info.height, info.width, self.geometry, info.pixel_aspect)
        box = crop_box(info.height, info.width, size, info.pixel_aspect)
        first, end = sample.cut or (0, info.num_frames)
        if first >= info.num_frames or end > info.num_frames:
            raise ValueError(f"{sample.path} has {info.num_frames} frames: it cannot be cut to [{first}, {end})")
        shown = info.timestamps[first:end] - info.timestamps[first]
        name = f"{content.sha256}[{first}:{end}]"
        chosen = choose_frames(
            first + resample(shown, self.geometry.fps),
            self.geometry,
            lambda n: random.integer(n, self.seed, 0, name, "window"),
        )
        clip = read_video(info, chosen, backend=self.backend, each=lambda frame: crop_resize(frame, box, size))
        seconds = float(clip.timestamps[-1] - clip.timestamps[0])
        return Clip(
            id=sample.id,
            video=to_model_range(clip.frames),
            captions=sample.captions,
            fps=(len(chosen) - 1) / seconds if seconds else info.fps,
            meta={
                "id": sample.id,
                "captions": list(sample.captions),
                "source": list(content.stamp),
                "sha256": content.sha256,
                "frames": chosen.tolist(),
            },
        )


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
                    f"{self.path}: samples {other.id} and {record.id} have latents of one shape but different "
                    f"conditions, {_extras(other.shapes)} and {_extras(record.shapes)}, so they cannot share a batch: "
                    "extract them into two folders"
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
