"""A ladder in another's stem that works on items (a vision tower on images): context ranks share the items.

    rows of a, b, c ─► share ─► rank 0: a, c │ rank 1: b ─► … layers … ─► collect ─► rows of a, b, c on both ranks

No item is cut where its rows know of each other, so every layer is as on one device and nothing is sent in between.
A video's frames do not know of each other: each counts by itself. Largest first, each goes to the rank with the fewest
rows so far; a rank may get none.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from mm_parallel.collectives import sum_over
from mm_parallel.context.shard import join, take

Grids = tuple[tuple[int, ...], ...]
"""Of each item: parts that do not know of each other, and the sizes of one part."""
Pieces = list[tuple[int, int]]
"""(start, stop) of rows."""


@dataclass(frozen=True)
class Items:
    """The context ranks' group, and how many rows of an item become one (`ParallelPlan.merge`)."""

    rank: int
    group: dist.ProcessGroup
    merge: int

    def share(self, x: Tensor, grids: Grids) -> tuple[Tensor, Grids]:
        """N … rows of all items -> those of this rank, and its grids. Raises ValueError for another number of rows."""
        wanted = sum(map(prod, grids))
        if len(x) != wanted:
            raise ValueError(f"{len(x)} rows for {len(grids)} items with {wanted} rows: grids {_shorten(grids)}")
        if odd := [grid for grid in grids if prod(grid[1:]) % self.merge]:
            raise ValueError(
                f"an item of grid {odd[0]} has parts of {prod(odd[0][1:])} rows: no multiple of {self.merge}"
            )
        pieces, own = deal(_hashable(grids), self.group.size())
        return take(x, 0, pieces[self.rank]), own[self.rank]

    def collect(self, y: Tensor, grids: Grids) -> Tensor:
        """M … rows of this rank's items -> those of all, in their order, on every rank."""
        pieces, _ = deal(_hashable(grids), self.group.size())
        held = [[(start // self.merge, stop // self.merge) for start, stop in own] for own in pieces]
        return _Collect.apply(y, held, self.rank, self.group)


@lru_cache(maxsize=256)
def deal(grids: Grids, ranks: int) -> tuple[list[Pieces], list[Grids]]:
    """(rows, grids) of each rank. Deterministic, and the same wherever it is asked."""
    starts = [0, *accumulate(map(prod, grids))]
    parts = [(prod(grid[1:]), item, part) for item, grid in enumerate(grids) for part in range(grid[0])]
    held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    rows = [0] * ranks
    for size, item, part in sorted(parts, key=lambda part: -part[0]):
        rank = rows.index(min(rows))
        held[rank].append((item, part))
        rows[rank] += size
    pieces, own = [], []
    for mine in map(sorted, held):
        sizes = {item: prod(grids[item][1:]) for item, _ in mine}
        spans = [(starts[item] + part * sizes[item], starts[item] + (part + 1) * sizes[item]) for item, part in mine]
        pieces.append(_merge(spans))
        own.append(tuple((parts, *grids[item][1:]) for item, parts in Counter(item for item, _ in mine).items()))
    return pieces, own


def _merge(spans: Pieces) -> Pieces:
    """Neighbours made one."""
    merged: Pieces = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged or [(0, 0)]


class _Collect(torch.autograd.Function):
    """The backward sums over the ranks: each has the gradient through its own tokens, times the number of ranks.

    That number stays, as the mean over the ranks follows: see the rule in `mm_parallel.grads`.
    """

    @staticmethod
    def forward(ctx, y: Tensor, held: list[Pieces], rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.pieces, ctx.group, ctx.rows = held[rank], group, [sum(b - a for a, b in pieces) for pieces in held]
        assert len(y) == ctx.rows[rank], (len(y), ctx.rows, rank)
        return join(y, 0, held, group) if any(ctx.rows) else y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if any(ctx.rows):
            grad = sum_over(grad, ctx.group)
        return take(grad, 0, ctx.pieces), None, None, None


def _hashable(grids: Sequence[Sequence[int]]) -> Grids:
    return tuple(map(tuple, grids))


def _shorten(grids: Sequence) -> str:
    return f"{', '.join(map(str, grids[:4]))}{', …' if len(grids) > 4 else ''}"
