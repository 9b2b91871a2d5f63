"""Every kind of file gives its frames in the order of showing, upright, in their colours; or says what it is."""

import importlib.util
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from mm_data import probe, read_image, read_video

sys.path.insert(0, str(Path(__file__).parent))
from barcode_clips import barcode, read_barcode, write_clip


def check_order(path: Path, expected: list[int]) -> None:
    """All frames at once, each alone, and some of them: as a decoder that reads from the start shows them."""
    with av.open(str(path)) as container:
        assert [read_barcode(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)] == expected
    info = probe(path)
    assert [read_barcode(frame) for frame in read_video(info).frames] == expected
    assert [read_barcode(read_video(info, [n]).frames[0]) for n in range(info.num_frames)] == expected
    some = list(range(1, info.num_frames, 7))
    assert [read_barcode(frame) for frame in read_video(info, some).frames] == [expected[n] for n in some]
    assert (np.diff(info.timestamps) > 0).all()
    assert info.timestamps[0] == 0


def patch(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def write_frames(path: Path, frames: list[np.ndarray], codec: str, pixels: str, fps: int = 8, **options: str) -> Path:
    """`frames` H W 3 or 4; as `pixels` stores them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[2] == 4 else "rgb24")
            picture = picture.reformat(format=pixels)
            picture.pts, picture.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


B_FRAMES = {"bf": "2", "b_strategy": "0", "x264-params": "b-adapt=0"}


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".avi", "libx264", B_FRAMES),
        (".avi", "libx264", {"x264-params": "open-gop=1:bframes=3"}),
        (".avi", "libx264", {"bf": "0"}),
        (".avi", "mpeg4", {"bf": "2"}),
        (".avi", "mpeg4", {}),
        (".asf", "libx264", {"bf": "0"}),  # after a seek other time stamps
        (".asf", "libx264", B_FRAMES),
        (".mpg", "mpeg2video", {"bf": "2"}),
        (".ts", "libx264", B_FRAMES),
        (".mxf", "mpeg2video", {"bf": "2"}),
        (".h264", "libx264", B_FRAMES),  # no time stamps
        (".mkv", "libvpx", {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "10"}),  # hidden frames
    ],
)
def test_frames_come_in_the_order_of_showing(tmp_path, suffix, codec, options):
    frames = [barcode(n) for n in range(30)]
    path = write_frames(tmp_path / f"a{suffix}", frames, codec, "yuv420p", 25, **{"g": "12"} | options)
    check_order(path, list(range(30)))
    assert probe(path).fps == pytest.approx(25, rel=0.05)


def test_time_stamps_that_follow_the_order_of_decoding(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 30, options=B_FRAMES)
    for box in (b"ctts", b"edts"):
        patch(path, box, b"free")
    check_order(path, list(range(30)))
    assert probe(path).fps == pytest.approx(24)


def test_an_order_that_changes_in_the_middle(tmp_path):
    """The first half has no B-frames, so the header promises none; and some frames between are left out."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "g": "12"})
        later = av.CodecContext.create("libx264", "w")
        later.options = B_FRAMES | {"g": "12"}
        for number, context in enumerate((stream.codec_context, later)):
            context.height, context.width, context.pix_fmt = 48, 80, "yuv420p"
            context.time_base, context.framerate = Fraction(1, 25), Fraction(25)
            frames = [av.VideoFrame.from_ndarray(barcode(40 * number + n), format="rgb24") for n in range(40)]
            for place, frame in enumerate(frames):
                frame.pts, frame.time_base = 50 * number + place, Fraction(1, 25)
            for packet in [one for frame in [*frames, None] for one in context.encode(frame)]:
                packet.stream = stream
                container.mux(packet)
    with av.open(str(path)) as container:
        assert not container.streams.video[0].codec_context.has_b_frames
        plain = [read_barcode(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert plain == list(range(80))
    assert [read_barcode(frame) for frame in read_video(path).frames] == plain
    info = probe(path)
    assert [read_barcode(read_video(info, [n]).frames[0]) for n in range(80)] == plain
    assert [read_barcode(frame) for frame in read_video(info, range(50, 70)).frames] == plain[50:70]


def test_a_stream_that_begins_in_the_middle(tmp_path):
    """As in a broadcast, after more bytes than FFmpeg looks at before it says what there is."""
    pieces = []
    for number, pid in enumerate(("256", "512")):
        with av.open(str(tmp_path / "piece.ts"), "w", options={"mpegts_start_pid": pid}) as container:
            stream = container.add_stream("mpeg2video", rate=25, options={"bf": "0"})
            stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
            for n in range(20):
                frame = av.VideoFrame.from_ndarray(barcode(20 * number + n), format="rgb24")
                frame.pts, frame.time_base = 20 * number + n, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        pieces.append((tmp_path / "piece.ts").read_bytes())
    padding = b"\x47\x1f\xff\x10" + b"\xff" * 184
    (tmp_path / "a.ts").write_bytes(pieces[0] + padding * 40_000 + pieces[1])
    assert [read_barcode(frame) for frame in read_video(tmp_path / "a.ts").frames] == list(range(20))


def test_time_stamps_that_start_anew(tmp_path):
    """Two streams joined as bytes: sorted by time stamps the second half would come between the first."""
    frames = [barcode(n) for n in range(20)]
    one = write_frames(tmp_path / "one.mpg", frames, "mpeg2video", "yuv420p", 25, bf="2").read_bytes()
    (tmp_path / "twice.mpg").write_bytes(one + one)
    check_order(tmp_path / "twice.mpg", [*range(20), *range(20)])


def test_a_recording_that_begins_between_key_frames(tmp_path):
    path = write_clip(tmp_path / "a.ts", 40, gop=10, options={"bf": "0", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    tables = data[: positions[0]]
    path.write_bytes(tables + data[positions[4] :])
    check_order(path, list(range(10, 40)))


def test_an_edit_list_cuts_the_start(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 30, fps=24, options=B_FRAMES)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12
    starts = int.from_bytes(data[at + 4 : at + 8], "big")
    data[at + 4 : at + 8] = (starts + 5000).to_bytes(4, "big")  # 5 frames of 1/24000 s
    path.write_bytes(data)
    check_order(path, list(range(5, 30)))


def test_time_stamps_below_zero(tmp_path):
    times = [n / 24 - 0.25 for n in range(20)]
    path = tmp_path / "a.mkv"
    write_clip(path, 20, times=times)
    check_order(path, list(range(20)))
    assert probe(path).timestamps[3] == pytest.approx(3 / 24, abs=2e-3)


QUADRANTS = np.zeros((64, 96, 3), np.uint8)  # red, green over blue, yellow
QUADRANTS[:32, :48], QUADRANTS[:32, 48:] = (220, 30, 30), (30, 220, 30)
QUADRANTS[32:, :48], QUADRANTS[32:, 48:] = (30, 30, 220), (220, 220, 30)


def with_matrix(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """Write the display matrix into the track header (version 0) of an mp4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    for place, value in zip((0, 4, 12, 16), (a, b, c, d), strict=True):
        data[at + place : at + place + 4] = round(value * 65536).to_bytes(4, "big", signed=True)
    turned = path.with_name("turned.mp4")
    turned.write_bytes(data)
    return turned


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
        ((0, 2, -2, 0), lambda p: np.rot90(p, -1)),  # a scale besides, which players leave out
    ],
)
def test_all_eight_orientations(tmp_path, matrix, upright):
    path = write_frames(tmp_path / "a.mp4", [QUADRANTS] * 3, "libx264", "yuv420p", crf="10")
    stored, info = read_video(path).frames[0], probe(with_matrix(path, *matrix))
    np.testing.assert_array_equal(read_video(info, [1]).frames[0], upright(stored))
    assert (info.height, info.width) == upright(stored).shape[:2]


def test_a_tilted_video_is_refused(tmp_path):
    path = write_frames(tmp_path / "a.mp4", [QUADRANTS], "libx264", "yuv420p")
    with pytest.raises(ValueError, match="rotated by 45 degrees: only quarter turns"):
        probe(with_matrix(path, 0.7, 0.7, -0.7, 0.7))


def test_pixels_that_are_not_square(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(QUADRANTS, format="rgb24")), *stream.encode()])
    assert probe(path).pixel_aspect == Fraction(4, 3)
    assert probe(with_matrix(path, 0, 1, -1, 0)).pixel_aspect == Fraction(3, 4)


def add_audio(container: av.container.OutputContainer, codec: str) -> None:
    stream = container.add_stream(codec, rate=44100, layout="mono")
    silence = np.zeros((1, 44100), np.int16)
    frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
    frame.sample_rate, frame.pts = 44100, 0
    resampler = av.AudioResampler(stream.codec_context.format, "mono", 44100, stream.codec_context.frame_size or 1024)
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(stream.encode(piece))
    container.mux(stream.encode())


@pytest.mark.parametrize(
    ("suffix", "audio"), [(".mp3", "libmp3lame"), (".mp4", "aac"), (".m4a", "aac"), (".flac", "flac"), (".mkv", "aac")]
)
def test_a_cover_is_no_video(tmp_path, suffix, audio):
    cover = tmp_path / "cover.jpg"
    Image.fromarray(QUADRANTS).save(cover)
    path = tmp_path / f"song{suffix}"
    with av.open(str(path), "w", format="mp4" if suffix == ".m4a" else None) as container:
        if suffix == ".mkv":
            container.add_attachment("cover.jpg", "image/jpeg", cover.read_bytes())
        else:
            picture = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width, picture.pix_fmt = 64, 96, "yuvj420p"
            picture.disposition = Disposition.attached_pic
        add_audio(container, audio)
        if suffix != ".mkv":
            packet = av.Packet(cover.read_bytes())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = picture, 0, 0, True
            container.mux(packet)
    with av.open(str(path)) as container:
        assert {stream.type for stream in container.streams} == {"audio", "video"}
    with pytest.raises(ValueError, match=f"song{suffix} holds no video, only a cover picture, audio"):
        probe(path)


def test_a_video_with_a_cover_is_the_video(tmp_path):
    """Though the cover comes first, and is larger."""
    path = tmp_path / "a.mp4"
    cover = Image.new("RGB", (400, 400))
    cover.save(tmp_path / "cover.jpg")
    with av.open(str(path), "w") as container:
        picture, stream = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=24)
        picture.height = picture.width = 400
        picture.pix_fmt, picture.disposition = "yuvj420p", Disposition.attached_pic
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        for number in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(barcode(number), format="rgb24")))
        container.mux(stream.encode())
        packet = av.Packet((tmp_path / "cover.jpg").read_bytes())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = picture, 0, 0, True
        container.mux(packet)
    assert [read_barcode(frame) for frame in read_video(path).frames] == list(range(9))


def transparent(number: int) -> np.ndarray:
    """H W 4: a colour that is opaque on the left, half so in the middle, and not at all on the right."""
    frame = np.zeros((32, 48, 4), np.uint8)
    frame[..., :3] = (200, 40 * number, 0)
    frame[:, :16, 3], frame[:, 16:32, 3] = 255, 128
    return frame


@pytest.mark.parametrize(
    ("suffix", "codec", "pixels", "options"),
    [
        (".webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0", "crf": "4", "b": "0"}),
        (".webm", "libvpx", "yuva420p", {"auto-alt-ref": "0", "crf": "4", "b": "2000000"}),
        (".mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        (".mov", "qtrle", "argb", {}),
        (".mov", "png", "rgba", {}),
        (".mkv", "ffv1", "bgra", {}),
        (".apng", "apng", "rgba", {}),
    ],
)
def test_what_is_transparent_lies_on_white(tmp_path, suffix, codec, pixels, options):
    path = write_frames(tmp_path / f"a{suffix}", [transparent(n) for n in range(6)], codec, pixels, **options)
    info = probe(path)
    assert info.has_alpha
    for order in (None, [4], [5, 1]):
        for number, frame in zip(order or range(6), read_video(info, order).frames, strict=True):
            Image.fromarray(transparent(number)).save(tmp_path / "still.png")
            still = read_image(tmp_path / "still.png").astype(int)
            parts = np.abs(frame.astype(int) - still)[:, [8, 24, 40]]  # away from the edges, which codecs blur
            assert parts.max() < 16, (number, frame[16, [8, 24, 40]], still[16, [8, 24, 40]])
    bare = read_video(info, [3], grey=True).frames[0]  # as a mask: whatever is transparent
    assert bare.shape == (32, 48, 1)
    assert np.abs(bare[16, [8, 24], 0].astype(int) - (0.299 * 200 + 0.587 * 120)).max() < 12


def test_animations_are_videos(tmp_path):
    """gif and apng keep of a frame what changes: none can be decoded alone."""
    pictures = [Image.fromarray(barcode(n)) for n in range(8)]
    for name in ("a.gif", "a.png"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=120)
        check_order(tmp_path / name, list(range(8)))
        assert probe(tmp_path / name).fps == pytest.approx(1 / 0.12, rel=0.02)


@pytest.mark.parametrize("number", [1, 3])
def test_pictures_in_boxes_are_no_videos(tmp_path, number):
    """FFmpeg takes the alpha of an avif for a video of its own."""
    pictures = [Image.fromarray(transparent(n)) for n in range(number)]
    pictures[0].save(tmp_path / "a.avif", save_all=True, append_images=pictures[1:])
    with pytest.raises(ValueError, match=r"a.avif is a picture, not a video"):
        probe(tmp_path / "a.avif")


@pytest.mark.parametrize("kind", ["ico", "pdf"])
def test_a_picture_in_a_format_that_is_not_called_so_is_no_video(tmp_path, kind):
    """FFmpeg finds the JPEG in the pages of a PDF."""
    Image.fromarray(barcode(1)).save(tmp_path / "a.mp4", format=kind)
    with pytest.raises(ValueError, match=r"a.mp4 is a picture, not a video"):
        probe(tmp_path / "a.mp4")


def write_yuv(path: Path, yuv: tuple[int, int, int], matrix: int, full: bool, transfer: int = 1, bits: int = 8) -> Path:
    """One colour, lossless, tagged by the codes of H.273. The numbers are those of 8 bits."""
    pixels, size = {8: ("yuv444p", 1), 10: ("yuv444p10le", 2)}[bits]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, pixels
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 2 if full else 1
        context.color_primaries, context.color_trc = 1, transfer
        frame = av.VideoFrame(32, 32, pixels)
        for plane, value in zip(frame.planes, yuv, strict=True):
            plane.update((value << (bits - 8)).to_bytes(size, "little") * (plane.buffer_size // (size)))
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        container.mux([*stream.encode(frame), *stream.encode()])
    return path


MATRICES = {5: (0.299, 0.114), 6: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}  # BT.601 twice, 709, 2020


@pytest.mark.parametrize(("matrix", "full", "bits"), list(product(MATRICES, (False, True), (8, 10))))
def test_colours_are_those_of_the_tags(tmp_path, matrix, full, bits):
    y, u, v = 120, 100, 160
    red, blue = MATRICES[matrix]
    luma, cb, cr = (
        (y, u - 128, v - 128) if full else ((y - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224)
    )
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    frame = read_video(write_yuv(tmp_path / "a.mp4", (y, u, v), matrix, full, bits=bits)).frames[0]
    assert np.abs(frame[16, 16] - np.array([r, g, b])).max() < 2.5


def test_what_is_lost_is_said(tmp_path):
    assert probe(write_yuv(tmp_path / "sdr.mp4", (120, 128, 128), 1, False)).notes == ()
    assert probe(write_yuv(tmp_path / "pq.mp4", (120, 128, 128), 9, False, 16, bits=10)).notes == ("HDR (PQ)",)
    assert probe(write_yuv(tmp_path / "hlg.mp4", (120, 128, 128), 9, False, 18, bits=10)).notes == ("HDR (HLG)",)
    with av.open(str(tmp_path / "container.mov"), "w") as container:  # its frames do not say
        stream = container.add_stream("prores_ks", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv422p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace = 9, 18, 9
        frame = av.VideoFrame.from_ndarray(barcode(1), format="rgb24").reformat(format="yuv422p10le")
        container.mux([*stream.encode(frame), *stream.encode()])
    assert probe(tmp_path / "container.mov").notes == ("HDR (HLG)",)
    path = write_clip(tmp_path / "a.mp4", 9, options={"x264-params": "tff=1"})
    assert probe(path).notes == ("interlaced",)
    check_order(path, list(range(9)))


def test_palettes(tmp_path):
    frames = [barcode(n) for n in range(6)]
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "pal8"
        for number, frame in enumerate(frames):
            palette = np.zeros((256, 4), np.uint8)
            palette[0], palette[1] = (255, 0, 0, 0), (255, 255, 255, 255)  # ARGB
            picture = av.VideoFrame.from_ndarray((frame[..., 0] // 255, palette), format="pal8")
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    check_order(tmp_path / "a.mov", list(range(6)))


@pytest.mark.skipif(not importlib.util.find_spec("decord"), reason="decord is not installed")
def test_decord_shows_the_same_or_is_refused(tmp_path):
    plain = write_clip(tmp_path / "a.mp4", 20, options=B_FRAMES)
    for path in (
        write_clip(tmp_path / "a.ts", 20, options=B_FRAMES),
        write_clip(tmp_path / "a.avi", 20, options=B_FRAMES),
        write_frames(tmp_path / "a.mov", [transparent(n) for n in range(6)], "qtrle", "argb"),
        with_matrix(plain, -1, 0, 0, 1),
    ):
        with pytest.raises(ValueError, match=r"decord does not read .*: use backend pyav"):
            read_video(path, backend="decord")
    for path in (
        with_matrix(plain, -1, 0, 0, -1),
        write_yuv(tmp_path / "b.mp4", (120, 100, 160), 1, True),
        write_clip(tmp_path / "a.mkv", 20, times=[n / 24 - 0.25 for n in range(20)]),
    ):
        np.testing.assert_array_equal(read_video(path, backend="decord").frames, read_video(path).frames)
