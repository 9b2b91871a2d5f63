"""Pictures: read upright as RGB, and brought to a size."""

from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mm_data.geometry import crop_box
from mm_data.transforms import crop_resize, to_model_range


def read_image(path: str | Path) -> np.ndarray:
    """H W 3 uint8 RGB, upright as EXIF says; what is transparent lies on white; colour profiles are not applied.

    Raises ValueError, naming the file, for what is no picture, is damaged, moves, or holds other numbers than 8 or 16
    bits.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a picture" if path.is_dir() else f"{path} does not exist")
    try:
        with Image.open(path) as picture:
            pictures = getattr(picture, "n_frames", 1)
            if pictures > 1 and picture.format != "MPO":  # so phones write a jpg with a thumbnail or a depth map
                raise ValueError(f"{path} holds {pictures} pictures: save the one that is meant")
            return _to_rgb(ImageOps.exif_transpose(picture), path)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture of a known kind: use png, jpg or webp") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: so Pillow names a damaged png
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _to_rgb(picture: Image.Image, path: Path) -> np.ndarray:
    if picture.mode.startswith("I;16"):  # grey of 16 bits, which Pillow would cut off at 255
        grey = np.asarray(picture).astype(np.float32) / 257
        return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise ValueError(f"{path} holds numbers of 32 bits, of which none is known to be white: save it with 8 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def crop_to(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """H W 3 uint8 -> 3 h w in [-1, 1]: the largest centred piece of that shape, scaled, as a clip's frames are."""
    box = crop_box(*image.shape[:2], size)
    return to_model_range(crop_resize(image, box, size)[None])[:, 0]


def pad_to(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """H W 3 uint8 -> 3 h w in [-1, 1]: the whole picture, scaled to fit, centred on white."""
    height, width = image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    padded = torch.ones(3, *size)
    scaled = crop_resize(image, (0, 0, height, width), inner)
    padded[:, top : top + inner[0], left : left + inner[1]] = to_model_range(scaled[None])[:, 0]
    return padded


def area_size(height: int, width: int, area: int, multiple: int) -> tuple[int, int]:
    """The size of the shape `height` x `width` with about `area` pixels, both sides rounded down to a multiple."""
    sides = isqrt(area * height // width), isqrt(area * width // height)
    return max(multiple, sides[0] // multiple * multiple), max(multiple, sides[1] // multiple * multiple)
