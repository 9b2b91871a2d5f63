"""Which layout of so many ranks is the fastest that fits, and why a faster one does not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from mm_parallel.devices import Device
from mm_parallel.pipeline.schedule import check_count
from mm_train.config import Config
from mm_train.estimate.estimate import Estimate, Subject
from mm_train.estimate.layouts import MEMORIES, find_layouts, with_memory

SHOWN = 5
"""Of those that fit, how many are told; and of those that would be faster."""


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
    """That would be faster than the best, and do not fit; the fastest first."""
    looked: int
    """How many layouts there are, with recompute, offload and micro-batches."""
    illegal: int
    """Layouts of ranks that the model does not take."""
    small: int
    """Of those, how many do not even hold parameters, gradients and moments."""


def search(subject: Subject, config: Config, world: int, device: Device, shown: int = SHOWN) -> Search:
    """The fastest layouts of `world` ranks that fit the device.

    Seconds are estimated for all; memory from the fastest on, until enough fit. Whether a layout can be is asked of
    those functions that refuse it in training.
    """
    legal, illegal = _find_legal(subject, config, world, device)
    options = [with_memory(one, memory) for one in legal for memory in MEMORIES if _goes(one, memory)]
    held = [one for one in options if subject.least(one, world) <= device.memory]
    timed = sorted(((subject.seconds(one, world, device), n) for n, one in enumerate(held)))
    best: list[Option] = []
    faster: list[Option] = []
    for _, number in timed:
        if len(best) == shown:
            break
        found = Option(held[number], subject.estimate(held[number], world, device))
        if found.estimate.fits(device):
            best.append(found)
        elif not best and len(faster) < shown:
            faster.append(found)
    return Search(best, faster, len(options), illegal, len(options) - len(held))


def _find_legal(subject: Subject, config: Config, world: int, device: Device) -> tuple[list[Config], int]:
    """(layouts that the model can be cut into, how many others there are)."""

    @cache
    def refuses(tp: int, cp: int, pp_layers: tuple) -> bool:
        return _refuses(lambda: subject.check(known[tp, cp, pp_layers], world))

    found, illegal = [], 0
    known: dict[tuple, Config] = {}
    for one in find_layouts(config, world, len(subject.model.layers), subject.tokens, device.per_host):
        p = one.parallel
        key = p.tp, p.cp, p.pp_layers
        known.setdefault(key, one)
        count = one.micro_batches(p.dp_replicate * p.dp_shard)
        virtual = len(p.stages) if p.pp_layers else 1
        if refuses(*key) or _refuses(lambda: check_count(count, p.pp, virtual, p.schedule == "zero_bubble")):  # noqa: B023
            illegal += 1
        else:
            found.append(one)
    return found, illegal


def _refuses(check) -> bool:
    try:
        check()
    except ValueError:
        return True
    return False


def _goes(config: Config, memory: dict[str, str]) -> bool:
    """zero_bubble cannot recompute."""
    return config.parallel.schedule == "1f1b" or not config.parallel.pp_layers or memory["recompute"] == "none"
