"""Small things that ranks tell one another; alone, each does the obvious. Tensors go by the CPU, that is by gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def total(value: Tensor) -> Tensor:
    """Sum of a scalar over all ranks, on the CPU: there are doubles there, whatever the accelerator has."""
    value = value.cpu()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gathered(items: list[T]) -> list[T]:
    """The lists of all ranks, one after the other."""
    if not dist.is_initialized():
        return items
    everyone: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, items)
    return [item for items in everyone for item in items]


def made_once(make: Callable[[], T]) -> T:
    """What the first rank makes, on every rank."""
    if not dist.is_initialized():
        return make()
    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]
