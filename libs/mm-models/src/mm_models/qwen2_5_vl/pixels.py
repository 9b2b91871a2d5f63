"""From a picture to patches, to the last bit as transformers' `Qwen2VLImageProcessorPil` makes them.

That class computes every colour of every pixel in floating point. There are only 256 values of each colour, so they are
looked up in a table here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

MOST_OBLONG = 200  # of a longer side over the shorter one
OBLONG = 180  # to which the nearest mode cuts what is more oblong

Size = tuple[int, int]  # height and width


class Bounds(NamedTuple):
    """Least and most pixels of a picture."""

    least: int
    most: int

    def limit(self, most: int | None) -> Bounds:
        """The same, where one picture may not have more than `most`: nor by enlarging it, which rounds up twice."""
        if most is None or most >= self.most:
            return self
        return Bounds(min(self.least, most // 4), most)


class Way(NamedTuple):
    """How a picture gets its size: first without smoothing, if `nearest`, then as the processor does."""

    processor: Bounds
    nearest: Bounds | None = None

    def limit(self, most: int | None) -> Way:
        return Way(self.processor.limit(most), self.nearest and self.nearest.limit(most))


@dataclass(frozen=True)
class ImageProcessor:
    """The facts of preprocessor_config.json."""

    bounds: Bounds
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float

    @classmethod
    def read(cls, json: Mapping[str, Any]) -> ImageProcessor:
        """ValueError for what asks for something else than every published one does."""
        usual = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
        for field, value in usual.items():
            if json.get(field, value) not in (value, None):
                raise ValueError(f"preprocessor_config.json: {field} is {json[field]!r}; only {value!r} is known here")
        size = json.get("size") or {}
        least = _first(json.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"), 56 * 56)
        most = _first(json.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"), 28 * 28 * 1280)
        return cls(
            Bounds(least, most),
            json.get("patch_size", 14),
            json.get("temporal_patch_size", 2),
            json.get("merge_size", 2),
            tuple(json.get("image_mean") or (0.48145466, 0.4578275, 0.40821073)),
            tuple(json.get("image_std") or (0.26862954, 0.26130258, 0.27577711)),
            json.get("rescale_factor", 1 / 255),
        )

    def __post_init__(self) -> None:
        values = (np.arange(256).astype(np.float64) * self.scale).astype(np.float32)  # in this order, and rounded here
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        object.__setattr__(self, "table", (values - mean[:, None]) / std[:, None])  # C 256

    def sizes(self, size: Size, way: Way) -> list[tuple[Size, Image.Resampling]]:
        """The sizes that a picture goes through, and the filter of each; the last is what the model sees.

        ValueError for a picture that is too oblong, which the nearest mode cuts instead.
        """
        steps = [] if way.nearest is None else list(_nearest_steps(size, way.nearest))
        before = steps[-1][0] if steps else size
        return [*steps, (smart_resize(before, self.patch_size * self.merge_size, way.processor), _BICUBIC)]

    def grid(self, size: Size, frames: int = 1) -> tuple[int, int, int]:
        """Patches in time, height and width."""
        height, width = size
        return math.ceil(frames / self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def resizer(self, way: Way) -> Callable[[np.ndarray], np.ndarray]:
        """What gives a picture (H W 3 uint8) the size that the model sees."""

        def resize(picture: np.ndarray) -> np.ndarray:
            image = Image.fromarray(picture)
            for (height, width), how in self.sizes(picture.shape[:2], way):
                image = image.resize((width, height), how)
            return np.asarray(image)

        return resize

    def patches(self, frames: np.ndarray) -> np.ndarray:
        """F H W 3 uint8 of a size that the model sees -> N C*T*P*P float32.

        The order of patches is (time, rows, columns, rows of a token, columns of a token); a picture is one frame that
        stands still, and the last frame is repeated where there are too few.
        """
        time, merge, side = self.temporal_patch_size, self.merge_size, self.patch_size
        still = len(frames) == 1
        if (missing := -len(frames) % time) and not still:
            frames = np.concatenate([frames, np.repeat(frames[-1:], missing, 0)])
        _, height, width, colours = frames.shape
        values = np.stack([table.take(frames[..., colour]) for colour, table in enumerate(self.table)])  # C F H W
        patches = values.reshape(
            *(colours, -1, 1 if still else time),
            *(height // side // merge, merge, side),
            *(width // side // merge, merge, side),
        ).transpose(1, 3, 6, 4, 7, 0, 2, 5, 8)  # t rows columns m m C T P P
        made = np.empty((*patches.shape[:6], time, side, side), np.float32)
        made[:] = patches  # one frame of a picture fills all of T
        return made.reshape(-1, colours * time * side * side)


_BICUBIC = Image.Resampling.BICUBIC


def smart_resize(size: Size, factor: int, bounds: Bounds) -> Size:
    """The makers' rule: sides that are multiples of `factor`, an area within the bounds, nearly the same shape.

    A side is at least `factor`. ValueError for what is more than 200 times as long as it is wide.
    """
    height, width = size
    if max(size) > MOST_OBLONG * min(size):
        raise ValueError(f"is {height}x{width}: one side is more than {MOST_OBLONG} times the other")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > bounds.most:
        by = math.sqrt(height * width / bounds.most)
        rows, columns = math.floor(height / by / factor), math.floor(width / by / factor)
    elif rows * columns * factor**2 < bounds.least:
        by = math.sqrt(bounds.least / (height * width))
        rows, columns = math.ceil(height * by / factor), math.ceil(width * by / factor)
    return max(1, rows) * factor, max(1, columns) * factor


def _nearest_steps(size: Size, bounds: Bounds) -> Iterator[tuple[Size, Image.Resampling]]:
    """What MindSpeed-MM does before its processor: the area by picking pixels; then sides of at least 28, and a shape
    that the processor takes, with Pillow's usual filter.
    """
    for target, direction in ((bounds.most, 1), (bounds.least, -1)):
        area = size[0] * size[1]
        if direction * area > direction * target:
            by = math.sqrt(target / area)
            size = max(1, int(size[0] * by)), max(1, int(size[1] * by))
            yield size, Image.Resampling.NEAREST
    height, width = max(size[0], 28), max(size[1], 28)
    if (height, width) != size:
        yield (size := (height, width)), _BICUBIC
    if width > MOST_OBLONG * height:
        yield (size := (height, OBLONG * height)), _BICUBIC
    if size[0] > MOST_OBLONG * size[1]:
        yield (OBLONG * size[1], size[1]), _BICUBIC


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
