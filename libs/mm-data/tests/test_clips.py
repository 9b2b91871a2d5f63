"""Raw clips stand in for features: the same samples in the same order, with the same frames and captions."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mm_data import (
    Captions,
    ClipDataset,
    Control,
    Failure,
    FeatureCache,
    FeatureDataset,
    Geometry,
    Sample,
    VideoDataset,
    build_loader,
    survey,
)

sys.path.insert(0, str(Path(__file__).parent))
from barcode_clips import write_clip

GEOMETRY = Geometry(num_frames=9, max_height=48, max_width=80, dynamic=True, min_area=0, max_aspect=3)
SEED = 5
CAPTIONS = Captions(seed=3, dropout=0.3)


def latent_shape(frames, height, width):
    return 3, 1 + (frames - 1) // 4, height // 8, width // 8


def encode(clip):
    """A stand-in for the VAE: some pixels of some frames."""
    references = [reference[:, None, ::8, ::8] for reference in clip.get("references", [])]
    return torch.cat([*references, clip["video"][:, ::4, ::8, ::8]], dim=1)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Seven videos in three shapes, a copy, one cut off, one of VACE, one whose reference is no picture."""
    folder = tmp_path_factory.mktemp("videos")
    made = []
    for n in range(7):
        path = write_clip(folder / f"{n}.mp4", 20 + 5 * n, size=(48, 80) if n % 3 else (80, 48))
        made.append(Sample(path.name, path, tuple(f"{n}, caption {c}" for c in range(1 + n % 3)), num_frames=99))
    write_clip(folder / "short.mp4", 7)
    (folder / "broken.mp4").write_bytes((folder / "6.mp4").read_bytes()[:2000])
    Image.new("RGB", (60, 20), (255, 0, 0)).save(folder / "red.png")
    red, text = Control(references=(folder / "red.png",)), Control(references=(folder / "0.mp4",))
    made.insert(2, Sample("broken", folder / "broken.mp4", ("broken",)))
    made += [
        Sample("copy", folder / "1.mp4", made[1].captions),
        Sample("short", folder / "short.mp4", ("short",)),
        Sample("vace", folder / "short.mp4", ("vace",), control=red),
        Sample("no picture", folder / "short.mp4", ("x",), control=text),
    ]
    return made


@pytest.fixture(scope="module")
def features(samples, tmp_path_factory):
    path = tmp_path_factory.mktemp("features")
    with FeatureCache(path) as cache:
        todo = cache.find_work(samples, GEOMETRY, "encoder", SEED)
        for clip in VideoDataset(todo.to_encode, GEOMETRY, SEED, on_error="return"):
            if isinstance(clip, Failure):
                cache.fail(clip.sample.id, clip.reason)
                continue
            texts = {f"text.{i}": _code(caption) for i, caption in enumerate(clip["captions"])}
            cache.put(todo.keys[clip["id"]], {"latents": encode(clip)} | texts, clip["meta"])
        cache.put_empty_text(_code(""), "encoder")
        cache.finish(todo)
    return FeatureDataset(path, CAPTIONS)


def _code(caption):
    """1 16: a caption as numbers."""
    return torch.tensor([list(caption.encode().ljust(16))], dtype=torch.float32)


@pytest.fixture(scope="module")
def clips(samples):
    return ClipDataset(samples, GEOMETRY, SEED, latent_shape=latent_shape, path="data.json", captions=CAPTIONS)


def test_ids_and_shapes_are_those_of_a_finished_extraction(samples, features, clips):
    assert clips.ids == features.ids
    assert clips.buckets == features.buckets
    assert len(set(clips.buckets)) == 3
    assert len(clips) == len(samples) - 2
    reasons = {sample.id: reason for sample, reason in clips.unusable}
    assert set(reasons) == {"broken", "no picture"}
    assert "broken.mp4 is cut off" in reasons["broken"]
    assert "0.mp4 is not a picture" in reasons["no picture"]
    failed = FeatureCache(features.path).failures()
    assert failed == reasons


@pytest.mark.parametrize(("dp_size", "micro", "workers"), [(1, 4, 0), (2, 1, 2), (1, 2, 3)])
def test_the_stream_is_the_same(features, clips, dp_size, micro, workers):
    for rank in range(dp_size):
        options = {"global_batch": 4, "micro_batch": micro, "dp_rank": rank, "dp_size": dp_size, "seed": 3}
        options |= {"cursor": 8, "num_workers": workers, "small_buckets": "repeat"}
        both = zip(build_loader(features, **options), build_loader(clips, **options), strict=True)
        dropped = 0
        for stored, raw in itertools.islice(both, 8):
            assert (stored.index, stored.cursor_after) == (raw.index, raw.cursor_after)
            for one, other in zip(stored.micro, raw.micro, strict=True):
                assert (one.ids, one.epochs) == (other.ids, other.epochs)
                assert torch.equal(one.tensors["text"], torch.stack([_code(caption) for caption in other.captions]))
                assert torch.equal(one.tensors["latents"], torch.stack([encode(clip) for clip in other.clips]))
                dropped += other.captions.count("")
        assert 0 < dropped < 20


def test_ranks_can_share_the_survey(samples, clips):
    told = []
    found = [shape for part in (samples[:4], samples[4:]) for shape in survey(part, GEOMETRY, progress=told.append)]
    assert told == [1, 2, 3, 4, *range(1, len(samples) - 3)]
    joined = ClipDataset(samples, GEOMETRY, SEED, latent_shape=latent_shape, path="data.json", found=found)
    assert joined.clip_shapes == clips.clip_shapes
    assert joined.ids == clips.ids
    with pytest.raises(ValueError, match=r"data\.json: none of its 1 samples can be used, e\.g\. broken: .*cut off"):
        ClipDataset(samples[2:3], GEOMETRY, latent_shape=latent_shape, path="data.json")


def test_a_video_changed_or_damaged_since_is_an_error_at_its_step(samples, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(samples[1].path.read_bytes())
    dataset = ClipDataset([Sample("a", path, ("x",))], GEOMETRY, latent_shape=latent_shape, path="data.json")
    steps = iter(build_loader(dataset, global_batch=1))
    write_clip(path, 7)
    with pytest.raises(ValueError, match="sample a was changed"):
        list(itertools.islice(steps, 8))
    path.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"sample a: .*a\.mp4"):
        next(iter(build_loader(dataset, global_batch=1)))


def test_captions_are_needed(samples):
    def silent(dropout):
        sample, captions = Sample("a", samples[0].path), Captions(dropout=dropout)
        found = [(9, 80, 48, 0)]
        return ClipDataset(
            [sample], GEOMETRY, latent_shape=latent_shape, path="data.json", captions=captions, found=found
        )

    with pytest.raises(ValueError, match=r"data\.json: sample a has no caption"):
        silent(0.5)
    (step,) = itertools.islice(build_loader(silent(1), global_batch=1), 1)
    assert step.micro[0].captions == [""]
