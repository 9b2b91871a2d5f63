"""Images and videos that a video is made from: as they were given, and as the pixels of a size.

This file imports no torch, nor what needs it, before there are pixels: a wrong path is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import mm_data
from mm_data.files import open_file
from mm_data.geometry import clip_rate, crop_box, resample
from mm_data.pixels import to_grey
from mm_data.video import VideoInfo, probe, read_video

if TYPE_CHECKING:
    from torch import Tensor

    from mm_infer.config import Options
    from mm_models.diffusion.objective import Pixels

Picture = "Path | str | np.ndarray | Tensor"  # a file, or H W 3 uint8
Video = "Path | str | np.ndarray | Tensor"  # a file, or F H W 3 uint8
Mask = "Path | str | np.ndarray | Tensor"  # a file; or H W (C) or F H W (C), see `_mask_array`


@dataclass(frozen=True)
class Given:
    """What a video is made from, besides its prompt. A mask may be one picture for all frames, references one alone."""

    image: Picture | None = None
    last_image: Picture | None = None
    video: Video | None = None
    mask: Mask | None = None
    references: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        one = isinstance(self.references, str | Path) or getattr(self.references, "ndim", 4) == 3
        object.__setattr__(self, "references", (self.references,) if one else tuple(self.references))

    def there(self) -> dict[str, Any]:
        """What is not left out, by name."""
        there = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in there.items() if value is not None and not _is_empty(value)}

    def record(self) -> dict[str, Any]:
        """As it goes into the file that is made: paths, and hashes of what lies there."""
        return {
            name: [_named(one) for one in value] if name == "references" else _named(value)
            for name, value in self.there().items()
        }


def _is_empty(value: Any) -> bool:
    return isinstance(value, tuple | list) and not value


def _named(value: Picture | Video) -> dict[str, str]:
    if isinstance(value, str | Path):
        with open_file(Path(value)) as file:
            return {"path": str(value), "sha256": file_digest(file, "sha256").hexdigest()}
    return {"sha256": sha256(_array(value).tobytes()).hexdigest()}


def picture(image: Picture) -> np.ndarray:
    """H W 3 uint8. ValueError, naming what is wrong, for what is no picture."""
    if isinstance(image, str | Path):
        return mm_data.read_image(image)
    return _of_uint8(image, 3, "an image", "H W 3")


@dataclass(frozen=True)
class Footage:
    """Frames of a video, chosen by time but not yet read."""

    source: VideoInfo | np.ndarray
    indices: np.ndarray
    fps: float  # at which they follow each other
    pixel_aspect: Any = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width as it is shown."""
        if isinstance(self.source, VideoInfo):
            return self.source.height, round(self.source.width * self.pixel_aspect)
        return self.source.shape[1:3]

    def cut(self, frames: int) -> Footage:
        """The first of them. ValueError if there are fewer."""
        if len(self.indices) < frames:
            raise ValueError(
                f"{self}: {len(self.indices)} frames at {self.fps:g} per second, but {frames} are needed: ask for fewer"
                " frames, or give a longer video"
            )
        return Footage(self.source, self.indices[:frames], self.fps, self.pixel_aspect)

    @property
    def total(self) -> int:
        """Frames of the whole video."""
        return self.source.num_frames if isinstance(self.source, VideoInfo) else len(self.source)

    def match(self, video: Footage) -> Footage:
        """The frames with the numbers of another video's: what a mask says of it. As in training.

        ValueError if the two are no pair: lengths more than a frame and a tenth apart, shapes a twentieth.
        """
        if abs(self.total - video.total) > max(1, 0.1 * video.total):
            raise ValueError(f"the mask ({self}) has {self.total} frames, but what it masks ({video}) {video.total}")
        (height, width), (high, wide) = self.shape, video.shape
        if not 0.95 < (height / width) / (high / wide) < 1.05:
            raise ValueError(f"the mask ({self}) is {height}x{width}, but what it masks ({video}) {high}x{wide}")
        return Footage(self.source, np.minimum(video.indices, self.total - 1), video.fps, self.pixel_aspect)

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """3 F H W in [-1, 1]: the largest centred piece of that shape, scaled, as in training."""
        from mm_data.transforms import to_model_range

        return to_model_range(self._fit(size))

    def mask(self, size: tuple[int, int]) -> Tensor:
        """1 F H W in 0..1, of the same piece: grey values, whatever is transparent, as in training."""
        from mm_data.transforms import to_mask

        return to_mask(self._fit(size, grey=True))

    def _fit(self, size: tuple[int, int], grey: bool = False) -> np.ndarray:
        """F H W C uint8."""
        from mm_data.transforms import crop_resize

        def fit(frame: np.ndarray) -> np.ndarray:
            return crop_resize(frame, crop_box(*frame.shape[:2], size, self.pixel_aspect), size)

        if isinstance(self.source, VideoInfo):
            return read_video(self.source, self.indices, each=fit, grey=grey).frames
        fitted = {index: fit(self.source[index]) for index in set(self.indices.tolist())}
        return np.stack([fitted[index] for index in self.indices.tolist()])

    def __str__(self) -> str:
        return str(self.source.path) if isinstance(self.source, VideoInfo) else "the video given"


def footage(video: Video, fps: float) -> Footage:
    """From its start, the frames on screen at 0, 1/fps, 2/fps, … of a file, or all of a slower one; all of an array."""
    if isinstance(video, str | Path):
        info = probe(video)
        chosen = resample(info.timestamps, fps)
        return Footage(info, chosen, clip_rate(info.timestamps, fps) or fps, info.pixel_aspect)
    frames = _of_uint8(video, 4, "a video", "F H W 3")
    return Footage(frames, np.arange(len(frames)), fps)


def masking(given: Given, fps: float, frames: int) -> Footage:
    """The frames of the mask: those that go with the frames taken of the video, if there is one; a picture always."""
    from_file = isinstance(given.mask, str | Path)
    if from_file and not mm_data.is_picture(given.mask):
        moving = footage(given.mask, fps)
    else:
        array = mm_data.read_mask(given.mask) if from_file else _mask_array(given.mask)
        if array.ndim == 3:
            return Footage(array[None], np.zeros(frames, int), fps)
        moving = Footage(array, np.arange(len(array)), fps)
    return (moving if given.video is None else moving.match(footage(given.video, fps))).cut(frames)


def to_pixels(given: Given, options: Options) -> Pixels:
    """All that is given, as it is encoded, for one video; options: with nothing left open."""
    from mm_models.diffusion.objective import Pixels

    size = options.height, options.width
    video = None if given.video is None else footage(given.video, options.fps).cut(options.frames).pixels(size)[None]
    mask = None if given.mask is None else mask_pixels(given, options.fps, options.frames, size)[None]
    references = [mm_data.pad_to(picture(one), size) for one in given.references]
    return Pixels((options.frames, *size), *frames_at_ends(given, options), video, mask, [references])


def frames_at_ends(given: Given, options: Options) -> tuple[Tensor | None, Tensor | None]:
    """The first and the last frame, 1 3 H W in [-1, 1]; None for one that is not given."""
    size = options.height, options.width
    first, last = (
        None if one is None else mm_data.crop_to(picture(one), size)[None] for one in (given.image, given.last_image)
    )
    return first, last


def mask_pixels(given: Given, fps: float, frames: int, size: tuple[int, int]) -> Tensor:
    """1 F H W in 0..1, 1 where pixels change."""
    return masking(given, fps, frames).mask(size)


def _mask_array(mask: np.ndarray | Tensor) -> np.ndarray:
    """H W 1 (one picture for all frames) or F H W 1, uint8, of a mask that is given as an array.

    It is H W or F H W, of any width above 4, or has channels behind: grey or RGB, and alpha, which is left out. It
    holds bool, uint8 in 0..255, or floating point in 0..1. Raises ValueError for another shape, type or range.
    """
    array = _array(mask)
    wanted = "a mask must be H W or F H W, or with 1 to 4 channels behind; bool, uint8 of 0 to 255, or float of 0 to 1"
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] > 4):
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] > 4 or 0 in array.shape:
        raise ValueError(f"{wanted}: not of the shape {_array(mask).shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{wanted}: not {array.dtype}")
    array = array[..., : 1 if array.shape[-1] < 3 else 3]
    low, high = array.min(), array.max()
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating) and 0 <= low <= high <= 1:
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8 or high == 1:  # of 0 and 1: nothing would change
        raise ValueError(f"{wanted}: not {array.dtype} of {low} to {high}")
    return array if array.shape[-1] == 1 else to_grey(array)


def _of_uint8(value: np.ndarray | Tensor, dims: int, what: str, shape: str) -> np.ndarray:
    array = _array(value)
    if array.ndim != dims or array.shape[-1] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(f"{what} must be {shape} uint8, or the path of a file, not {array.shape} {array.dtype}")
    return array


def _array(value: np.ndarray | Tensor) -> np.ndarray:
    if hasattr(value, "cpu"):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()  # numpy knows no bfloat16
    if isinstance(value, Image.Image):  # of which numpy would give the numbers in a palette, not the colours
        value = value.convert("RGBA" if value.has_transparency_data else "RGB")
    return np.asarray(value)
