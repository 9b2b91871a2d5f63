"""VACE's own rule for the frames and the size of a clip: pure functions of time stamps and resolution.

As the released models were trained: a clip has a budget of tokens, that of `num_frames` frames of the largest area. A
video keeps its shape and its size, shrunk to the largest area at most; one of fewer pixels may fill the budget with
more frames. (github.com/ali-vilab/VACE, the processor that MindSpeed-MM took over.)

Differences: a time stamp past the end means the last frame, not the first; a portrait clip is cropped in its true
shape; any area is allowed.
"""

from math import sqrt
from typing import NamedTuple

import numpy as np

from mm_data.geometry import Geometry, Unfit


class VaceClip(NamedTuple):
    """Which frames of a video, at which size and rate."""

    frames: np.ndarray  # indices, in order; one that stays on screen for long may repeat
    size: tuple[int, int]
    fps: float


def vace_clip(timestamps: np.ndarray, height: int, width: float, geometry: Geometry) -> VaceClip:
    """The clip of a video whose frames appear at `timestamps` (s, the first is 0), `height` x `width` when shown.

    Frames are taken at geometry.fps (or the video's own rate, where that is less) from the start; with keep_last they
    are spread evenly over the whole video. Raises Unfit.
    """
    available = len(timestamps)
    rate = (available - 1) / timestamps[-1] if available > 1 else 25.0
    fps = min(rate, geometry.fps or rate)
    duration = timestamps[-1] + 0.5 / rate  # to the middle of the last frame
    pack = geometry.time_stride
    groups = (available - 1) // pack + 1 if geometry.keep_last else max(1, (int(duration * fps) - 1) // pack + 1)
    latent_frames, size = fit(groups, height, width, geometry)
    frames = pack * (latent_frames - 1) + 1
    if frames < geometry.min_frames:
        raise Unfit("too_short", f"{available} frames give a clip of {frames}, min_frames={geometry.min_frames}")
    lasts = duration if geometry.keep_last else frames / fps
    ticks = np.linspace(0, lasts, frames) + 1e-6  # against rounding only
    chosen = np.minimum(np.searchsorted(timestamps, ticks, side="right") - 1, available - 1)
    return VaceClip(chosen, size, float((frames - 1) / lasts if geometry.keep_last and frames > 1 else fps))


def fit(groups: int, height: int, width: float, geometry: Geometry) -> tuple[int, tuple[int, int]]:
    """Latent frames, at most `groups`, and the size in pixels, that use the budget of tokens best. Raises Unfit."""
    stride = geometry.stride
    smallest, largest = geometry.area_range()
    own = height // stride * int(width // stride)  # tokens of a frame
    if own == 0 or height * width < smallest:
        least = f"min_area={smallest}" if smallest else f"one tile of stride {stride}"
        raise Unfit("resolution_too_small", f"{height} x {width:.0f} is less than {least}")
    area = largest // stride**2
    budget = area * (1 + (geometry.num_frames - 1) // geometry.time_stride)
    area = min(area, own)
    latent_frames = min(groups, budget // area)
    area = min(area, budget // latent_frames)
    rows = min(area, max(1, round(sqrt(area * height / width))))
    return latent_frames, (rows * stride, area // rows * stride)
