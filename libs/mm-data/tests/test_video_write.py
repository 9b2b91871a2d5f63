"""A video written is a whole video, found again with what was recorded in it, or no file at all."""

import resource

import av
import numpy as np
import pytest

from mm_data import made_with, write_video


def bars(frames=5, height=64, width=96) -> np.ndarray:
    colours = np.array([[255, 0, 0], [0, 200, 30], [20, 30, 240]], np.uint8)
    video = np.repeat(colours, width // 3, axis=0)[None, None].repeat(frames, 0).repeat(height, 1)
    video[:, : height // 2] //= np.arange(1, frames + 1, dtype=np.uint8)[:, None, None, None]  # upper half fades
    return np.ascontiguousarray(video)


def read(path) -> tuple[np.ndarray, av.container.InputContainer]:
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def test_frames_rate_and_record_come_back(tmp_path):
    record = {"prompt": 'ein "Füchslein" 狐\n', "steps": 50, "flow_shift": 3.0, "lora": None}
    write_video(tmp_path / "a.mp4", bars(), 16, record)
    frames, rate = read(tmp_path / "a.mp4")
    assert rate == 16
    assert frames.shape == bars().shape
    assert np.abs(frames.astype(int) - bars()).mean() < 2  # and in particular: red stays red, frame 0 is the brightest
    assert made_with(tmp_path / "a.mp4") == record


def test_same_frames_same_bytes(tmp_path):
    draw = np.random.default_rng(0)
    blocks = draw.random((9, 8, 8, 3)).repeat(8, 1).repeat(8, 2) * 200
    frames = np.clip(blocks + draw.normal(0, 10, blocks.shape), 0, 255).astype(np.uint8)
    for i in range(20):
        write_video(tmp_path / str(i), frames, 16, {"prompt": "x"})
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_one_frame(tmp_path):
    write_video(tmp_path / "a.mp4", bars(frames=1), 16)
    assert len(read(tmp_path / "a.mp4")[0]) == 1
    with pytest.raises(ValueError, match="does not say how it was made"):
        made_with(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (bars().astype(np.float32), "F > 0, not .* float32"),
        (bars().transpose(0, 3, 1, 2), "F H W 3"),
        (bars()[:0], "F H W 3"),
    ],
)
def test_frames_that_cannot_be_written(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames, 16)


def test_a_disk_that_fills_up_leaves_the_earlier_video_and_no_debris(tmp_path):
    write_video(tmp_path / "a.mp4", bars(), 16, {"try": 1})
    noise = np.random.default_rng(0).integers(0, 255, (9, 128, 128, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the nearest thing to a full disk that needs no root
    try:
        with pytest.raises(OSError, match=r"cannot write the video: .*a\.mp4"):
            write_video(tmp_path / "a.mp4", noise, 16, {"try": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert made_with(tmp_path / "a.mp4") == {"try": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match=r"missing/a\.mp4"):
        write_video(tmp_path / "missing" / "a.mp4", bars(), 16)
