"""What a run works on, as shapes: the largest micro-batch that there is, how many a step has, and their mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mm_data import FeatureDataset, Geometry, read_sets
from mm_data.layout import geometry_of_set
from mm_data.sets import is_sets_file
from mm_models.families import find
from mm_models.family import ClipSize, Family, PackSize
from mm_models.objective import Objective
from mm_train.config import Config
from mm_train.estimate.config import SizeOptions
from mm_train.objective import architecture, choose_task

Tensors = Mapping[str, Tensor]

MOST = 2**30
"""Numbers in a micro-batch that is looked at: noise as large as its latents is drawn for real."""
OF_VIDEOS = ("frames", "height", "width", "text")
OF_CONVERSATIONS = ("conversation", "patches", "labels")
"""Fields of `SizeOptions`, by what they say the size of."""


@dataclass(frozen=True)
class Workload:
    """A step of one data rank. Tensors are those of a batch, on the meta device but for `Objective.host` and labels."""

    tensors: Tensors
    """Of the largest micro-batch."""
    micro_batches: int
    samples: float
    """In each of them; a mean, of packs."""
    others: tuple[tuple[float, Tensors], ...] = ()
    """Where there are several shapes: the share of each in the samples, and one of it."""

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What tells two apart."""
        facts = {name: x if x.is_meta else x.tolist() for name, x in self.tensors.items()}
        return tuple((n, tuple(x.shape) if isinstance(x, Tensor) else str(x)) for n, x in sorted(facts.items()))

    def ask(self, objective: Objective) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
        """(what the model is called with on the largest micro-batch, losses of what it has made of it). What chance
        decides is drawn once, as in a step. ValueError for one that is too large for that.
        """
        if (count := sum(x.numel() for x in self.tensors.values())) > MOST:
            raise ValueError(
                f"a micro-batch of {count:,} numbers is more than an estimate looks at ({MOST:,}): give smaller "
                "samples, or a smaller --data.micro_batch"
            )
        drawn = objective.draw(self.tensors, lambda number, purpose: torch.Generator())
        return objective.inputs(self.tensors, drawn), lambda output: objective.losses(output, self.tensors, drawn)


class Samples(Protocol):
    """What is trained on."""

    source: str
    """Where its sizes are from, in words."""
    counted: bool
    """Whether data says it; else it is what was asked for, or what was published."""
    bytes: int
    """Of one sample on disk as features, the mean; 0 where none are kept."""

    def step(self, config: Config, data_ranks: int) -> Workload:
        """ValueError for a global batch that cannot be shared by so many ranks."""


def find_samples(config: Config, size: SizeOptions | None = None) -> Samples:
    """The samples of a run: of its data, if that is there and says it, else of a size. ValueError for what cannot be.

    size: what is asked for where there is no data.
    """
    family, shape = architecture(config)
    size = size or SizeOptions()
    if family.chat is not None:
        _refuse_sizes(size, OF_VIDEOS, f"is for videos, and {config.model} reads conversations")
        return _find_packs(config, family, shape, size)
    _refuse_sizes(size, OF_CONVERSATIONS, f"is for conversations, and {config.model} makes videos")
    if config.data.features is not None and config.data.features.exists():
        _refuse_sizes(size, OF_VIDEOS, f"is for where there is no data, and --data.features {config.data.features} is")
        return _read_features(config)
    clip, source = _choose_clip(config, family, shape, size)
    task = choose_task(config.model, family, shape, config.objective.task, "--objective.task")
    return _Clips(family.example(shape, task, clip), source, counted=False)


def _refuse_sizes(size: SizeOptions, names: Sequence[str], why: str) -> None:
    """Raise ValueError for one that would change nothing."""
    usual = SizeOptions()
    for name in names:
        if getattr(size, name) != getattr(usual, name):
            raise ValueError(f"--size.{name} {why}: leave it out")


def of_batch(tensors: Tensors, micro_batches: int, objective: Objective) -> Workload:
    """The workload of a step whose largest micro-batch is this one; values are left behind."""
    kept = {*objective.host, "labels"}
    meta = {name: x.cpu() if name in kept else x.to("meta") for name, x in tensors.items()}
    return Workload(meta, micro_batches, float(len(next(iter(tensors.values())))))


# Videos


@dataclass(frozen=True)
class _Clips:
    sample: Tensors
    """The largest, without a batch dim."""
    source: str
    counted: bool
    shares: tuple[tuple[float, Tensors], ...] = ()

    @property
    def bytes(self) -> int:
        mean = self.shares or ((1.0, self.sample),)
        return round(sum(share * sum(x.numel() * x.element_size() for x in one.values()) for share, one in mean))

    def step(self, config: Config, data_ranks: int) -> Workload:
        count = config.data.micro_batch
        others = tuple((share, _stack(one, 1)) for share, one in self.shares)
        return Workload(_stack(self.sample, count), config.micro_batches(data_ranks), count, others)


def _stack(sample: Tensors, count: int) -> dict[str, Tensor]:
    """A batch of so many, as `mm_data` makes it of features."""
    batch = {name: x.new_empty((count, *x.shape)) for name, x in sample.items()}
    return batch | {"text_mask": batch["text"].new_empty(batch["text"].shape[:2], dtype=torch.bool)}


def _read_features(config: Config) -> _Clips:
    path = config.data.features
    dataset = FeatureDataset(path, None)
    counts: Counter[tuple[int, ...]] = Counter()  # of an epoch
    for bucket, times in zip(dataset.buckets, dataset.times, strict=True):
        counts[bucket] += float(times)
    largest = max(counts, key=lambda bucket: int(np.prod(bucket)))
    item = dataset[dataset.buckets.index(largest)]
    rows, _ = dataset.longest_text
    text = torch.empty((rows, item["text"][0].shape[-1]), dtype=item["text"][0].dtype)
    sample = {"latents": item["latents"], "text": text, **item["conditions"]}
    sample = {name: torch.empty_like(x, device="meta") for name, x in sample.items()}
    shares = tuple(
        (count / counts.total(), sample | {"latents": sample["latents"].new_empty(bucket)})
        for bucket, count in counts.items()
    )
    shapes = f"{len(counts)} shapes, the largest of them" if len(counts) > 1 else "one shape,"
    return _Clips(sample, f"{path}: {shapes} {'x'.join(map(str, largest))}", True, shares if len(counts) > 1 else ())


def _choose_clip(config: Config, family: Family, shape: Any, size: SizeOptions) -> tuple[ClipSize, str]:
    """The size of a clip, and who says it."""
    geometry = config.data.geometry
    manifest = config.data.manifest
    if manifest is not None and is_sets_file(manifest) and manifest.exists():
        sizes = [(one, size) for one in read_sets(manifest) for size in one.sizes or (None,)]
        clips = [_largest(geometry_of_set(one, size, geometry)) for one, size in sizes]
        clip, source = max(clips, key=lambda one: one.frames * one.height * one.width), f"the largest of {manifest}"
    elif manifest is not None or geometry != Geometry():
        clip, source = _largest(geometry), "--data.geometry"
    else:
        published = family.video.sized(find(config.model)[1].published, shape)
        clip, source = ClipSize(published.frames, *published.size), "as published"
    asked = {name: getattr(size, name) for name in ("frames", "height", "width", "text")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked:
        clip, source = replace(clip, **asked), "--size" if len(asked) > 2 else f"{source}, --size"
    return clip, f"clips of {clip.frames}x{clip.height}x{clip.width} ({source})"


def _largest(geometry: Geometry) -> ClipSize:
    return ClipSize(geometry.num_frames, geometry.max_height, geometry.max_width)


# Conversations


@dataclass(frozen=True)
class _Packs:
    family: Family
    shape: Any
    task: str
    tokens: float
    """Of one conversation, its image's included; the mean."""
    patches: float
    """Of images, for each token."""
    labels: float
    """The share that is trained."""
    source: str
    counted: bool
    bytes: int = 0

    def step(self, config: Config, data_ranks: int) -> Workload:
        """A step of equal conversations: packs that are as full as they get."""
        most = config.data.max_tokens
        each = config.micro_batches(data_ranks)
        in_pack = max(1, min(each, int(most // self.tokens))) if config.data.packing else 1
        tokens = min(most, round(in_pack * self.tokens))
        if config.data.packing and each * self.tokens >= most:
            tokens = most  # the longest pack that there can be
        size = PackSize(
            tokens,
            in_pack,
            patches=min(round(tokens * self.patches), config.data.most_patches),
            labels=round(tokens * self.labels),
        )
        return Workload(self.family.example(self.shape, self.task, size), -(-each // in_pack), in_pack)


def _find_packs(config: Config, family: Family, shape: Any, size: SizeOptions) -> _Packs:
    task = choose_task(config.model, family, shape, config.objective.task, "--objective.task")
    tokens, patches = float(min(size.conversation, config.data.max_tokens)), size.patches
    source, counted = "by default" if size == SizeOptions() else "--size", False
    survey = config.run_dir / "survey.npz"
    if survey.is_file() and (found := _read_survey(survey)):
        _refuse_sizes(size, ("conversation", "patches"), f"is for where there is no survey, and {survey} is")
        tokens, patches = found[0], found[1] / found[0]
        source, counted = f"the mean of {survey}", True
    elif size.conversation > tokens and size.conversation != SizeOptions().conversation:
        raise ValueError(
            f"--size.conversation {size.conversation} is more than --data.max_tokens {config.data.max_tokens}, and "
            "such are not trained whole (--data.too_long): raise that, or give a smaller size"
        )
    said = f"conversations of {tokens:,.0f} tokens, with {patches:.2g} patches of images each token ({source})"
    return _Packs(family, shape, task, tokens, patches, size.labels, said, counted)


def _read_survey(path: Path) -> tuple[float, float] | None:
    """(tokens, patches) of the mean conversation that a run has looked at; None where it holds none."""
    with np.load(path, allow_pickle=False) as kept:
        used = kept["tokens"] > 0
        if not used.any():
            return None
        return float(kept["tokens"][used].mean()), float(kept["patches"][used].mean())
