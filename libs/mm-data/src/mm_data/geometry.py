"""Which frames of a video, at which size: pure functions of its length, time stamps and resolution."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Geometry:
    """The clip that a sample becomes.

    Frames: `num_frames` of them (4k+1: the VAE makes 1 + k latent frames), or the longest 4k+1 that a shorter video
    has, if at least `min_frames`; taken at `fps` frames per second (None: all frames; a slower video is not slowed
    further); beginning at a random place, at the start, or centred.

    Size: `max_height` x `max_width`; or if `dynamic` the video's own shape, shrunk to at most `max_area` pixels and cut
    to multiples of `stride` (VAE 8 x patch 2). Videos of less than `min_area` pixels, or whose aspect differs from the
    wanted one (if dynamic: from square) by more than a factor of `max_aspect`, are refused.
    """

    num_frames: int = 81
    min_frames: int = 1
    fps: float | None = None
    window: Literal["random", "start", "center"] = "random"
    max_height: int = 480
    max_width: int = 832
    dynamic: bool = False
    max_area: int | None = None  # None: max_height x max_width
    min_area: int | None = None  # None: a quarter of the largest area
    max_aspect: float = 2.0
    stride: int = 16

    def __post_init__(self) -> None:
        for name in ("num_frames", "min_frames"):
            n = getattr(self, name)
            if n < 1 or n % 4 != 1:
                near = max(1, (n - 1) // 4 * 4 + 1)
                raise ValueError(
                    f"{name}={n} is not 4k+1: use {near} or {near + 4}, "
                    "as the video VAE packs the frames after the first by fours"
                )
        if self.min_frames > self.num_frames:
            raise ValueError(f"min_frames={self.min_frames} is more than num_frames={self.num_frames}")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps={self.fps} must be positive, or None for the video's own")
        if self.window not in ("random", "start", "center"):
            raise ValueError(f"window={self.window!r} must be random, start or center")
        for name in ("max_height", "max_width"):
            n = getattr(self, name)
            if n < self.stride or n % self.stride:
                near = max(self.stride, n // self.stride * self.stride)
                raise ValueError(
                    f"{name}={n} is not a multiple of stride={self.stride}: use {near} or {near + self.stride}"
                )
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect={self.max_aspect} must be at least 1, e.g. 2.0 for shapes up to 2:1 and 1:2")

    @property
    def areas(self) -> tuple[int, int]:
        """Smallest and largest number of pixels of a frame."""
        largest = self.max_area or self.max_height * self.max_width
        return (largest // 4 if self.min_area is None else self.min_area), largest
