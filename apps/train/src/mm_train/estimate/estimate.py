"""The estimate of one run: what each rank holds, what a step computes and sends, how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mm_train.config import Config


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Bytes, seconds and FLOPs."""

    memory: tuple[Any, ...]
    """`mm_parallel.estimate.RankMemory` of each pipeline rank; all others are like one of them."""


def estimate(config: Config, world: int, device: Any = None) -> Estimate:
    """What the run of this configuration takes on so many ranks of a device (None: none is known, so no seconds).

    Raises ValueError for what such a run would be refused for, paths aside.
    """
    raise NotImplementedError
