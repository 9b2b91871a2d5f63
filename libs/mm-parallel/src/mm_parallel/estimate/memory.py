"""Bytes on each pipeline rank in a step of training, and when most of them are there."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.estimate.sizes import RankMemory
from mm_parallel.estimate.units import Units
from mm_parallel.estimate.walk import Rank
from mm_parallel.estimate.weights import Weights
from mm_parallel.fits import check_fits
from mm_parallel.frozen import spread
from mm_parallel.pipeline.cut import ranges
from mm_parallel.plan import ParallelPlan
from mm_parallel.recompute import choose_inner_words, choose_words


def estimate_memory(
    model: nn.Module,
    plan: ParallelPlan,
    layout: ParallelConfig,
    memory: MemoryConfig,
    dtype: torch.dtype | None,
    example: Mapping[str, Any],
    *,
    micro_batches: int = 1,
    average: bool = False,
    optimizer: Literal["fused", "foreach"] = "fused",
    moments: Callable[[str, tuple[int, ...]], int] | None = None,
    losses: Callable[[Tensor], Tensor] | None = None,
    units: Units | None = None,
) -> tuple[RankMemory, ...]:
    """Bytes of a step of training on each pipeline rank. No process group, no values, no device.

    model: whole, on the meta device, with adapters and `requires_grad`; it is not changed. layout: resolved.
    dtype: of the computation. example, losses: see `Units`. micro_batches: of one data rank in a step. average: whether
    there is an EMA of what is trained. optimizer: how AdamW is computed. moments: (name of a parameter, shape of what a
    rank holds of it) -> bytes of the optimizer's states for it; by default those of AdamW. units: of the same model,
    from another call: what has run there is not run again.

    Raises ValueError for what `parallelize` or `Pipeline` would refuse.
    """
    check_fits(model, plan, layout, memory)
    units = units or Units(model, plan, dtype, example, losses, memory.base if memory.holds_frozen else None)
    weights = Weights(units, layout, memory.reduce)
    count = len(units.layers[""])
    stages = ranges(layout.stages, count) if layout.pp_layers else [range(count)]
    found = []
    for rank in range(layout.pp):
        mine = stages[rank :: layout.pp]
        words = words_of(units, memory, [i for part in mine for i in part], first=rank == 0)
        waiting = weights.waiting(find_waiting(units, memory, [i for part in mine for i in part], first=rank == 0))
        of_rank = Rank(
            units, layout, memory, weights, mine, words, waiting, rank, micro_batches, average, optimizer, moments
        )
        found.append(of_rank.measure())
    return tuple(found)


def words_of(units: Units, memory: MemoryConfig, here: list[int], first: bool) -> dict[str, str]:
    """What each layer of a pipeline rank recomputes, by name. here: numbers of the main ladder's layers."""
    words = {}
    for prefix, names in units.layers.items():
        if not prefix:
            chosen = choose_words(memory, len(names), here)
        elif first:
            chosen = choose_inner_words(memory, list(range(len(names))))
        else:
            continue
        words |= {names[i]: word for i, word in chosen.items()}
    return words


def find_waiting(units: Units, memory: MemoryConfig, here: list[int], first: bool) -> list[str]:
    """The layers of a pipeline rank whose frozen matrices wait on the host, in the order in which they run. here: as
    for `words_of`.
    """
    ladders = {prefix: here if not prefix else range(len(names)) for prefix, names in units.layers.items()}
    return [
        units.layers[prefix][own[i]]
        for prefix, own in ladders.items()
        if first or not prefix
        for i in spread(memory.host_layers, len(own))
    ]
