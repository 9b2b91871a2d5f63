"""The estimate of one run: what each rank holds, what a step computes and sends, how long it takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mm_models import plan
from mm_models.families import family_of
from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.devices import Device
from mm_parallel.estimate import RankMemory, Units, estimate_memory
from mm_parallel.estimate.roofline import Clock, StepTime
from mm_parallel.frozen import find_frozen
from mm_parallel.recompute import choose_words
from mm_train.checks import CHECKS, Asked
from mm_train.config import Config
from mm_train.estimate.storage import Disk, Encoders, find_disk, find_encoders
from mm_train.estimate.workload import Samples, Workload, find_samples
from mm_train.objective import build_objective
from mm_train.optim import find_matrices
from mm_train.optimizers import check_optimizer, state_bytes
from mm_train.start import check_cut, check_stages_train, outline

DAY = 24 * 3600
RELATIONS = ("configuration", "model", "options", "objective", "learning rate", "what is trained", "compile")
"""The checks of a run that look at no path. The layout is looked at in `Subject.estimate`."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Bytes, seconds and FLOPs."""

    model: str
    task: str
    dtype: str
    """Of matrix products."""
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
    share: float
    """FLOPs of the mean micro-batch over those of the largest."""
    memory: tuple[RankMemory, ...]
    """Of each pipeline rank; all others are like one of them."""
    encoders: Encoders | None
    disk: Disk
    optimizer: str
    steps: int
    time: StepTime | None = None
    """Of a step; None where the device is not known."""

    @property
    def seconds(self) -> float | None:
        """Of a step; of one with the largest samples `time` tells, of the mean this."""
        return None if self.time is None else self.time.total * self.share

    @property
    def days(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.steps / DAY

    def fits(self, device: Device) -> bool:
        """Whether all ranks have the memory for it, and their hosts."""
        return self.peak <= device.memory and all(rank.host <= device.host_memory for rank in self.memory)

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
        self._clocks: dict[str, Clock] = {}

    def estimate(
        self, config: Config, world: int, device: Device | None = None, work: Workload | None = None
    ) -> Estimate:
        """Of a run on so many ranks. ValueError for a layout that does not fit them, or the model.

        work: of a data rank, where it is known better than by the samples.
        """
        layout = config.parallel.resolve(world)
        check_stages_train(self.model, config, layout)
        data_ranks = layout.dp_replicate * layout.dp_shard
        work = work or self.samples.step(config, data_ranks)
        memory = self._memory(config, layout, work)  # asks whether the model can be cut so
        tokens, flops = self._count(work)
        most = self.cost(work.tensors)[1]
        time = None if device is None else self.time(config, layout, device, work)
        return Estimate(
            config.model,
            self.objective.task,
            config.dtype,
            *self._sizes,
            self.samples.source,
            world,
            layout,
            work.micro_batches,
            tokens * work.micro_batches * data_ranks,
            flops * work.micro_batches * data_ranks,
            flops / most,
            memory,
            self._encoders,
            self._disk,
            config.optim.name,
            config.steps,
            time,
        )

    def time(self, config: Config, layout: ParallelConfig, device: Device, work: Workload | None = None) -> StepTime:
        """Of a step whose micro-batches are all of the largest. layout: resolved.

        ValueError for a dtype of which no peak of the device is known.
        """
        data_ranks = layout.dp_replicate * layout.dp_shard
        work = work or self.samples.step(config, data_ranks)
        flops = self.cost(work.tensors)[1] * work.micro_batches * data_ranks
        how = (self._traced(work, config.memory), layout, config.memory, work.micro_batches, flops)
        return self.clock(device).time(*how, average=bool(config.optim.ema))

    def clock(self, device: Device) -> Clock:
        if device.name not in self._clocks:
            foreach = self.config.optim.kernel == "foreach"
            how = {"attention": self.config.attention, "compiled": self.config.compile, "foreach": foreach}
            self._clocks[device.name] = Clock(device, self.dtype, **how)
        return self._clocks[device.name]

    def check(self, config: Config, world: int) -> None:
        """Raise ValueError for a layout that does not fit so many ranks, or the model, or the optimizer."""
        check_optimizer(config.optim, world)
        check_cut(self.model, config, world)

    def least(self, config: Config, layout: ParallelConfig, device: Device) -> tuple[float, float]:
        """(bytes that a rank takes at least, seconds that a step takes at least), quickly. layout: resolved.

        Parameters and moments as if all were shared evenly, and what layers save and compute; nothing else.
        """
        held = self._held + (4 * self._sizes[1] if config.optim.ema else 0)
        held -= self._frozen if config.memory.holds_frozen else 0
        ranks = layout.dp_shard * layout.ring * layout.ulysses * layout.tp * layout.pp
        work = self.samples.step(config, layout.dp_replicate * layout.dp_shard)
        units, clock, count = self._traced(work, config.memory), self.clock(device), work.micro_batches
        names = units.layers[""]
        of = Counter(units.kinds[name] for name in names)
        words = choose_words(config.memory, len(names), list(range(len(names))))
        traces = units.trace(layout, {name: words[names.index(name)] for name in of}).units
        waits = seconds = 0.0
        for name, number in of.items():
            moved = {"inputs": traces[name].inputs, "attention": traces[name].kept, "none": 0}[config.memory.offload]
            waits += number * (traces[name].saved - moved)
            seconds += number * sum(half.total for half in clock.unit(traces[name]))
        virtual = len(layout.stages) if layout.pp_layers else 1
        bubble = (layout.pp - 1) / virtual / (3 if layout.splits else 1)
        in_flight = min(layout.pp, count)
        return held / ranks + waits / layout.pp * in_flight, seconds / layout.pp * (count + bubble)

    @cached_property
    def tokens(self) -> float:
        """Of the smallest forward: a sample, or a pack."""
        one = replace(self.config, data=replace(self.config.data, micro_batch=1))
        return self.cost(self.samples.step(one, 1).tensors)[0]

    @cached_property
    def _held(self) -> int:
        """Bytes of parameters and moments, of the whole model."""
        states, named = state_bytes(self.config.optim.name, self._matrices), list(self.model.named_parameters())
        held = sum(p.numel() * p.element_size() for _, p in named)
        return held + sum(states(name, tuple(p.shape)) for name, p in named if p.requires_grad)

    @cached_property
    def _matrices(self) -> frozenset[str]:
        return find_matrices(self.model, self.plan)

    @cached_property
    def _frozen(self) -> int:
        """Of these, what may be in fewer bits, and on the host."""
        return sum(linear.weight.nbytes for linear in find_frozen(self.model, self.plan).values())

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
        units = self._traced(work, config.memory)
        ranks = estimate_memory(
            self.model,
            self.plan,
            layout,
            config.memory,
            self.dtype,
            units.example,
            micro_batches=work.micro_batches,
            average=bool(config.optim.ema),
            optimizer=config.optim.kernel,
            moments=state_bytes(config.optim.name, self._matrices),
            units=units,
        )
        if config.expert != "both":
            return ranks
        return tuple(replace(one, host=one.host + one.parameters + one.moments + one.average) for one in ranks)

    def _traced(self, work: Workload, memory: MemoryConfig) -> Units:
        """What has been run of the model on such a micro-batch."""
        base = memory.base if memory.holds_frozen else None
        if (work.shapes, base) not in self._units:
            example, losses = work.ask(self.objective)
            self._units[work.shapes, base] = Units(self.model, self.plan, self.dtype, example, losses, base)
        return self._units[work.shapes, base]

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
