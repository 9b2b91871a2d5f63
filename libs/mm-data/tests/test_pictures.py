"""Pictures in a list are clips of one frame: chosen, decoded, stored and batched beside videos."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mm_data import (
    ClipDataset,
    Failure,
    FeatureCache,
    FeatureDataset,
    Geometry,
    Sample,
    VideoDataset,
    build_loader,
    crop_to,
    decode,
    read_image,
    read_manifest,
    select,
)
from mm_data.images import read_size
from mm_data.video import probe_picture, read_video

sys.path.insert(0, str(Path(__file__).parent))
from barcode_clips import write_clip

GEOMETRY = Geometry(num_frames=9, min_frames=9, fps=24, max_height=48, max_width=64, min_area=0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Three pictures, of which the list says more or less, a video that suits and one that is too short."""
    folder = tmp_path_factory.mktemp("mixed")
    noise = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    Image.fromarray(noise).save(folder / "b.jpg")
    Image.fromarray(noise[:, :64]).save(folder / "c", format="webp", lossless=True)
    write_clip(folder / "long.mp4", 30)
    write_clip(folder / "short.mp4", 5)
    resolution = {"height": 60, "width": 100}
    records = [
        {"path": "a.png", "cap": ["a"], "resolution": resolution},
        {"path": "long.mp4", "cap": "long"},
        {"path": "b.jpg", "cap": "b", "resolution": resolution, "num_frames": 1, "fps": 0},
        {"path": "c", "cap": "c", "num_frames": 1},
        {"path": "short.mp4", "cap": "short", "num_frames": 5},
    ]
    (folder / "annotation.json").write_text(json.dumps(records))
    return folder


def test_no_length_is_asked_of_a_picture(manifest):
    chosen = select(read_manifest(manifest), GEOMETRY)
    assert [sample.id for sample in chosen.kept] == ["a.png", "long.mp4", "b.jpg", "c"]
    assert chosen.counts == {"too_short": 1}
    assert "kept as clips of one frame, being pictures: 2" in str(chosen)  # as far as names say
    longer = select(read_manifest(manifest), replace(GEOMETRY, num_frames=13))
    assert "a.png" not in longer.short
    assert "b.jpg" not in longer.short


def test_a_picture_is_dropped_for_its_size_as_a_video_is(manifest):
    samples = read_manifest(manifest)
    assert select(samples[:1], replace(GEOMETRY, max_aspect=1.2)).counts == {"aspect_mismatch": 1}
    assert select(samples[:1], replace(GEOMETRY, min_area=6001)).counts == {"resolution_too_small": 1}
    assert select(samples[:1], replace(GEOMETRY, min_area=6000)).counts == {}
    lied = replace(samples[0], height=6, width=10)  # the file is asked, and believed
    assert select([lied], replace(GEOMETRY, min_area=6000)).kept[0].height == 60


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_is_cut_as_a_frame_is(manifest, workers):
    kept = select(read_manifest(manifest), GEOMETRY).kept
    dataset = VideoDataset(kept, GEOMETRY)
    for clip in decode(dataset, range(len(kept)), workers=workers):
        if clip["id"] == "long.mp4":
            assert clip["video"].shape == (3, 9, 48, 64)
            continue
        assert clip["video"].shape == (3, 1, 48, 64)
        assert torch.equal(clip["video"][:, 0], crop_to(read_image(manifest / clip["id"]), (48, 64)))
        assert clip["meta"]["frames"] == [0]


def latent_shape(frames, height, width):
    return 3, 1 + (frames - 1) // 4, height // 8, width // 8


def test_pictures_are_a_bucket_of_their_own_also_where_it_is_smaller_than_a_step(manifest, tmp_path):
    kept = select(read_manifest(manifest), GEOMETRY).kept
    clips = ClipDataset(kept, GEOMETRY, latent_shape=latent_shape, path=manifest)
    assert clips.buckets == [(3, 1, 6, 8), (3, 3, 6, 8), (3, 1, 6, 8), (3, 1, 6, 8)]
    assert str(manifest / "annotation.json") in clips.files
    assert all(file.is_file() for file in clips.files.values())
    with FeatureCache(tmp_path) as cache:
        todo = cache.find_work(kept, GEOMETRY, "encoder")
        for clip in VideoDataset(todo.to_encode, GEOMETRY):
            latents = clip["video"][:, ::4, ::8, ::8]
            cache.put(todo.keys[clip["id"]], {"latents": latents, "text.0": torch.ones(1, 4)}, clip["meta"])
        cache.finish(todo)
    features = FeatureDataset(tmp_path)
    assert (features.ids, features.buckets) == (clips.ids, clips.buckets)
    options = {"global_batch": 4, "small_buckets": "repeat"}
    both, seen = zip(build_loader(features, **options), build_loader(clips, **options), strict=True), set()
    for step, raw in itertools.islice(both, 6):
        shapes = {clip["video"].shape for batch in raw.micro for clip in batch.clips}
        assert len(shapes) == 1
        seen |= shapes
        assert [batch.ids for batch in step.micro] == [batch.ids for batch in raw.micro]
    assert seen == {(3, 1, 48, 64), (3, 9, 48, 64)}
    (step,) = itertools.islice(build_loader(features, global_batch=3, small_buckets="drop"), 1)
    assert {name for batch in step.micro for name in batch.ids} == {"a.png", "b.jpg", "c"}


@pytest.mark.parametrize("rule", ["window", "vace"])
def test_both_rules_and_dynamic_sizes_take_pictures(manifest, rule):
    geometry = Geometry(num_frames=9, min_frames=5, max_height=48, max_width=64, dynamic=True, min_area=0, rule=rule)
    (clip,) = VideoDataset([Sample("a", manifest / "a.png", ("a",))], geometry)
    assert clip["video"].shape[:2] == (3, 1)
    height, width = clip["video"].shape[2:]
    assert height * width <= 48 * 64
    assert height < width


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_tells_the_size_that_reading_gives(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.webp", "a.jpg", "a.tif"):
        Image.new("RGB", (30, 20)).save(tmp_path / name, exif=exif)
        assert read_size(tmp_path / name) == read_image(tmp_path / name).shape[:2]
        info = probe_picture(tmp_path / name)
        assert read_video(info).frames.shape == (1, info.height, info.width, 3)
        assert read_video(info, grey=True).frames.shape == (1, info.height, info.width, 1)


def test_what_is_wrong_with_a_picture_is_its_reason(manifest, tmp_path):
    (tmp_path / "cut.png").write_bytes((manifest / "a.png").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("no picture")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moves.webp", save_all=True, append_images=frames[1:])
    samples = [Sample(path.name, path, ("x",)) for path in sorted(tmp_path.iterdir())]
    samples.append(Sample("cut", manifest / "a.png", ("x",), cut=(0, 65)))
    made = VideoDataset(samples, GEOMETRY, on_error="return")
    reasons = {one.sample.id: one.reason for one in made if isinstance(one, Failure)}
    assert "cannot be read as a picture" in reasons["cut.png"]
    assert "text.jpg is not a picture of a known kind" in reasons["text.jpg"]
    assert "moves.webp holds 2 pictures" in reasons["moves.webp"]
    assert "a.png has 1 frame: it cannot be cut to [0, 65)" in reasons["cut"]
    with pytest.raises(ValueError, match=r"sample cut: .* has 1 frame"):
        VideoDataset(samples[-1:], GEOMETRY)[0]


def test_an_animated_png_is_a_video(tmp_path):
    frames = [Image.new("RGB", (64, 48), (20 * n, 0, 0)) for n in range(9)]
    frames[0].save(tmp_path / "moves.png", save_all=True, append_images=frames[1:], duration=40)
    (clip,) = VideoDataset([Sample("moves", tmp_path / "moves.png", ("x",))], GEOMETRY)
    assert clip["video"].shape == (3, 9, 48, 64)
