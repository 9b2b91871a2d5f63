"""Which frames of a video, at which size: pure functions of its length, time stamps and resolution."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from typing import Annotated, Literal

import numpy as np

KINDS = (
    *("missing_file", "no_file", "no_caption", "bad_caption", "no_resolution", "resolution_too_small"),
    *("aspect_mismatch", "too_short", "cut_past_end", "mask_without_source", "length_mismatch", "shape_mismatch"),
)
UNREADABLE = "unreadable"  # of what is damaged, in whatever way


class Unfit(ValueError):
    """A sound video that this geometry cannot use. `kind`, one of `KINDS`, is what a report counts."""

    def __init__(self, kind: str, detail: str):
        assert kind in KINDS, kind
        super().__init__(kind, detail)  # what it is pickled by, for other ranks
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """How often there is each kind, most frequent first, of reasons as `failures.jsonl` has them."""
    kinds = (reason.partition(": ")[0] for reason in reasons)
    counts = Counter(kind if kind in KINDS else UNREADABLE for kind in kinds)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


@dataclass(frozen=True)
class Geometry:
    """The clip that a video becomes.

    The VAE and the model decide what sizes there are. The VAE makes a latent frame of the first frame, and of every
    `time_stride` frames after it: so a clip has 4k+1 frames by default. Height and width are multiples of `stride`: the
    VAE's 8 times the model's patch of 2, by default.

    Frames: a clip has `num_frames`, or of a shorter video as many as there are, but not less than `min_frames`. They
    are taken at `fps` frames per second; None, or a slower video, means its own rate. They begin at a random place, at
    the start, or so that they lie in the middle. A picture is a clip of one frame, whatever `min_frames` is. Clips of
    fewer than `least_frames` do not fit, pictures neither; programs raise it to what a task needs.

    Size: `max_height` x `max_width`. If `dynamic`, it is the video's own shape, shrunk to `max_area` pixels at most.
    Videos of less than `min_area` pixels do not fit. Nor do those whose aspect differs from the wanted one (if dynamic:
    from a square) by more than a factor of `max_aspect`.

    All this is rule "window". Rule "vace" is the one that VACE was trained with, see `mm_data.vace`. There clips begin
    at the start, or span the whole video with `keep_last`. Sizes are dynamic; `num_frames` and the largest area set the
    number of tokens. No aspect is refused, nor any size unless `min_area` is given.
    """

    num_frames: Annotated[int, ">= 1"] = 81
    min_frames: Annotated[int, ">= 1"] = 1
    fps: Annotated[float, "> 0"] | None = None
    window: Literal["random", "start", "center"] = "random"
    max_height: Annotated[int, ">= 1"] = 480
    max_width: Annotated[int, ">= 1"] = 832
    dynamic: bool = False
    max_area: Annotated[int, ">= 1"] | None = None  # of a dynamic size; None: max_height x max_width
    min_area: Annotated[int, ">= 0"] | None = None  # None: a quarter of the largest area
    max_aspect: Annotated[float, ">= 1"] = 2.0
    stride: Annotated[int, ">= 1"] = 16
    rule: Literal["window", "vace"] = "window"
    keep_last: bool = False
    time_stride: Annotated[int, ">= 1"] = 4
    least_frames: Annotated[int, ">= 1"] = 1

    def __post_init__(self) -> None:
        for name, least, why in (
            ("time_stride", self.time_stride, "4 suits Wan's VAE"),
            ("stride", self.stride, "16 suits a VAE of 8 and a patch of 2"),
        ):
            if least < 1:
                raise ValueError(f"{name}={least} must be at least 1; {why}")
        for name in ("num_frames", "min_frames"):
            check_frames(f"{name}=", getattr(self, name), self.time_stride)
        if self.min_frames > self.num_frames:
            raise ValueError(f"min_frames={self.min_frames} is more than num_frames={self.num_frames}")
        if self.least_frames > self.num_frames:
            raise ValueError(f"least_frames={self.least_frames} is more than num_frames={self.num_frames}")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps={self.fps} must be positive, or None for the video's own")
        if self.rule not in ("window", "vace"):
            raise ValueError(f"rule={self.rule!r} must be window or vace")
        if self.keep_last and self.rule != "vace":
            raise ValueError("keep_last belongs to rule vace: set rule=vace, or leave it out")
        if self.window not in ("random", "start", "center"):
            raise ValueError(f"window={self.window!r} must be random, start or center")
        for name in ("max_height", "max_width"):
            check_side(f"{name}=", getattr(self, name), self.stride)
        if self.max_area is not None and not self.dynamic and self.rule != "vace":
            raise ValueError(
                f"max_area={self.max_area} is for dynamic sizes: set dynamic, or leave it out, "
                f"the size is {self.max_height} x {self.max_width}"
            )
        if self.max_area is not None and self.max_area < self.stride**2:
            raise ValueError(
                f"max_area={self.max_area} is less than one tile of stride {self.stride}: {self.stride**2}"
            )
        if self.min_area is not None and self.min_area < 0:
            raise ValueError(f"min_area={self.min_area} must be at least 0, which refuses no size")
        if not self.max_aspect >= 1:
            raise ValueError(f"max_aspect={self.max_aspect} must be at least 1, e.g. 2 for 2:1 to 1:2")

    def area_range(self) -> tuple[int, int]:
        """Smallest and largest number of pixels of a frame."""
        largest = self.max_area or self.max_height * self.max_width
        least = largest // 4 if self.rule == "window" else 0
        return (least if self.min_area is None else self.min_area), largest


def check_frames(name: str, frames: int, time_stride: int = 4) -> None:
    """ValueError unless a VAE that packs `time_stride` frames into one can take so many. `name` goes before them."""
    if frames < 1 or (frames - 1) % time_stride:
        near = packable(max(1, frames), time_stride)
        raise ValueError(
            f"{name}{frames} is not {time_stride}k+1: use {near} or {near + time_stride}, as the video VAE makes one "
            f"latent frame of {time_stride} frames after the first"
        )


def check_side(name: str, pixels: int, stride: int = 16) -> None:
    """ValueError unless a height or width is a multiple of `stride`. `name` goes before it."""
    if pixels < stride or pixels % stride:
        near = max(stride, pixels // stride * stride)
        raise ValueError(f"{name}{pixels} is not a multiple of stride={stride}: use {near} or {near + stride}")


def packable(frames: int, time_stride: int = 4) -> int:
    """The most frames, of so many (at least 1), that a VAE can pack: 1 + k `time_stride`."""
    return (frames - 1) // time_stride * time_stride + 1


def output_size(height: int, width: int, geometry: Geometry, pixel_aspect: Fraction = Fraction(1)) -> tuple[int, int]:
    """Height and width of the clip made from a video of this size. Raises Unfit."""
    if height < 1 or width < 1:
        raise Unfit("no_resolution", f"{height} x {width}")
    shown = width * float(pixel_aspect)
    smallest, largest = geometry.area_range()
    if height * width < smallest:
        raise Unfit(
            "resolution_too_small",
            f"{height} x {width} is less than min_area={smallest}; set min_area to allow enlarging",
        )
    wanted = 1.0 if geometry.dynamic else geometry.max_height / geometry.max_width
    factor = height / shown / wanted
    if not 1 / geometry.max_aspect <= factor <= geometry.max_aspect:
        off = f"{factor:.2f} times too tall" if factor > 1 else f"{1 / factor:.2f} times too wide"
        shape = "a square" if geometry.dynamic else f"{geometry.max_height} x {geometry.max_width}"
        dynamic = "" if geometry.dynamic else "--geometry.dynamic true (each video keeps its shape) or "
        raise Unfit(
            "aspect_mismatch",
            f"{height} x {shown:.0f} (height x width) is {off} for {shape}, a factor of {geometry.max_aspect:g} is "
            f"allowed: give {dynamic}a larger --geometry.max_aspect",
        )
    if not geometry.dynamic:
        return geometry.max_height, geometry.max_width
    # MindSpeed-MM takes multiples of 8, and not of 16: then a latent may be odd, and the patch of 2 does not divide it.
    scale = min(1.0, sqrt(largest / (height * shown)))
    size = (
        int(height * scale) // geometry.stride * geometry.stride,
        int(shown * scale) // geometry.stride * geometry.stride,
    )
    if 0 in size:
        raise Unfit("resolution_too_small", f"{height} x {width} leaves nothing at stride {geometry.stride}")
    return size


def crop_box(
    height: int, width: int, size: tuple[int, int], pixel_aspect: Fraction = Fraction(1)
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest centred piece that has the shape of `size` when shown."""
    target = size[1] / size[0] / float(pixel_aspect)  # in stored pixels
    if width / height > target:
        cut = max(1, min(width, round(height * target)))
        return 0, (width - cut) // 2, height, cut
    cut = max(1, min(height, round(width / target)))
    return (height - cut) // 2, 0, cut, width


def clip_rate(timestamps: np.ndarray, fps: float | None) -> float | None:
    """Frames per second to take from frames that appear at `timestamps` (s): `fps`, or the video's own rate if less.

    MindSpeed-MM repeats frames of a video that is slower than train_fps; here it keeps its frames and its rate.
    """
    if fps is None or len(timestamps) < 2:
        return None
    return min(fps, 1 / float(np.median(np.diff(timestamps))))


def resample(timestamps: np.ndarray, fps: float | None) -> np.ndarray:
    """Indices of the frames on screen at 0, 1/rate, 2/rate, ... when frames appear at `timestamps` (s).

    MindSpeed-MM steps through the indices by fps/train_fps, which plays a video of variable rate at a wrong speed; here
    the time stamps decide, and a picture that stands still for long is taken as often as it is shown.
    """
    rate = clip_rate(timestamps, fps)
    if rate is None:
        return np.arange(len(timestamps))
    rounding = 1e-3  # containers round time stamps, often to milliseconds
    lasts = timestamps[-1] + np.median(np.diff(timestamps))
    ticks = np.arange(np.ceil((lasts - 1.5 * rounding) * rate)) / rate
    return np.searchsorted(timestamps, ticks + rounding, side="right") - 1


def clip_length(available: int, geometry: Geometry) -> int:
    """The number of frames of the clip, when this many can be chosen from. Raises Unfit."""
    length = min(geometry.num_frames, packable(available, geometry.time_stride))
    if available < 1 or length < geometry.min_frames:
        raise Unfit(
            "too_short", f"{available} frame{'s' * (available != 1)}, fewer than min_frames={geometry.min_frames}"
        )
    return length


def window_starts(available: int, length: int) -> int:
    """How many windows of `length` there are: begin at 0 ... starts - 1. MindSpeed-MM never draws the last one."""
    return available - length + 1


def choose_frames(available: np.ndarray, geometry: Geometry, draw: Callable[[int], int]) -> np.ndarray:
    """The indices of the clip, from those `available` (after cutting and resampling). Raises Unfit.

    `draw(n)` gives an integer in [0, n).

    MindSpeed-MM draws a window when it filters and another when it loads; here one draw decides, and the length is
    that of the decoded video, so that an annotation that is off by a frame is harmless.
    """
    length = clip_length(len(available), geometry)
    starts = window_starts(len(available), length)
    start = {"random": draw, "start": lambda _: 0, "center": lambda n: (n - 1) // 2}[geometry.window](starts)
    return available[start : start + length]
