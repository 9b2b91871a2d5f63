"""Pictures of every kind come upright as RGB, or are refused by name."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from mm_data import area_size, crop_to, is_picture, pad_to, read_image, read_mask
from mm_data.images import read_size

# H W 3: red, green over blue, black; not square, so that turns and mirrors show
CORNERS = np.zeros((20, 30, 3), np.uint8)
CORNERS[:10, :15, 0] = CORNERS[:10, 15:, 1] = CORNERS[10:, :15, 2] = 255


def saved(path, picture, **options):
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_exif_says(tmp_path, orientation):
    # what a camera stores so that the orientation makes CORNERS of it
    stored = [
        lambda a: a,
        np.fliplr,
        lambda a: np.rot90(a, 2),
        np.flipud,
        lambda a: a.transpose(1, 0, 2),
        lambda a: np.rot90(a, 1),
        lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        lambda a: np.rot90(a, -1),
    ][orientation - 1](CORNERS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True}), ("a.jpg", {"quality": 100, "subsampling": 0})):
        path = saved(tmp_path / name, Image.fromarray(np.ascontiguousarray(stored)), exif=exif, **options)
        image = read_image(path)
        assert image.shape == (20, 30, 3)
        assert np.abs(image.astype(int) - CORNERS).mean() < 8


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("orientation", [None, 1, 6])
@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("name", [b"eXIf", b"iTXt"])
def test_the_size_of_a_png_is_that_of_the_upright_picture(tmp_path, monkeypatch, orientation, place, name):
    """Wherever it says how it is turned; pixels are decoded only where something stands behind them."""
    exif = Image.Exif()
    exif[0x0112] = orientation or 1
    xmp = f'<x:xmpmeta tiff:Orientation="{orientation}"/>'.encode()
    data = exif.tobytes()[6:] if name == b"eXIf" else b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    plain = saved(tmp_path / "a.png", Image.fromarray(CORNERS)).read_bytes()
    cut = plain.index(b"IDAT") - 4 if place == "before" else plain.index(b"IEND") - 4
    path = tmp_path / "b.png"
    path.write_bytes(plain if orientation is None else plain[:cut] + chunk(name, data) + plain[cut:])
    assert read_size(path) == read_image(path).shape[:2] == ((30, 20) if orientation == 6 else (20, 30))
    decoded = []
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: decoded.append(1) or load(self))
    read_size(path)
    assert bool(decoded) == (orientation is not None and place == "behind")


def test_other_kinds_of_pixels(tmp_path):
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    for name, picture in {
        "grey": Image.fromarray(grey),
        "grey16": Image.fromarray(grey.astype(np.uint16) * 257),
        "palette": Image.fromarray(as_rgb).quantize(24),
    }.items():
        assert (read_image(saved(tmp_path / f"{name}.png", picture)) == as_rgb).all(), name
    bits = read_image(saved(tmp_path / "bits.png", Image.fromarray(grey > 100)))
    assert (bits[..., 0] == np.where(grey > 100, 255, 0)).all()
    second = [Image.new("RGB", (8, 8), "white")]
    phone = saved(tmp_path / "phone.jpg", Image.new("RGB", (8, 8)), format="MPO", save_all=True, append_images=second)
    assert (read_image(phone) == 0).all()
    cmyk = read_image(saved(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (255, 0, 0, 0)), quality=100))
    assert (np.abs(cmyk.astype(int) - [0, 255, 255]) < 10).all()


def test_what_is_transparent_lies_on_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0, 3], rgba[0, 1, 3] = 255, 51
    picture = Image.fromarray(rgba)
    expected = [[0, 204], [255, 255]]
    assert read_image(saved(tmp_path / "rgba.png", picture))[..., 0].tolist() == expected
    assert read_image(saved(tmp_path / "la.png", picture.convert("LA")))[..., 2].tolist() == expected
    palette = Image.new("P", (2, 2), 0)
    assert (read_image(saved(tmp_path / "palette.png", palette, transparency=0)) == 255).all()


def test_masks_are_grey_values_whatever_is_transparent(tmp_path):
    """As diffusers takes them: Pillow's mode L."""
    rgba = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    for mode in ("RGBA", "LA", "RGB", "L", "1", "P", "CMYK"):
        picture = Image.fromarray(rgba).convert(mode)
        path = saved(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), picture)
        assert (read_mask(path)[..., 0] == np.asarray(picture.convert("L"))).all(), mode
    palette = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    palette = palette.convert("P")
    palette.putpalette([0, 0, 0, 255, 255, 255] * 3)
    path = saved(tmp_path / "palette.png", palette, transparency=1)
    assert read_mask(path)[..., 0].tolist() == [[0, 255, 0], [255, 0, 255]]
    grey = Image.fromarray(np.array([[0, 65535, 32768]], np.uint16))
    assert read_mask(saved(tmp_path / "deep.png", grey))[..., 0].tolist() == [[0, 255, 128]]


def test_only_pictures_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gs.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    for name, message in {
        "pipe.png": r"pipe.png is a named pipe \(FIFO\), not a file",
        "gs.png": "gs.png is not a picture of a known kind",  # Pillow would start Ghostscript
        "http://example.com/a.png": "is not there",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_image(name if "://" in name else tmp_path / name)


def test_bombs_are_refused_in_one_line(tmp_path):
    """Small files that say that they are very large pictures, or hold very long texts."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    def png(size: int, *chunks: bytes) -> bytes:
        header = size.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
        return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])

    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))
    for name, content in {"large.png": png(30_000), "text.png": png(8, text)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a picture") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    good = saved(tmp_path / "good.jpg", Image.fromarray(CORNERS)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2 + 100])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    (tmp_path / "cut.png").write_bytes(saved(tmp_path / "good.png", noise).read_bytes()[:500])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    frames = [Image.new("L", (8, 8), n) for n in (0, 255)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((4, 4), np.int32)).save(tmp_path / "wide.tiff")
    for name, message in {
        "none.png": "is not there",
        ".": "is a folder",
        "cut.jpg": "cut.jpg cannot be read as a picture",
        "cut.png": "cut.png cannot be read as a picture",
        "text.png": "text.png is not a picture of a known kind",
        "empty.png": "empty.png is not a picture",
        "moving.gif": "holds 2 pictures",
        "wide.tiff": "32 bits",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name)


def test_sizes():
    square = crop_to(CORNERS, (10, 10))
    assert square.shape == (3, 10, 10)
    assert torch.equal(square[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(square[:, -1, 0], torch.tensor([-1.0, -1.0, 1.0]))
    assert torch.equal(crop_to(CORNERS, (20, 30)), torch.from_numpy(CORNERS).permute(2, 0, 1) / 127.5 - 1)
    padded = pad_to(CORNERS, (40, 40))
    assert (padded[:, :6] == 1).all()
    assert (padded[:, 34:] == 1).all()
    assert torch.equal(padded[:, 8, 0], torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(padded[:, 32, -1], torch.tensor([-1.0, -1.0, -1.0]))
    assert pad_to(CORNERS[:1], (8, 8)).shape == (3, 8, 8)
    assert area_size(720, 1280, 480 * 832, 16) == (464, 832)
    assert area_size(480, 832, 480 * 832, 16) == (480, 832)
    assert area_size(1280, 720, 480 * 832, 16) == (832, 464)
    assert area_size(1, 1000, 64 * 64, 16) == (16, 2016)


@pytest.mark.parametrize(("name", "kind"), [("a.jfif", "jpeg"), ("a", "png"), ("a.mp4", "webp"), ("a.gif", "gif")])
def test_pictures_are_told_from_videos_by_what_they_hold(tmp_path, name, kind):
    assert not is_picture(tmp_path / name)  # not there
    still, other = Image.fromarray(CORNERS), Image.fromarray(CORNERS[::-1])
    assert is_picture(saved(tmp_path / name, still, format=kind))
    if kind != "jpeg":
        saved(tmp_path / name, still, format=kind, save_all=True, append_images=[other])
        assert not is_picture(tmp_path / name)
    (tmp_path / name).write_bytes(b"no picture")
    assert not is_picture(tmp_path / name)
