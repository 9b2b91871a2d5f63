"""Which layout of so many ranks is the fastest that fits, and why a faster one does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from heapq import heappop, heappush
from typing import Any

from mm_parallel.config import MemoryConfig
from mm_parallel.devices import Device
from mm_parallel.estimate.roofline import StepTime
from mm_parallel.pipeline.schedule import check_count
from mm_train.config import Config, LayoutConfig
from mm_train.estimate.estimate import Estimate, Subject
from mm_train.estimate.layouts import MEMORIES, find_layouts, with_memory

SHOWN = 5
"""Of those that fit, how many are told; and of those that would be faster."""
LARGE = 4
"""Of those that are far too large, how many are looked at all the same, the fastest."""


@dataclass(frozen=True)
class Option:
    """A run in one layout."""

    config: Config
    estimate: Estimate


@dataclass(frozen=True)
class Search:
    """What came of a search."""

    best: list[Option]
    """That fit, the fastest first."""
    faster: list[Option]
    """That would be faster than the best, and do not fit: those that are nearest to fitting. Where none fits, the
    nearest of all.
    """
    looked: int
    """How many layouts there are, with recompute, offload and micro-batches."""
    illegal: int
    """Layouts of ranks that the model does not take."""
    small: int
    """Of those looked at, how many do not even hold parameters, moments and what layers save."""


def search(subject: Subject, config: Config, world: int, device: Device, shown: int = SHOWN) -> Search:
    """The fastest layouts of `world` ranks that fit the device.

    Best first: an option is timed when no other can be faster, and its memory is estimated when none is. Whether a
    layout can be is asked of those functions that refuse it in training.
    """
    legal, illegal = _find_legal(subject, config, world, device)
    queue: list[tuple[float, int, StepTime | None]] = []
    options: list[Config] = []
    large: list[tuple[float, Config]] = []
    small = 0
    for one in legal:
        layout = one.parallel.resolve(world)
        ways = [option for memory in reversed(MEMORIES) if _goes(option := with_memory(one, memory))]
        for place, option in enumerate(ways):  # each keeps as much as the one before, or more
            size, seconds = subject.least(option, layout, device)
            if size > device.memory:
                small += len(ways) - place
                large.append((seconds, option))
                break
            options.append(option)
            heappush(queue, (seconds, len(options) - 1, None))
    best: list[Option] = []
    faster: list[Option] = []
    while queue and len(best) < shown:
        seconds, number, time = heappop(queue)
        one = options[number]
        if time is None:
            time = subject.time(one, one.parallel.resolve(world), device)
            heappush(queue, (max(seconds, time.total), number, time))
            continue
        found = Option(one, subject.estimate(one, world, device))
        if found.estimate.fits(device):
            best.append(found)
        elif not best:
            faster.append(found)
    if not best:  # those that come nearest, with the least memory that can be
        nearest = sorted(large, key=lambda each: subject.least(each[1], each[1].parallel.resolve(world), device)[0])
        faster += [Option(one, subject.estimate(one, world, device)) for _, one in nearest[:LARGE]]
    else:
        nearest = sorted(large, key=lambda each: each[0])[:LARGE]
        faster += [Option(one, subject.estimate(one, world, device)) for _, one in nearest]
        faster = [each for each in faster if each.estimate.seconds < best[0].estimate.seconds]
    faster.sort(key=lambda each: each.estimate.peak)
    return Search(best, faster[:shown], len(options) + small, illegal, small)


def _find_legal(subject: Subject, config: Config, world: int, device: Device) -> tuple[list[Config], int]:
    """(layouts that the model can be cut into, how many others there are)."""

    @cache
    def takes(**alone: Any) -> bool:
        """Whether the model can be cut so; each way to cut is asked by itself, as in `mm_parallel.fits`."""
        one = replace(config, parallel=LayoutConfig(dp_shard=1, **alone), memory=MemoryConfig())
        return not _refuses(lambda: subject.check(one, alone.get("tp") or alone.get("cp") or one.parallel.pp))

    found, illegal = [], 0
    for one in find_layouts(config, world, len(subject.model.layers), subject.tokens, device.per_host):
        p = one.parallel
        count = one.micro_batches(p.dp_replicate * p.dp_shard)
        virtual = len(p.stages) if p.pp_layers else 1
        goes = takes(tp=p.tp) and takes(cp=p.cp) and (not p.pp_layers or takes(pp_layers=p.pp_layers))
        if not goes or _refuses(partial(check_count, count, p.pp, virtual, p.schedule == "zero_bubble")):
            illegal += 1
        else:
            found.append(one)
    return found, illegal


def _refuses(check: Callable[[], object]) -> bool:
    try:
        check()
    except ValueError:
        return True
    return False


def _goes(config: Config) -> bool:
    """zero_bubble cannot recompute."""
    return config.parallel.schedule == "1f1b" or not config.parallel.pp_layers or config.memory.recompute == "none"
