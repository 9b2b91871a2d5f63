"""The estimate of one run: what each rank holds, what a step computes and sends, how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from mm_models import plan
from mm_models.families import family_of
from mm_parallel.config import ParallelConfig
from mm_parallel.devices import Device
from mm_parallel.estimate import RankMemory, Units, estimate_memory
from mm_train.checks import CHECKS, Asked
from mm_train.config import Config
from mm_train.estimate.storage import Disk, Encoders, find_disk, find_encoders
from mm_train.estimate.workload import Samples, Workload, find_samples
from mm_train.objective import build_objective
from mm_train.start import check_cut, outline

RELATIONS = ("configuration", "model", "options", "objective", "learning rate", "what is trained")
"""The checks of a run that look at no path. The layout is looked at in `Subject.estimate`."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Bytes, seconds and FLOPs."""

    model: str
    task: str
    parameters: int
    trained: int
    samples: str
    """What samples are like, and who says it."""
    world: int
    layout: ParallelConfig
    """Resolved."""
    micro_batches: int
    """Of one data rank in a step."""
    tokens: float
    """Of a step, over all ranks; the mean."""
    flops: float
    """That training needs for a step, over all ranks, as MFU counts it: recomputation does not count."""
    memory: tuple[RankMemory, ...]
    """Of each pipeline rank; all others are like one of them."""
    encoders: Encoders | None
    disk: Disk
    steps: int
    seconds: float | None = None
    """Of a step; None where the device is not known."""

    @property
    def fullest(self) -> RankMemory:
        return max(self.memory, key=lambda rank: rank.peak)

    @property
    def peak(self) -> int:
        """Most bytes on a device, the encoders among them where they stay there."""
        return self.fullest.peak + (self.encoders.bytes or 0 if self.encoders and self.encoders.stays else 0)


class Subject:
    """What is the same for all layouts of a run, made once: its model, its samples, what was counted of them.

    config: whose parallel, memory and data.micro_batch may be others in `estimate`. size: see `find_samples`.
    Raises ValueError for what such a run would be refused for, paths aside.
    """

    def __init__(self, config: Config, samples: Samples | None = None) -> None:
        for check in CHECKS:
            if check.name in RELATIONS:
                check.run(Asked(config))
        self.config, self.objective = config, build_objective(config)
        self.samples = samples or find_samples(config)
        self.model = outline(config)
        self.plan, self.cost = plan(self.model), family_of(self.model.config).cost(self.model)
        self.dtype = getattr(torch, config.dtype)
        self._units: dict[Any, Units] = {}

    def estimate(
        self, config: Config, world: int, device: Device | None = None, work: Workload | None = None
    ) -> Estimate:
        """Of a run on so many ranks. ValueError for a layout that does not fit them, or the model.

        work: of a data rank, where it is known better than by the samples.
        """
        check_cut(self.model, config, world)
        layout = config.parallel.resolve(world)
        data_ranks = layout.dp_replicate * layout.dp_shard
        work = work or self.samples.step(config, data_ranks)
        tokens, flops = self._count(work)
        return Estimate(
            config.model,
            self.objective.task,
            *self._sizes,
            self.samples.source,
            world,
            layout,
            work.micro_batches,
            tokens * work.micro_batches * data_ranks,
            flops * work.micro_batches * data_ranks,
            self._memory(config, layout, work),
            self._encoders,
            self._disk,
            config.steps,
        )

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        parameters = list(self.model.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

    @cached_property
    def _encoders(self) -> Encoders | None:
        return find_encoders(self.config)

    @cached_property
    def _disk(self) -> Disk:
        return find_disk(self.config, self.model, self.samples.bytes)

    def _memory(self, config: Config, layout: ParallelConfig, work: Workload) -> tuple[RankMemory, ...]:
        units = self._traced(work)
        return estimate_memory(
            self.model,
            self.plan,
            layout,
            config.memory,
            self.dtype,
            units.example,
            micro_batches=work.micro_batches,
            average=bool(config.optim.ema),
            optimizer=config.optim.kernel,
            units=units,
        )

    def _traced(self, work: Workload) -> Units:
        """What has been run of the model on such a micro-batch."""
        if work.shapes not in self._units:
            losses, example = partial(work.losses, self.objective), work.arguments(self.objective)
            self._units[work.shapes] = Units(self.model, self.plan, self.dtype, example, losses)
        return self._units[work.shapes]

    def _count(self, work: Workload) -> tuple[float, float]:
        """(tokens, FLOPs of training) of the mean micro-batch."""
        if not work.others:
            return self.cost(work.tensors)
        counted = [(share * work.samples, self.cost(tensors)) for share, tensors in work.others]
        return tuple(sum(share * of[i] for share, of in counted) for i in (0, 1))


def estimate(config: Config, world: int, device: Device | None = None) -> Estimate:
    """What the run of this configuration takes on so many ranks of a device (None: none is known, so no seconds).

    Raises ValueError for what such a run would be refused for, paths aside.
    """
    return Subject(config).estimate(config, world, device)
