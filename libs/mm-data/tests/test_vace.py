"""Samples of VACE: their list, their rule of frames and sizes, their pixels, and their names in the store."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mm_data import (
    Control,
    Failure,
    FeatureCache,
    Geometry,
    Sample,
    VideoDataset,
    content_key,
    for_task,
    read_manifest,
    select,
    write_video,
)
from mm_data.geometry import Unfit
from mm_data.transforms import to_uint8
from mm_data.vace import vace_clip

sys.path.insert(0, str(Path(__file__).parent))
from barcode_clips import read_barcode, write_clip

WINDOW = Geometry(num_frames=9, max_height=96, max_width=144)  # a stripe of the barcode is 16 wide
VACE = replace(WINDOW, rule="vace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Video, source of half its size and mask, of numbered frames; files that do not go with them; two pictures."""
    path = tmp_path_factory.mktemp("vace")
    write_clip(path / "video.mp4", 21, size=(96, 144))
    write_clip(path / "source.mp4", 21, size=(48, 72), gop=7)
    for name, frames, size in (("mask", 20, (96, 144)), ("short", 9, (48, 72)), ("square", 21, (48, 48))):
        write_clip(path / f"{name}.mp4", frames, size=size)
    Image.new("RGB", (40, 80), (255, 0, 0)).save(path / "tall.png")
    Image.new("RGB", (160, 10), (0, 0, 255)).save(path / "wide.png")
    return path


def sample(folder, source="source.mp4", mask="mask.mp4", references=("tall.png", "wide.png"), **facts):
    control = Control(source and folder / source, mask and folder / mask, tuple(folder / name for name in references))
    return Sample("s", folder / "video.mp4", ("a cat",), control=control, **facts)


def test_the_guides_list(folder):
    full = {
        "video": "video.mp4",
        "cap": "a cat",
        "src_video": "source.mp4",
        "src_ref_images": ["tall.png", "wide.png"],
        "src_video_mask": "mask.mp4",
    }
    empty = {"src_video": None, "src_ref_images": None, "src_video_mask": None}
    records = [full, full | empty, {"video": "video.mp4", "cap": "x"}, {"path": "video.mp4", "cap": "x"}]
    (folder / "data.json").write_text(json.dumps(records))
    one, two, three, plain = read_manifest(folder / "data.json")
    assert one.control == sample(folder).control
    assert one.files == tuple(folder / name for name in ("video.mp4", "source.mp4", "mask.mp4", "tall.png", "wide.png"))
    assert two.control == three.control == Control()
    assert plain.control is None
    assert [s.id for s in (one, two, three)] == ["video.mp4", "video.mp4#2", "video.mp4#3"]
    for bad, message in [
        ({"video": "a", "path": "b"}, "sample 0: both path"),
        ({"path": "b", "src_video": "a"}, "name its video 'b' `video`"),
        ({"video": "a", "src_ref_images": [3]}, "src_ref_images is [3]"),
        ({"video": "a", "src_video": 3}, "src_video is 3"),
    ]:
        (folder / "bad.json").write_text(json.dumps([bad]))
        with pytest.raises(ValueError, match=re.escape(message)):
            read_manifest(folder / "bad.json")


def test_what_is_missing_is_named(folder):
    chosen = select(
        [sample(folder, references=("none.png",)), sample(folder, source=None), sample(folder, num_frames=1)],
        replace(VACE, min_frames=5),
    )
    assert chosen.counts == {"missing_file": 1, "mask_without_source": 1}
    assert "none.png is not there" in str(chosen)
    assert "name the video itself as src_video" in str(chosen)
    assert len(chosen.kept) == 1  # the annotation's claim of one frame is not relied on


def clip_of(frames, fps, height, width, **options):
    geometry = Geometry(**{"rule": "vace", "fps": 24, "max_area": 480 * 832} | options)
    return vace_clip(np.arange(frames) / fps, height, width, geometry)


def test_the_rule_by_the_numbers_of_the_original():
    chosen, size, fps = clip_of(81, 24, 480, 832, num_frames=17)
    assert (chosen.tolist(), size, fps) == ([*range(16), 17], (480, 832), pytest.approx(24))
    chosen, size, fps = clip_of(81, 24, 480, 832, num_frames=17, keep_last=True)
    assert (chosen.tolist(), size, fps) == (list(range(0, 81, 5)), (480, 832), pytest.approx(4.77, abs=0.01))
    assert len(clip_of(81, 24, 480, 832).frames) == 77
    assert clip_of(81, 24, 480, 832, keep_last=True).frames.tolist() == list(range(81))
    chosen, size, _ = clip_of(200, 30, 1280, 720)
    assert (len(chosen), size) == (81, (848, 464))
    assert chosen[:6].tolist() == [0, 1, 2, 3, 5, 6]
    assert chosen[-1] == 101
    assert len(clip_of(40, 24, 480, 832).frames) == 37


def test_the_rule_elsewhere():
    assert clip_of(81, 24, 720, 1280, max_area=720 * 1280).size == (720, 1280)
    assert clip_of(81, 24, 720, 1280, max_area=320 * 320).size == (240, 416)
    chosen, size, _ = clip_of(300, 24, 240, 416, num_frames=17)
    assert (len(chosen), size) == (77, (240, 416))  # 390 tokens a frame: of the budget of 5 x 1560, 20
    for frames in (1, 2, 3):
        for keep_last in (False, True):
            assert clip_of(frames, 24, 480, 832, keep_last=keep_last).frames.tolist() == [0]
    assert clip_of(81, 24, 16, 5000).size[0] == 16
    assert clip_of(81, 24, 5000, 16).size[1] == 16
    slow = clip_of(40, 8, 480, 832)  # its own rate
    assert (slow.fps, len(slow.frames), slow.frames[-1]) == (pytest.approx(8), 37, 37)
    with pytest.raises(Unfit, match="too_short: 40 frames give a clip of 37, min_frames=41"):
        clip_of(40, 24, 480, 832, min_frames=41)
    with pytest.raises(Unfit, match="less than one tile of stride 16"):
        clip_of(40, 24, 8, 832)
    with pytest.raises(Unfit, match="less than min_area=100000"):
        clip_of(40, 24, 240, 320, min_area=100_000)
    for options, message in [({"rule": "vase"}, "window or vace"), ({"keep_last": True}, "belongs to rule vace")]:
        with pytest.raises(ValueError, match=message):
            Geometry(**options)


def numbers(video):
    return [read_barcode(frame) for frame in to_uint8(video)]


@pytest.mark.parametrize("geometry", [VACE, WINDOW, replace(VACE, keep_last=True)], ids=["vace", "window", "keep_last"])
def test_source_and_mask_take_the_frames_of_the_video(folder, geometry):
    clip = VideoDataset([sample(folder)], geometry)[0]
    frames = clip["meta"]["frames"]
    assert numbers(clip["video"]) == numbers(clip["source"]) == frames
    assert max(frames) < 20  # the mask has no more
    assert len(frames) == 9
    assert clip["mask"].shape == (1, 9, 96, 144)
    assert 0 <= clip["mask"].min() <= clip["mask"].max() <= 1
    assert numbers(clip["mask"].expand(3, -1, -1, -1) * 2 - 1) == frames
    tall, wide = clip["references"]
    assert tall.shape == wide.shape == (3, 96, 144)
    assert (tall[:, :, [0, -1]] == 1).all()  # white on both sides
    assert torch.equal(tall[:, 48, 72], torch.tensor([1.0, -1.0, -1.0]))
    assert (wide[:, [0, -1]] == 1).all()
    assert torch.equal(wide[:, 48, 72], torch.tensor([-1.0, -1.0, 1.0]))
    plain = VideoDataset([replace(sample(folder), control=None)], geometry)[0]
    assert "source" not in plain
    if geometry == WINDOW:
        assert plain["video"].shape == clip["video"].shape


def test_one_picture_masks_all_frames(folder, tmp_path):
    """Whatever of it is transparent, and of another resolution than the video."""
    picture = np.zeros((48, 72, 4), np.uint8)
    picture[:, :36, :3] = 255
    picture[:24, :, 3] = 255
    Image.fromarray(picture).save(tmp_path / "half.png")
    Image.fromarray(picture[:, :48]).save(tmp_path / "square.png")
    clip = VideoDataset([sample(folder, mask=tmp_path / "half.png")], VACE)[0]
    assert clip["mask"].shape == (1, 9, 96, 144)
    assert (clip["mask"][..., :70] == 1).all()
    assert (clip["mask"][..., 74:] == 0).all()
    with pytest.raises(ValueError, match=r"shape_mismatch: \S*square.png is 48 x 48, \S*video.mp4 is 96 x 144"):
        VideoDataset([sample(folder, mask=tmp_path / "square.png")], VACE)[0]


def test_what_is_not_given(folder):
    nothing, followed = VideoDataset(
        [replace(sample(folder), control=Control()), sample(folder, mask=None, references=())], VACE
    )
    assert nothing["source"].shape == (3, 9, 96, 144)
    assert not nothing["source"].any()
    assert (nothing["mask"] == 1).all()
    assert nothing["references"] == followed["references"] == []
    assert (followed["mask"] == 1).all()
    assert numbers(followed["source"]) == followed["meta"]["frames"]


def test_portrait_clips_keep_their_middle(tmp_path):
    """MindSpeed-MM loses the rows below the width."""
    frames = np.zeros((5, 96, 48, 3), np.uint8)
    frames[:, 48:] = 255
    write_video(tmp_path / "a.mp4", frames, 24)
    clip = VideoDataset([Sample("a", tmp_path / "a.mp4", control=Control())], VACE)[0]
    height = clip["video"].shape[2]
    assert height > clip["video"].shape[3]
    assert (clip["video"][:, :, : height // 2 - 2] < -0.9).all()
    assert (clip["video"][:, :, height // 2 + 2 :] > 0.9).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "short.mp4"}, r"length_mismatch: \S*short.mp4 has 9 frames, \S*video.mp4 has 21"),
        ({"source": "square.mp4", "mask": None}, r"shape_mismatch: \S*square.mp4 is 48 x 48, \S*video.mp4 is 96 x 144"),
        ({"source": None}, "mask_without_source"),
        ({"references": ("video.mp4",)}, "video.mp4 is not a picture"),
        ({"source": "tall.png"}, "tall.png is a picture, not a video"),
        ({"mask": "short.mp4", "cut": (3, 12)}, r"short.mp4 has 9 frames: it cannot be cut to \[3, 12\)"),
    ],
)
def test_what_does_not_belong_together_is_refused(folder, change, message):
    failure = VideoDataset([sample(folder, **change)], VACE, on_error="return")[0]
    assert isinstance(failure, Failure)
    assert re.search(message, failure.reason)


def test_cuts_are_those_of_all_files(folder):
    clip = VideoDataset([sample(folder, cut=(8, 17))], WINDOW)[0]
    assert numbers(clip["video"]) == numbers(clip["source"]) == list(range(8, 17))


def test_a_task_without_control_reads_the_video_alone(folder):
    one = sample(folder)
    assert for_task([one], controls=True) == [one]
    (plain,) = for_task([one], controls=False)
    assert plain == replace(one, control=None)
    assert plain.files == (folder / "video.mp4",)
    (clip,) = VideoDataset([plain], WINDOW)
    assert not {"source", "mask", "references"} & clip.keys()


def test_plain_entries_keep_the_names_they_had_before_there_was_vace():
    assert content_key("ab" * 32, Geometry(), "enc", ("a cat", "b"), (0, 81), 3).startswith("8eb4e48307a0e2c2")
    fixed = Geometry(window="center", fps=16, dynamic=True)
    assert content_key("ab" * 32, fixed, "enc", ("a cat",)).startswith("ef180e1abdcbcba9")
    assert content_key("ab" * 32, VACE, "e", seed=1) == content_key("ab" * 32, VACE, "e", seed=2)  # draws nothing


def test_every_file_and_its_role_decides_the_entry(folder, tmp_path):
    for name in ("video.mp4", "source.mp4", "mask.mp4", "tall.png", "wide.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    store = FeatureCache(tmp_path / "store")
    keys = []

    def key(one):
        todo = store.find_work([one], VACE, "encoder")
        assert not todo.failed
        keys.append(todo.keys[one.id])
        return todo

    key(replace(sample(tmp_path), control=None))
    key(replace(sample(tmp_path), control=Control()))
    key(sample(tmp_path, mask=None, references=()))
    key(sample(tmp_path, source="mask.mp4", mask="source.mp4"))
    key(sample(tmp_path, references=("wide.png", "tall.png")))
    for changed in ("source.mp4", "mask.mp4", "wide.png"):
        key(sample(tmp_path))
        (tmp_path / changed).write_bytes((tmp_path / changed).read_bytes() + b"\0")
    todo = key(sample(tmp_path))
    assert len(set(keys)) == len(keys) == 9

    with store:  # a store remembers all files of an entry
        clip = VideoDataset(todo.to_encode, VACE)[0]
        store.put(todo.keys["s"], {"latents": torch.zeros(1), "text.0": torch.zeros(1, 1)}, clip["meta"])
    (known,) = FeatureCache(tmp_path / "store").find_work([sample(tmp_path)], VACE, "encoder").done
    assert known.contents == todo.to_encode[0].contents
    (tmp_path / "mask.mp4").write_bytes((folder / "mask.mp4").read_bytes())
    with pytest.raises(ValueError, match=r"mask\.mp4 was changed"):
        VideoDataset([known], VACE)[0]
    (tmp_path / "tall.png").unlink()
    assert "tall.png: No such file" in store.find_work([sample(tmp_path)], VACE, "encoder").failed[0][1]
