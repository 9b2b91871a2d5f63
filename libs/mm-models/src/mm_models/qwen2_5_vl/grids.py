"""Grids of images and videos, as facts of the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_models.qwen2_5_vl.config import Qwen25VLConfig

Grid = tuple[int, int, int]
"""Of an image or a video: frames (pairs of them; an image has one), rows and columns of patches."""


def read_grids(grid_thw: Any, config: Qwen25VLConfig) -> tuple[Grid, ...]:
    """Grids from a tensor M 3 of any device, an array, or rows of numbers; None is none.

    Raises ValueError for another shape, and for sides that are no whole number of tokens.
    """
    if grid_thw is None:
        return ()
    rows = grid_thw.tolist() if hasattr(grid_thw, "tolist") else grid_thw
    if not isinstance(rows, Iterable) or not all(isinstance(row, Iterable) for row in rows):
        raise ValueError(f"grid_thw is {rows!r}, but must be M 3: frames, rows and columns of each image or video")
    grids = tuple(tuple(int(size) for size in row) for row in rows)
    merge = config.spatial_merge_size
    for number, grid in enumerate(grids):
        if len(grid) != 3 or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise ValueError(
                f"grid_thw[{number}] is {grid}, but must be three numbers of at least 1: frames, rows and columns of "
                f"patches, and {merge} rows and {merge} columns become one token, so it must divide both"
            )
    return grids


def count_patches(grids: Iterable[Grid]) -> int:
    return sum(frames * rows * columns for frames, rows, columns in grids)
