"""Reading videos: `probe` tells what a file holds, `read_video` gives exactly the frames asked for.

Frames are numbered in the order in which the decoder shows them, from 0, whatever their time stamps say. PyAV (FFmpeg
inside the wheel, also on ARM) is the default; decord is used when asked for: it has no ARM wheel, is not maintained,
and trusts headers where PyAV checks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import av
import numpy as np

from mm_data import video_decord, video_pyav
from mm_data.images import read_image, read_size
from mm_data.pixels import to_grey
from mm_data.video_pyav import Orientation, VideoInfo

PICTURE = "picture"  # in place of a container and a codec


@dataclass(frozen=True)
class VideoClip:
    """Frames of a video, F H W 3 uint8 RGB, and when each is shown, in seconds from the video's first frame."""

    frames: np.ndarray  # F H W 1 where grey values were asked for
    fps: float  # of the whole video, on average
    timestamps: np.ndarray  # F


def probe(path: str | Path) -> VideoInfo:
    """Length, size and the time stamp of every frame, from the file's packets: nearly nothing is decoded.

    Raises ValueError, naming the file and the reason, for what is no video, is encrypted, holds no frames or ends
    early.
    """
    return video_pyav.scan(Path(path))


def probe_picture(path: str | Path) -> VideoInfo:
    """A picture as a video of one frame, from its header. Raises ValueError, naming the file, for what is none."""
    height, width = read_size(path)
    return VideoInfo(
        path=Path(path),
        container=PICTURE,
        codec=PICTURE,
        height=height,
        width=width,
        pixel_aspect=Fraction(1),
        orientation=Orientation(),
        has_alpha=False,
        is_best=True,
        notes=(),
        timestamps=np.zeros(1),
        pts=None,
        keys=[],
        key_sizes=[],
    )


def read_video(
    path: str | Path | VideoInfo,
    indices: Sequence[int] | slice | None = None,
    *,
    backend: Literal["pyav", "decord"] = "pyav",
    each: Callable[[np.ndarray], np.ndarray] | None = None,
    grey: bool = False,
) -> VideoClip:
    """The frames with these indices (any order, repeats allowed; None: all), decoded from the key frame before each.

    `path` may be what `probe` or `probe_picture` gave, which saves looking again. `each` is applied to every frame
    (H W 3 uint8) as soon as it is decoded, e.g. to shrink it before the next one needs memory. What is transparent lies
    on white. With `grey`, as masks are read, frames are H W 1: grey values, whatever is transparent. Raises ValueError,
    naming the file, if it is no video, is damaged where it must be read, or has no such frame.
    """
    if backend not in ("pyav", "decord"):
        raise ValueError(f"unknown video backend {backend!r}: use pyav or decord")
    info = path if isinstance(path, VideoInfo) else probe(path)
    wanted = _resolve(indices, info)
    order = sorted(set(wanted.tolist()))
    if info.container == PICTURE:
        decoded = iter([(0, read_image(info.path))])
    else:
        decode = video_pyav.frames if backend == "pyav" else video_decord.frames
        decoded = decode(info, order, on_white=not grey)
    frames: dict[int, np.ndarray] = {}
    for index, picture in decoded:
        if picture.shape != (info.height, info.width, 3):
            raise ValueError(
                f"{info.path}: {backend} gives frame {index} as {picture.shape}, the first is "
                f"{(info.height, info.width, 3)}: cut the file where its size changes"
            )
        picture = to_grey(picture) if grey else picture
        frames[index] = each(picture) if each else picture
    missing = [index for index in order if index not in frames]
    if missing:
        raise ValueError(
            f"{info.path} is damaged or cut off: {len(missing)} of the {len(order)} frames asked for cannot be "
            f"decoded, the first is frame {missing[0]} of {info.num_frames}"
        )
    return VideoClip(np.stack([frames[index] for index in wanted.tolist()]), info.fps, info.timestamps[wanted])


def decoder_identity(backend: Literal["pyav", "decord"] = "pyav") -> str:
    """What decides the pixels of a file: the decoder and its version, with those of FFmpeg's libraries in it."""
    if backend == "decord":
        return f"decord {version('decord')}"
    names = ("libavformat", "libavcodec", "libswscale")
    return " ".join([f"PyAV {av.__version__}", *(f"{n} {'.'.join(map(str, av.library_versions[n]))}" for n in names)])


def _resolve(indices: Sequence[int] | slice | None, info: VideoInfo) -> np.ndarray:
    """Indices as an array; ValueError if one is outside the video."""
    total = info.num_frames
    if indices is None or isinstance(indices, slice):
        wanted = np.arange(total)[indices or slice(None)]
    else:
        wanted = np.asarray(indices, dtype=np.int64)
    if len(wanted) == 0:
        raise ValueError(f"{info.path} has {total} frames: {indices} chooses none of them")
    if wanted.min() < 0 or wanted.max() >= total:
        bad = wanted[(wanted < 0) | (wanted >= total)][0]
        raise ValueError(f"{info.path} has {total} frames, 0 to {total - 1}: there is no frame {bad}")
    return wanted
