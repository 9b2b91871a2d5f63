"""Where the tokens of a conversation stand: three positions each, of time, row and column, by the makers' rule.

Text counts on by one in all three. The tokens of an image or a video stand on a grid: rows and columns count from where
it begins, and so does the time, which stands still in an image and goes `tokens_per_second` a second in a video. What
follows begins at the largest position of all before it, plus one.

(The makers' `get_rope_index_25`; transformers 5.3 and later let text after a video begin earlier, within its times.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.qwen2_5_vl.grids import Grid, read_grids


class SharedTime(UserWarning):
    """Two grids of a video share a time: the model cannot tell which came first."""


def positions(
    input_ids: Tensor | np.ndarray | Sequence,
    grid_thw: Tensor | np.ndarray | Iterable[Grid] | None = None,
    seconds_per_grid: Tensor | np.ndarray | Sequence[float] | None = None,
    *,
    config: Qwen25VLConfig | None = None,
) -> Tensor:
    """The positions of every token.

    Args:
        input_ids: B L; or L, of one conversation. Tokens that fill up a row count as text.
        grid_thw: M 3, of images and videos in the order of their tokens, row after row of the batch.
        seconds_per_grid: seconds from one grid of a video to the next, as it was really sampled: one number for each
            video, or one for each of the M (what stands there for an image is not read). None: there is no video.
        config: facts of the model; None: those of all that were released.

    Returns:
        3 B L, or 3 L; int64, on the host: time, row, column.

    Raises:
        ValueError: tokens, grids and seconds that do not fit each other, with the numbers.

    Warns `SharedTime`, once in a process, where grids of a video are so close that two share a time.
    """
    config = config or Qwen25VLConfig()
    ids = np.asarray(input_ids)
    rows = np.atleast_2d(ids)
    spans = _find_spans(rows, read_grids(grid_thw, config), config)
    times = _read_times(seconds_per_grid, spans, config)
    places = np.empty((3, *rows.shape), np.int64)
    for number in range(len(rows)):
        own = [(span, time) for span, time in zip(spans, times, strict=True) if span.row == number]
        places[:, number] = _place(rows.shape[1], own, config.spatial_merge_size)
    return torch.from_numpy(places if ids.ndim == 2 else places[:, 0])


class _Span(NamedTuple):
    """The tokens of an image or a video."""

    row: int
    start: int
    grid: Grid
    video: bool


def _find_spans(rows: np.ndarray, grids: Sequence[Grid], config: Qwen25VLConfig) -> list[_Span]:
    """Reads tokens and grids side by side: a grid has as many tokens, all of one kind, as it says."""
    spans: list[_Span] = []
    for number, row in enumerate(rows):
        stop = 0
        for start in np.flatnonzero((row == config.image_token) | (row == config.video_token)).tolist():
            if start < stop:
                continue
            if len(spans) == len(grids):
                raise ValueError(
                    f"row {number} has tokens of another image or video from token {start} on, but grid_thw has "
                    f"{len(grids)} rows only"
                )
            grid = grids[len(spans)]
            stop = start + grid[0] * grid[1] * grid[2] // config.merged
            same = row[start:stop] == row[start]
            found = int(same.cumprod().sum())
            if found < stop - start:
                raise ValueError(
                    f"row {number} has {found} tokens {row[start]} from token {start} on, but grid_thw[{len(spans)}] "
                    f"is {grid}, and makes {stop - start}: no image may be cut"
                )
            spans.append(_Span(number, start, grid, bool(row[start] == config.video_token)))
    if len(spans) < len(grids):
        raise ValueError(f"grid_thw has {len(grids)} rows, but there are tokens of {len(spans)} images and videos only")
    return spans


def _read_times(seconds: object, spans: Sequence[_Span], config: Qwen25VLConfig) -> list[np.ndarray]:
    """For each span, where its grids stand in time, from its own beginning."""
    videos = sum(span.video for span in spans)
    given = [] if seconds is None else np.asarray(seconds, np.float64).reshape(-1).tolist()
    if len(given) not in (videos, len(spans)):
        raise ValueError(
            f"seconds_per_grid has {len(given)} numbers, but there are {videos} videos, and {len(spans)} rows of "
            "grid_thw: give a number for each video, or one for each row"
        )
    numbers = iter(given)
    times = []
    for number, span in enumerate(spans):
        frames = span.grid[0]
        second = next(numbers) if span.video or len(given) == len(spans) else 0.0
        if not span.video:
            times.append(np.zeros(frames, np.int64))
            continue
        if not 0 < second < float("inf"):
            raise ValueError(f"seconds_per_grid of grid_thw[{number}], a video, is {second}, but must be above 0")
        # in float32 and in this order, as the makers do: where a product is nearly whole, it decides
        exact = np.arange(frames, dtype=np.float32) * np.float32(second) * np.float32(config.tokens_per_second)
        times.append(exact.astype(np.int64))
        if frames > 1 and (np.diff(times[-1]) == 0).any():
            warnings.warn(
                "frames of a video are so close that two pairs of them share a position in time, which has "
                f"{config.tokens_per_second} a second: sample at most {2 * config.tokens_per_second} frames a second",
                SharedTime,
                stacklevel=1,
            )
    return times


def _place(length: int, spans: Sequence[tuple[_Span, np.ndarray]], merge: int) -> np.ndarray:
    """Positions in one row: 3 L."""
    parts, done, following = [], 0, 0  # tokens that are placed, and the position that comes next
    for span, times in spans:
        text = span.start - done
        begin = following + text
        parts.append(np.tile(np.arange(following, begin), (3, 1)))
        _, rows, columns = span.grid
        grid = np.meshgrid(times, np.arange(rows // merge), np.arange(columns // merge), indexing="ij")
        parts.append(begin + np.stack(grid).reshape(3, -1))
        done = span.start + parts[-1].shape[1]
        following = int(parts[-1].max()) + 1
    parts.append(np.tile(np.arange(following, following + length - done), (3, 1)))
    return np.concatenate(parts, 1)
