"""Which conversations of a step go together: a pure function of their sizes.

Every rank computes the whole plan, so nobody has to be told. Costs are compared as whole numbers: no sum of floats
decides, so two kinds of machine plan alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

import numpy as np

from mm_data.processing import Cost, Size

_UNIT = 2**40  # what all costs of a step come to


def plan(
    sizes: Sequence[Size], ranks: int, max_tokens: int, max_patches: int, cost: Cost, *, packing: bool = True
) -> list[list[list[int]]]:
    """[rank][micro-batch] -> the indices of its samples; each sample is in one pack.

    No pack has more than `max_tokens` tokens or `max_patches` patches. All ranks have the same number of packs, the
    smallest m that is found: never more than ceil(k / ranks), where k packs are what first fit by decreasing size
    takes. Of text alone k is at most 11/9 of the fewest possible, plus 2/3. Where `ranks` divides the number of
    samples, no pack is empty.

    Packs that run at the same time, the n-th of each rank, cost about the same, and so do ranks. A rank's costliest
    pack comes first: what does not fit into memory fails in the first step.
    packing=False: a sample a pack.
    """
    assert min(ranks, max_tokens, max_patches) >= 1
    assert all(size.tokens <= max_tokens and size.patches <= max_patches for size in sizes), "for a policy to mend"
    costs = _whole([cost(size) for size in sizes])
    if not packing:
        return _deal([[i] for i in range(len(sizes))], costs, ranks, max(1, -(-len(sizes) // ranks)))
    loads = np.array([size[:2] for size in sizes], dtype=np.int64).reshape(-1, 2)
    limits = np.array([max_tokens, max_patches], dtype=np.int64)
    fitted = _first_fit(loads, limits)
    most = max(1, -(-len(fitted) // ranks))
    least = max(1, int((-(-loads.sum(0) // (ranks * limits))).max()))
    for micro in range(least, most + 1):
        if (packs := _spread(loads, limits, costs, ranks * micro)) is not None:
            return _deal(packs, costs, ranks, micro)
    packs = fitted + [[] for _ in range(ranks * most - len(fitted))]
    return _deal(_level(packs, loads, limits, costs), costs, ranks, most)


def _whole(costs: list[float]) -> list[int]:
    total = fsum(costs)
    return [max(1, int(cost / total * _UNIT)) for cost in costs]


def _first_fit(loads: np.ndarray, limits: np.ndarray) -> list[list[int]]:
    """Each sample into the first pack that has room, the largest first: by the share of a limit that it takes."""
    left = np.repeat(limits[None], len(loads), axis=0)  # a pack for each would do
    packs: list[list[int]] = []
    for i in np.argsort(-(loads / limits).max(1), kind="stable").tolist():
        first = int((left >= loads[i]).all(1).argmax())
        if first == len(packs):
            packs.append([])
        packs[first].append(i)
        left[first] -= loads[i]
    return packs


def _spread(loads: np.ndarray, limits: np.ndarray, costs: list[int], count: int) -> list[list[int]] | None:
    """Each sample into the cheapest pack that has room, the costliest first. None where one finds no room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    left = np.repeat(limits[None], count, axis=0)
    paid = np.zeros(count, dtype=np.int64)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        room = (left >= loads[i]).all(1)
        if not room.any():
            return None
        chosen = int(np.where(room, paid, np.iinfo(np.int64).max).argmin())
        packs[chosen].append(i)
        left[chosen] -= loads[i]
        paid[chosen] += costs[i]
    return packs


def _level(packs: list[list[int]], loads: np.ndarray, limits: np.ndarray, costs: list[int]) -> list[list[int]]:
    """Move samples, one at a time, out of the costliest packs into cheaper ones that have room.

    Empty packs are filled first, as long as another has two samples.
    """
    packs = [list(pack) for pack in packs]
    paid = np.array([sum(costs[i] for i in pack) for pack in packs], dtype=np.int64)
    left = np.array([limits - loads[pack].sum(0) for pack in packs])

    def move(i: int, source: int, target: int) -> None:
        packs[source].remove(i)
        packs[target].append(i)
        for pack, sign in ((source, 1), (target, -1)):
            left[pack] += sign * loads[i]
            paid[pack] -= sign * costs[i]

    for target in [number for number, pack in enumerate(packs) if not pack]:
        several = [number for number, pack in enumerate(packs) if len(pack) > 1]
        if several:
            source = max(several, key=lambda number: (paid[number], -number))
            move(max(packs[source], key=lambda i: (costs[i], -i)), source, target)
    for _ in range(4 * len(packs)):
        source = int(paid.argmax())
        best = None
        for i in packs[source] if len(packs[source]) > 1 else ():
            room = (left >= loads[i]).all(1)
            target = int(np.where(room, paid, np.iinfo(np.int64).max).argmin())
            after = max(paid[source] - costs[i], paid[target] + costs[i])
            if room[target] and target != source and after < paid[source]:
                best = min(best or (after, i, target), (after, i, target))
        if best is None:
            break
        move(best[1], source, best[2])
    return packs


def _deal(packs: list[list[int]], costs: list[int], ranks: int, micro: int) -> list[list[list[int]]]:
    """Packs of about equal cost to the ranks of each micro-batch, its costliest to the rank that has the least yet."""
    packs = packs + [[] for _ in range(ranks * micro - len(packs))]
    paid = [sum(costs[i] for i in pack) for pack in packs]
    order = sorted(range(len(packs)), key=lambda number: (-paid[number], number))
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for first in range(0, len(order), ranks):
        idle = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        for number, rank in zip(order[first : first + ranks], idle, strict=True):
            dealt[rank].append(sorted(packs[number]))
            totals[rank] += paid[number]
    return dealt
