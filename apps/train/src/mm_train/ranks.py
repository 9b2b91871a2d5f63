"""Small things that ranks tell one another; alone, each does the obvious."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mm_convert.cli.terminal import one_line
from mm_data import count_reasons

S = TypeVar("S")
T = TypeVar("T")


def say(note: str) -> None:
    """Print what a person should know, once."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(one_line(f"note: {note}"), file=sys.stderr, flush=True)


def describe_missing(reasons: Collection[str], report: Path) -> str:
    """What to say of samples that are left out, by kind; empty where none is. `report`: where all reasons stand."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in count_reasons(reasons).items())
    return f", {len(reasons)} left out ({kinds}): {report} says why" if reasons else ""


def precise(device: torch.device) -> torch.dtype:
    """For sums of losses: NPUs have no doubles."""
    return torch.float32 if device.type == "npu" else torch.float64


def all_sum(*values: Tensor | float, device: torch.device) -> list[float]:
    """Sums of scalars over all ranks, in one collective on the device: gloo would take a hop for every rank."""
    summed = torch.stack([torch.as_tensor(value, device=device).to(precise(device)) for value in values])
    if dist.is_initialized():
        dist.all_reduce(summed)
    return summed.tolist()


def start_sum(value: Tensor) -> Callable[[], Tensor]:
    """Begins to sum a scalar over all ranks. What is returned gives the sum, on the value's device, and on an
    accelerator does not let the host wait for it.
    """
    summed = value.clone()
    work = dist.all_reduce(summed, async_op=True) if dist.is_initialized() else None

    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return summed

    return finish


def all_gather(items: list[T]) -> list[T]:
    """The lists of all ranks, one after the other."""
    if not dist.is_initialized():
        return items
    everyone: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, items)
    return [item for items in everyone for item in items]


def map_over_ranks(items: Sequence[S], work: Callable[[Sequence[S]], Iterable[T]]) -> list[T]:
    """What `work` makes of the items, one each and in order; every rank works on a share of them."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    everyone = iter(all_gather(list(work(items[rank::world]))))
    shares = [list(islice(everyone, len(items[other::world]))) for other in range(world)]
    return [shares[i % world][i // world] for i in range(len(items))]


def broadcast(make: Callable[[], T]) -> T:
    """What the first rank makes, on every rank; also if it is an error of the user's or of the system."""
    if not dist.is_initialized():
        return make()
    made: list = [None, None]
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except (ValueError, OSError) as error:
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return made[0]
