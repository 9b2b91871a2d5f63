"""Pictures, read upright: their colours on white, or as a mask. This file imports no torch.

A picture is a file, or a text that holds one: `data:image/png;base64,…`, as in the requests of OpenAI.
"""

import binascii
import contextlib
import io
import struct
from collections.abc import Iterable, Iterator
from math import isqrt
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mm_data.files import find_fault, open_file, shorten
from mm_data.pixels import lay_on_white, to_grey

# What has a mark at its beginning comes first. Not what Pillow gives to other programs (eps), nor rare kinds of text.
MARKED = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "PSD", "DDS", "ICNS")
FORMATS = (*MARKED, "ICO", "SGI", "DIB", "PCX", "TGA")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".tga")


def is_picture(path: str | Path) -> bool:
    """Whether a file is a picture, not a video: by its name, or where that does not say, by how it begins.

    A .png may be animated, which is a video.
    """
    suffix = Path(path).suffix.lower()
    if suffix in SUFFIXES and suffix != ".png":
        return True
    with (
        contextlib.suppress(Exception),  # see `_open`
        open_file(path) as file,
        Image.open(file, formats=_known(MARKED)) as picture,
    ):
        return picture.format == "MPO" or getattr(picture, "n_frames", 1) == 1
    return suffix == ".png"


def read_image(path: str | Path) -> np.ndarray:
    """H W 3 uint8 RGB, upright as EXIF says; what is transparent lies on white; colour profiles are not applied.

    Raises ValueError, naming the file, for what is no picture, is damaged, moves, or holds other numbers than 8 or 16
    bits.
    """
    picture = _read(path)
    if picture.has_transparency_data:
        return lay_on_white(np.asarray(picture.convert("RGBA")))
    return np.array(picture.convert("RGB"))


def read_mask(path: str | Path) -> np.ndarray:
    """H W 1 uint8, upright: grey values, whatever is transparent. Raises ValueError as `read_image`."""
    picture = _read(path)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")  # not at once to RGB, where Pillow warns of palettes
    return to_grey(np.asarray(picture.convert("RGB")))


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width of what `read_image` gives, from the header alone. Raises ValueError for what has none."""
    with _open(path) as picture:
        if picture.format == "TIFF":  # of which Pillow tells the size when upright, and the turn that it will make
            picture.load()
        width, height = picture.size
        # Pillow decodes a png to see what stands behind its pixels, before it tells the turn.
        decodes = picture.format == "PNG" and _has_late_texts(picture.fp)
        exif = picture.getexif() if decodes else Image.Image.getexif(picture)
        on_its_side = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if on_its_side else (height, width)


def _has_late_texts(file: BinaryIO) -> bool:
    """Whether a png has chunks behind its pixels that may tell how it is turned. The file's place stays."""
    place = file.tell()
    file.seek(8)
    pixels = False
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if pixels and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            break
        pixels = pixels or name == b"IDAT"
        file.seek(length + 4, 1)
    file.seek(place)
    return len(head) == 8


def _read(path: str | Path) -> Image.Image:
    """A picture of 8 bits, upright and in memory."""
    with _open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I;16"):  # grey of 16 bits, which Pillow would cut off at 255
        grey = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(grey.round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"{shorten(str(path), 200)} holds numbers of 32 bits, of which none is known to be white: save it with 8"
        )
    return picture


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[Image.Image]:
    """One picture of which the header is read. ValueError for what is none, also if that shows while it is in use."""
    with _open_bytes(path) as file:
        path, frames = shorten(str(path), 200), 1
        try:
            with Image.open(file, formats=_known(FORMATS)) as picture:
                if picture.format != "MPO":  # so phones write a jpg with a thumbnail or a depth map
                    frames = getattr(picture, "n_frames", 1)
                if frames == 1:
                    yield picture
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is not a picture of a known kind: use png, jpg or webp") from error
        except MemoryError:
            raise
        except Exception as error:  # damaged files make Pillow raise nearly anything: SyntaxError, struct.error, …
            raise ValueError(f"{path} cannot be read as a picture: {error or type(error).__name__}") from error
    if frames > 1:
        raise ValueError(f"{path} holds {frames} pictures: save the one that is meant")


def _open_bytes(path: str | Path) -> BinaryIO:
    if isinstance(path, str) and path.startswith("data:"):
        head, comma, data = path.partition(",")
        try:
            decoded = binascii.a2b_base64(data) if head.endswith(";base64") else unquote_to_bytes(data)
        except ValueError as error:  # binascii.Error, and characters that are not ASCII
            raise ValueError(f"{shorten(path)} is no data: URL: {error}") from error
        if not comma or not decoded:
            raise ValueError(f"{shorten(path)} is a data: URL without data")
        return io.BytesIO(decoded)
    if fault := find_fault(path):
        raise ValueError(fault)
    return open_file(path)


def _known(formats: Iterable[str]) -> list[str]:
    """Those that this Pillow has: AVIF came late."""
    Image.init()
    return [name for name in formats if name in Image.OPEN]


def area_size(height: int, width: int, area: int, multiple: int) -> tuple[int, int]:
    """The size of the shape `height` x `width` with about `area` pixels, both sides rounded down to a multiple."""
    sides = isqrt(area * height // width), isqrt(area * width // height)
    return max(multiple, sides[0] // multiple * multiple), max(multiple, sides[1] // multiple * multiple)
