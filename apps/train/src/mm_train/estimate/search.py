"""Which layout of so many ranks is the fastest that fits, and why a faster one does not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from heapq import heappop, heappush
from typing import Any

from mm_parallel.devices import Device
from mm_parallel.estimate.roofline import StepTime
from mm_parallel.order import check_shards
from mm_parallel.pipeline.schedule import check_count
from mm_train.config import Config, LayoutConfig
from mm_train.estimate.estimate import Estimate, Subject
from mm_train.estimate.layouts import MEMORIES, describe, find_layouts, with_memory

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

    def least(option: Config) -> tuple[float, float]:
        return subject.least(option, option.parallel.resolve(world), device)

    queue: list[tuple[float, int, StepTime | None]] = []
    options: list[tuple[Config, bool]] = []  # with whether the one before is of the same layout, and keeps less
    large: list[tuple[float, Config]] = []
    small = 0
    for one in legal:
        ways = [option for memory in reversed(MEMORIES) if _goes(option := with_memory(one, memory))]
        # Each keeps as much as the one before, or more, and computes as much, or less. The last is asked first: it is
        # the quickest to count, and where it fits, so do all.
        place = len(ways)
        if least(ways[-1])[0] > device.memory:
            place = bisect_right(ways[:-1], device.memory, key=lambda option: least(option)[0])
            small += len(ways) - place
            large.append((least(ways[place])[1], ways[place]))
        if place:
            options += [(option, number > 0) for number, option in enumerate(ways[:place])]
            heappush(queue, (least(ways[place - 1])[1], len(options) - 1, None))
    best: list[Option] = []
    faster: list[Option] = []
    while queue and len(best) < shown:
        seconds, number, time = heappop(queue)
        one, has_less = options[number]
        if time is None:
            time = subject.time(one, one.parallel.resolve(world), device)
            heappush(queue, (max(seconds, time.total), number, time))
            if has_less:  # only now, as it is no faster
                heappush(queue, (max(seconds, least(options[number - 1][0])[1]), number - 1, None))
            continue
        found = Option(one, subject.estimate(one, world, device))
        if found.estimate.fits(device):
            best.append(found)
        elif not best:
            faster.append(found)
    if not best:  # those that come nearest, with the least memory that can be
        nearest = sorted(large, key=lambda each: least(each[1])[0])
        faster += [Option(one, subject.estimate(one, world, device)) for _, one in nearest[:LARGE]]
    else:
        nearest = sorted(large, key=lambda each: each[0])[:LARGE]
        faster += [Option(one, subject.estimate(one, world, device)) for _, one in nearest]
        faster = [each for each in faster if each.estimate.seconds < best[0].estimate.seconds]
    faster.sort(key=lambda each: each.estimate.peak)
    return Search(best, faster[:shown], len(options) + small, illegal, small)


def _find_legal(subject: Subject, config: Config, world: int, device: Device) -> tuple[list[Config], int]:
    """(layouts that the model can be cut into, how many others there are)."""
    usual = with_memory(config, MEMORIES[0]).memory
    memory = replace(usual, offload_params=False)  # it asks for shards, and so is asked of the whole layout

    @cache
    def takes(**alone: Any) -> bool:
        """Whether the model can be cut so; each way to cut is asked by itself, as in `mm_parallel.fits`."""
        parallel = LayoutConfig(dp_shard=1, schedule=config.parallel.schedule, **alone)
        one = replace(config, parallel=parallel, memory=memory)
        return not _refuses(lambda: subject.check(one, alone.get("tp") or alone.get("cp") or one.parallel.pp))

    found, illegal = [], 0
    for one in find_layouts(config, world, len(subject.model.layers), subject.tokens, device.per_host):
        p = one.parallel
        count = one.micro_batches(p.dp_replicate * p.dp_shard)
        virtual = len(p.stages) if p.pp_layers else 1
        shards = p.dp_replicate * p.dp_shard * p.cp
        goes = takes(tp=p.tp) and takes(cp=p.cp) and (not p.pp_layers or takes(pp_layers=p.pp_layers))
        asked = (
            partial(check_count, count, p.pp, virtual, p.schedule == "zero_bubble"),
            partial(check_shards, shards, usual, describe(one)),
        )
        if not goes or any(map(_refuses, asked)):
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
