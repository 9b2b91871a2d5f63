"""Which patches attend to which, and in how few calls: facts of the host, made from grids alone, and kept by them.

Most layers of the tower attend within windows, the others within frames. Patches are put in the order of their windows,
windows of one size beside each other, so that a layer attends to all windows of a size in one call, without moving
anything. For whole frames they are put in the order of frames.

Were there more than `MOST_CALLS` sizes, the nearest share a call: the shorter are filled up, and the filling is masked.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mm_models.qwen2_5_vl.grids import Grid

MOST_CALLS = 4


class Group(NamedTuple):
    """Stretches of neighbouring patches that attend, each within itself, in one call."""

    count: int
    size: int
    """Patches of each, those that fill up among them."""
    patches: int
    """Of all, without those."""
    fill: np.ndarray | None
    """count · size: which patch of the group stands there, the first one where it only fills up. None: nothing does."""
    real: np.ndarray | None
    """count size, bool: where a patch does not only fill up."""
    kept: np.ndarray | None
    """patches: the same places, as numbers."""


class Grouping(NamedTuple):
    """All stretches of one kind, windows or frames."""

    order: np.ndarray | None
    """N: the patches in the order of their stretches. None: they are in it already."""
    back: np.ndarray | None
    """N: where each of them is then."""
    groups: tuple[Group, ...]


class Layout(NamedTuple):
    """Of the patches of all images and videos of a call."""

    order: np.ndarray
    """N/4: tokens of the language model, which are neighbouring patches, in the order of their windows."""
    back: np.ndarray
    """N/4: where each of them is then."""
    places: np.ndarray
    """N 2: row and column of each patch in its frame, in the order of windows."""
    windows: Grouping
    frames: Grouping


@lru_cache(maxsize=64)
def lay_out(grids: tuple[Grid, ...], merge: int, window: int) -> Layout:
    """The layout for these grids.

    Args:
        grids: frames, rows and columns of patches; frame after frame, `merge` x `merge` patches that become one token
            beside each other, these row by row.
        window: rows and columns of a window in tokens; those at the lower and right edge are smaller.
    """
    frame_of, window_of, places = [], [], []
    frames = windows = 0
    for count, rows, columns in grids:
        rows, columns = rows // merge, columns // merge
        frame, row, column = np.meshgrid(np.arange(count), np.arange(rows), np.arange(columns), indexing="ij")
        down, across = -(-rows // window), -(-columns // window)
        frame_of.append((frames + frame).ravel())
        window_of.append((windows + (frame * down + row // window) * across + column // window).ravel())
        cells = np.stack((row, column), -1).reshape(-1, 1, 2) * merge
        inside = np.stack(np.meshgrid(np.arange(merge), np.arange(merge), indexing="ij"), -1).reshape(1, -1, 2)
        places.append(cells + inside)  # tokens, patches of a token, 2
        frames, windows = frames + count, windows + count * down * across
    frame_of, window_of = (np.concatenate(numbers or [np.zeros(0, np.int64)]) for numbers in (frame_of, window_of))
    order, sizes = _sort(window_of)
    frame_order, frame_sizes = _sort(frame_of[order])
    patches = merge**2
    return Layout(
        order,
        np.argsort(order),
        np.concatenate(places or [np.zeros((0, patches, 2), np.int64)])[order].reshape(-1, 2),
        Grouping(None, None, _group(sizes * patches)),
        Grouping(*_spread(frame_order, patches), _group(frame_sizes * patches)),
    )


def _sort(owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brings together what has one owner, owners of most first: the order, and how many each owner has."""
    counts = np.bincount(owners)
    largest_first = np.argsort(-counts, kind="stable")
    rank = np.empty_like(largest_first)
    rank[largest_first] = np.arange(len(rank))
    return np.argsort(rank[owners], kind="stable"), counts[largest_first]


def _spread(order: np.ndarray, patches: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """An order of tokens as an order of patches, and its inverse; None where nothing moves."""
    if (order == np.arange(len(order))).all():
        return None, None
    spread = (order[:, None] * patches + np.arange(patches)).ravel()
    return spread, np.argsort(spread)


def _group(sizes: np.ndarray) -> tuple[Group, ...]:
    """sizes: patches of each stretch, the largest first."""
    groups, start = [], 0
    for count in _share_calls(sizes):
        own, start = sizes[start : start + count], start + count
        if own[0] == own[-1]:
            groups.append(Group(count, int(own[0]), int(own.sum()), None, None, None))
            continue
        real = np.arange(own[0]) < own[:, None]
        fill = np.where(real, real.cumsum().reshape(real.shape) - 1, 0).ravel()
        groups.append(Group(count, int(own[0]), int(own.sum()), fill, real, np.flatnonzero(real)))
    return tuple(groups)


def _share_calls(sizes: np.ndarray) -> Sequence[int]:
    """How many stretches, the largest first, each call takes: those of one size, or if there are more sizes than
    `MOST_CALLS`, so that the sum of squares of what is computed is least.
    """
    distinct, counts = np.unique(-sizes, return_counts=True)
    distinct = -distinct
    if len(distinct) <= MOST_CALLS:
        return counts.tolist()
    before = np.concatenate(([0], counts.cumsum()))
    # least[n]: what the first n sizes cost in at most as many calls as rounds are done, and how these calls end
    least: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] + [(np.inf, ())] * len(distinct)
    for _ in range(MOST_CALLS):
        least = [least[0]] + [
            min(
                (least[n][0] + float(before[stop] - before[n]) * float(distinct[n]) ** 2, (*least[n][1], stop))
                for n in range(stop)
            )
            for stop in range(1, len(distinct) + 1)
        ]
    ends = least[-1][1]
    return [int(before[stop] - before[start]) for start, stop in zip((0, *ends), ends, strict=False)]
