"""Which frames and which pixels."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_data import Failure, Geometry, Sample, VideoDataset
from mm_data.geometry import Unfit, choose_frames, crop_box, output_size, resample
from mm_data.transforms import crop_resize, to_model_range, to_uint8

sys.path.insert(0, str(Path(__file__).parent))
from barcode_clips import read_barcode, write_clip


@given(st.integers(1, 200), st.integers(0, 20), st.integers(0, 10**6), st.sampled_from([4, 1, 8]))
def test_clips_are_what_the_vae_packs_and_inside(available, k, number, pack):
    geometry = Geometry(num_frames=pack * k + 1, time_stride=pack)
    chosen = choose_frames(np.arange(available), geometry, lambda n: number % n)
    assert (len(chosen) - 1) % pack == 0
    assert len(chosen) == min(pack * k + 1, (available - 1) // pack * pack + 1)
    assert (np.diff(chosen) == 1).all()
    assert 0 <= chosen[0] <= chosen[-1] < available


def test_every_window_can_be_drawn_the_last_one_too():
    starts = {int(choose_frames(np.arange(20), Geometry(num_frames=17), lambda n, i=i: i % n)[0]) for i in range(100)}
    assert starts == {0, 1, 2, 3}
    assert choose_frames(np.arange(20), Geometry(num_frames=17, window="start"), None)[0] == 0
    assert choose_frames(np.arange(20), Geometry(num_frames=17, window="center"), None)[0] == 1


def test_too_short_is_refused():
    with pytest.raises(Unfit, match="12 frames, fewer than min_frames=17"):
        choose_frames(np.arange(12), Geometry(num_frames=81, min_frames=17), lambda n: 0)


def test_resampling_goes_by_time():
    assert resample(np.arange(60) / 30, 15.0).tolist() == list(range(0, 60, 2))
    assert resample(np.arange(48) / 24, 16.0).tolist() == [int(i * 1.5) for i in range(32)]
    assert resample(np.arange(30) / 15, 24.0).tolist() == list(range(30))  # a slow video keeps its frames
    assert resample(np.arange(10) / 24, None).tolist() == list(range(10))
    still = np.array([0.0, 0.1, 0.2, 0.3, 1.0, 1.1])  # the frame at 0.3 s stays on screen until 1 s
    assert resample(still, 10.0).tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4, 5]
    assert resample(still, 5.0).tolist() == [0, 2, 3, 3, 3, 4]
    assert resample(np.arange(31) / 30, 16.0)[-1] == 30  # the last frame counts for as long as it is shown
    rounded = np.round(np.arange(90) / 29.97, 3)  # matroska rounds to milliseconds
    assert resample(rounded, 29.97).tolist() == list(range(90))


@given(st.integers(1, 3000), st.integers(1, 3000), st.booleans())
def test_sizes_fit_or_are_refused(height, width, dynamic):
    geometry = Geometry(dynamic=dynamic)
    try:
        size = output_size(height, width, geometry)
    except Unfit as reason:
        smallest = geometry.area_range()[0]
        wide = max(height / width, width / height) if dynamic else abs(np.log2(height / width * 832 / 480)) + 1
        assert (reason.kind == "resolution_too_small") == (height * width < smallest)  # noqa: PT017
        assert (reason.kind == "aspect_mismatch") == (height * width >= smallest and wide > 2)  # noqa: PT017
        return
    assert size[0] % 16 == size[1] % 16 == 0
    assert 0 < size[0] * size[1] <= 480 * 832
    if not dynamic:
        assert size == (480, 832)
    top, left, h, w = crop_box(height, width, size)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h == height or w == width
    assert abs(h / w * size[1] / size[0] - 1) < 0.5 * (1 / h + 1 / w) + 0.01


def test_sizes_by_example():
    wide = Geometry(dynamic=True)
    assert output_size(720, 1280, wide) == (464, 832)
    assert output_size(1280, 720, wide) == (832, 464)
    assert output_size(300, 500, wide) == (288, 496)  # small videos are not enlarged
    assert output_size(480, 640, Geometry(), Fraction(4, 3)) == (480, 832)
    assert crop_box(720, 1280, (480, 832)) == (0, 16, 720, 1248)
    assert crop_box(480, 360, (480, 480), Fraction(4, 3)) == (0, 0, 480, 360)  # anamorphic: square when shown
    with pytest.raises(Unfit, match="set min_area to allow enlarging"):
        output_size(144, 176, Geometry())
    assert output_size(144, 176, Geometry(min_area=0)) == (480, 832)
    with pytest.raises(
        Unfit, match=r"1500 x 1000 .* is 2\.60 times too tall for 480 x 832, a factor of 2 is .*dynamic"
    ):
        output_size(1500, 1000, Geometry())
    with pytest.raises(Unfit, match=r"is 3\.00 times too wide for a square.*: give a larger --geometry\.max_aspect"):
        output_size(500, 1500, wide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 80}, "80 is not 4k.1: use 77 or 81"),
        ({"num_frames": 0}, "use 1 or 5"),
        ({"min_frames": 85}, "more than num_frames=81"),
        ({"max_height": 490}, "use 480 or 496"),
        ({"fps": 0.0}, "must be positive"),
        ({"max_area": 1000}, "set dynamic"),
        ({"window": "middle"}, "random, start or center"),
        ({"max_aspect": 0.5}, "at least 1"),
        ({"stride": 0}, "at least 1"),
        ({"time_stride": 0}, "at least 1"),
        ({"time_stride": 8, "num_frames": 77}, r"77 is not 8k\+1: use 73 or 81"),
        ({"time_stride": 6, "min_frames": 1}, r"num_frames=81 is not 6k\+1: use 79 or 85"),
    ],
)
def test_impossible_geometries_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Geometry(**options)


def test_a_geometry_is_described_without_torch():
    code = "import sys; from mm_data import Geometry; Geometry(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pixels():
    frame = np.zeros((40, 60, 3), np.uint8)
    frame[:, 30:] = 200
    same = crop_resize(frame, (0, 10, 40, 40), (40, 40))
    assert (same[:, :20] == 0).all()
    assert (same[:, 20:] == 200).all()
    half = crop_resize(np.rot90(frame), (0, 0, 60, 40), (30, 20))
    assert half.shape == (30, 20, 3)
    assert (half[0] == 200).all()
    assert (half[-1] == 0).all()
    video = to_model_range(np.stack([frame, frame]))
    assert video.shape == (3, 2, 40, 60)
    assert video.is_contiguous()
    assert video.min() == -1
    assert video.max() == pytest.approx(200 / 127.5 - 1)
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert (to_uint8(to_model_range(every)) == every).all()


GEOMETRY = Geometry(num_frames=9, max_height=48, max_width=80)


def numbers(clip):
    return [read_barcode(frame) for frame in to_uint8(clip["video"])]


def test_the_clip_is_the_window_of_the_cut(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 40)
    clip = VideoDataset([Sample("a", path, ("x", "y"), cut=(20, 35))], GEOMETRY)[0]
    assert clip["video"].shape == (3, 9, 48, 80)
    assert clip["captions"] == ("x", "y")
    assert clip["fps"] == pytest.approx(24)
    shown = numbers(clip)
    assert shown == clip["meta"]["frames"] == list(range(shown[0], shown[0] + 9))
    assert 20 <= shown[0] <= 26
    assert VideoDataset([Sample("a", path, cut=(20, 23))], GEOMETRY)[0]["video"].shape[1] == 1


def test_windows_depend_on_content_and_seed_only(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 300, gop=50)
    copy = tmp_path / "b.mp4"
    copy.write_bytes(path.read_bytes())
    one, other = (VideoDataset([Sample(p.name, p)], GEOMETRY, seed=3)[0] for p in (path, copy))
    assert numbers(one) == numbers(other)
    starts = {numbers(VideoDataset([Sample("a", path)], GEOMETRY, seed=seed)[0])[0] for seed in range(4)}
    assert len(starts) > 1


def test_resampled_clip(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 40, fps=24)
    geometry = Geometry(num_frames=9, max_height=48, max_width=80, fps=8, window="start")
    clip = VideoDataset([Sample("a", path)], geometry)[0]
    assert numbers(clip) == list(range(0, 27, 3))
    assert clip["fps"] == pytest.approx(8)


def test_failures_are_returned_with_their_reason(tmp_path):
    good = write_clip(tmp_path / "good.mp4", 12)
    (tmp_path / "bad.mp4").write_bytes(good.read_bytes()[:900])
    samples = [Sample("bad", tmp_path / "bad.mp4"), Sample("good", good), Sample("cut", good, cut=(5, 50))]
    dataset = VideoDataset(samples, GEOMETRY, on_error="return")
    loader = torch.utils.data.DataLoader(dataset, batch_size=1, collate_fn=list, num_workers=1)
    bad, clip, cut = (item for (item,) in loader)
    assert isinstance(bad, Failure)
    assert bad.sample.id == "bad"
    assert "bad.mp4" in bad.reason
    assert clip["video"].shape == (3, 9, 48, 80)
    assert "cannot be cut to [5, 50)" in cut.reason
    with pytest.raises(ValueError, match="sample bad"):
        VideoDataset(samples, GEOMETRY)[0]
