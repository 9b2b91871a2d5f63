"""Frames are exactly those asked for, and what cannot be read is refused by name."""

import importlib.util
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from mm_data import probe, read_video, write_video

sys.path.insert(0, str(Path(__file__).parent))
from barcode_clips import barcode, read_barcode, write_clip

KINDS = {
    "h264": {"codec": "libx264"},
    "long gop": {"codec": "libx264", "gop": 250, "options": {"bf": "3"}},
    "open gop": {"codec": "libx264", "gop": 8, "options": {"x264-params": "open-gop=1:bframes=3"}},
    "hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "mpeg4": {"codec": "mpeg4"},
    "vp9": {"codec": "libvpx-vp9", "suffix": ".webm", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "odd size": {"codec": "libx264", "size": (51, 81)},
}
BACKENDS = ["pyav", *(["decord"] if importlib.util.find_spec("decord") else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_the_one_asked_for(tmp_path, kind, backend):
    options = dict(KINDS[kind])
    path = write_clip(tmp_path / f"clip{options.pop('suffix', '.mp4')}", 40, **options)
    info = probe(path)
    assert info.num_frames == 40
    assert (info.height, info.width) == options.get("size", (48, 80))
    np.testing.assert_allclose(info.timestamps, np.arange(40) / 24, atol=1e-3)
    for indices in ([0], [39], [17], [38, 3, 3, 20], range(7, 25), [0, 39], slice(5, None, 9), None):
        clip = read_video(info, indices, backend=backend)
        wanted = np.arange(40)[indices or slice(None)] if not isinstance(indices, list | range) else list(indices)
        assert [read_barcode(frame) for frame in clip.frames] == list(wanted)
        np.testing.assert_allclose(clip.timestamps, np.asarray(wanted) / 24, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_container_that_marks_no_key_frames(tmp_path, codec, backend):
    path = write_clip(tmp_path / "a.mp4", 40, codec=codec)
    data = path.read_bytes()
    assert data.count(b"stss") == 1
    path.write_bytes(data.replace(b"stss", b"free"))  # now every frame counts as a key frame
    for indices in ([17], [39, 3], [5, 14, 23, 32]):
        clip = read_video(path, indices, backend=backend)
        assert [read_barcode(frame) for frame in clip.frames] == indices


def test_variable_rate_keeps_its_time_stamps(tmp_path):
    times = [0.0, 0.1, 0.15, 0.5, 0.52, 0.9, 1.4, 1.45, 1.5, 2.0]
    path = write_clip(tmp_path / "vfr.mp4", 10, times=times)
    clip = read_video(path, [9, 3, 6])
    assert [read_barcode(frame) for frame in clip.frames] == [9, 3, 6]
    np.testing.assert_allclose(clip.timestamps, [2.0, 0.5, 1.4], atol=1e-4)
    assert probe(path).fps == pytest.approx(4.5)


def test_rotated_video_comes_upright(tmp_path):
    path = write_clip(tmp_path / "plain.mp4", 3)
    turned = tmp_path / "turned.mp4"
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # the display matrix of a version 0 track header
    one = (1 << 16).to_bytes(4, "big")
    minus = (-(1 << 16)).to_bytes(4, "big", signed=True)
    zero = bytes(4)
    assert data[at : at + 4] == one
    data[at : at + 20] = zero + one + zero + minus + zero  # 90 degrees clockwise, as phones write it
    turned.write_bytes(data)
    info = probe(turned)
    assert (info.height, info.width) == (80, 48)
    upright, stored = read_video(turned, [2]).frames[0], read_video(path, [2]).frames[0]
    np.testing.assert_array_equal(upright, np.rot90(stored, -1))


def test_each_is_applied_before_frames_are_kept(tmp_path):
    clip = read_video(write_clip(tmp_path / "a.mp4", 9), each=lambda frame: frame[::4, ::4])
    assert clip.frames.shape == (9, 12, 20, 3)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_cut_off_file_is_refused_or_shorter_but_never_wrong(tmp_path, share, suffix):
    path = write_clip(tmp_path / f"whole{suffix}", 60, size=(96, 160), options={"crf": "10"})
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    try:
        frame = read_video(cut, [59]).frames[0]
    except ValueError as error:
        assert f"cut{suffix}" in str(error)  # noqa: PT017
    else:
        assert read_barcode(frame) == 59
        assert share == 0.99  # a .mkv ends in an index that reading does without
    if suffix == ".mp4":
        with pytest.raises(ValueError, match="cut off"):
            probe(cut)


def test_damaged_in_the_middle_is_refused_where_it_is_read(tmp_path):
    path = write_clip(tmp_path / "noise.mp4", 60, size=(96, 160), gop=10, options={"crf": "10"})
    data = bytearray(path.read_bytes())
    middle = len(data) * 2 // 3
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"noise\.mp4"):
        read_video(path)
    assert read_barcode(read_video(path, [3]).frames[0]) == 3


def test_what_is_no_video_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.jpg").touch()
    with pytest.raises(ValueError, match=r"text\.mp4.*no video"):
        probe(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match=r"empty\.mp4 is empty"):
        probe(tmp_path / "empty.mp4")
    with pytest.raises(ValueError, match="holds 1 images; join them"):
        probe(tmp_path / "pictures")
    with pytest.raises(ValueError, match="is not there"):
        probe(tmp_path / "none.mp4")


def test_frames_outside_the_video_are_refused(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 5)
    with pytest.raises(ValueError, match="5 frames, 0 to 4: there is no frame 5"):
        read_video(path, [2, 5])
    with pytest.raises(ValueError, match="chooses none"):
        read_video(path, slice(9, None))
    with pytest.raises(ValueError, match="use pyav or decord"):
        read_video(path, backend="opencv")


def test_names_that_confuse_tools(tmp_path):
    path = write_clip(tmp_path / "a, b.mp4", 3)
    for name in ("-dash.mp4", "co:lon.mp4", "per%03d.mp4", "é [x].mp4"):
        other = tmp_path / name
        other.write_bytes(path.read_bytes())
        assert probe(other).num_frames == 3


@pytest.mark.parametrize("size", [(48, 80), (51, 81)])
def test_written_videos_read_back(tmp_path, size):
    frames = np.stack([barcode(n, *size) for n in range(5)])
    write_video(tmp_path / "out.mp4", frames, 16, {"prompt": "ü"})
    clip = read_video(tmp_path / "out.mp4")
    assert [read_barcode(frame) for frame in clip.frames] == list(range(5))
    assert clip.fps == pytest.approx(16)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(
    ("codec", "pixels", "suffix"),
    [("mjpeg", "yuvj420p", ".jpg"), ("png", "rgb24", ".png"), ("png", "rgb24", ".mp4"), ("gif", "rgb8", ".gif")],
)
def test_a_picture_is_no_video(tmp_path, codec, pixels, suffix):
    path = tmp_path / f"a{suffix}"
    frame = av.VideoFrame.from_ndarray(barcode(1), format="rgb24").reformat(format=pixels)
    with av.open(str(tmp_path / "written"), "w", format="gif" if codec == "gif" else "image2pipe") as container:
        stream = container.add_stream(codec, rate=1)
        stream.height, stream.width, stream.pix_fmt = 48, 80, pixels
        container.mux([*stream.encode(frame), *stream.encode()])
    (tmp_path / "written").rename(path)
    with pytest.raises(ValueError, match="is a picture, not a video"):
        probe(path)
