"""Which layout of so many ranks is the fastest that fits, and why the next best does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mm_parallel.devices import Device
from mm_train.estimate.config import EstimateConfig
from mm_train.estimate.estimate import Subject


def search(
    subject: Subject, config: EstimateConfig, world: int, device: Device | None, argv: Sequence[str]
) -> Iterator[str]:
    """A table of the best layouts, and the command of the first."""
    raise NotImplementedError
    yield ""
