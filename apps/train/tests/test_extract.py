"""Extraction: what is written, what is skipped, what a second run does, and that ranks share the work."""

import json
import multiprocessing
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mm_data import FeatureDataset, VideoDataset, read_manifest, read_video, write_video
from mm_models import preset
from mm_models.encoders import ImageEncoder, TextEncoder
from mm_models.wan.encode import condition_video, fold_mask
from mm_models.wan.tasks import stored
from mm_models.wan.testing import write_encoders
from mm_models.wan.vae import WanVAE
from mm_parallel.testing import spawn
from mm_train import command
from mm_train.checks import Asked
from mm_train.checks.looks import check_features
from mm_train.encode import Encoders
from mm_train.extract import Data, ExtractConfig, Geometry, extract
from mm_train.recipe import load_config
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import as_torchrun


def write_clip(path: Path, seed: int, frames: int = 9, size: tuple[int, int] = (32, 48)) -> None:
    """Every frame one colour of its own."""
    colours = np.random.default_rng(seed).integers(0, 255, (frames, 1, 1, 3), dtype=np.uint8)
    write_video(path, colours.repeat(size[0], axis=1).repeat(size[1], axis=2), fps=8)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("encoders"), text_dim=64, image_dim=32)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Five clips in two folders, two with the same file name; one file is no video."""
    root = tmp_path_factory.mktemp("clips")
    entries = []
    for number, (folder, caption) in enumerate([("a", "one"), ("b", "two"), ("a", ["three", "drei"]), ("a", "four")]):
        name = "0.mp4" if number < 2 else f"{number}.mp4"
        (root / folder).mkdir(exist_ok=True)
        write_clip(root / folder / name, seed=number, frames=13 if number == 3 else 9)
        entries.append({"path": f"{folder}/{name}", "cap": caption})
    (root / "a/broken.mp4").write_bytes(b"not a video at all")
    entries.insert(2, {"path": "a/broken.mp4", "cap": "never seen"})
    (root / "data.json").write_text(json.dumps(entries))
    (root / "data.txt").write_text(f"{root},{root / 'data.json'}\n")
    return root / "data.txt"


def config(encoders: Path, manifest: Path, output: Path, **more) -> ExtractConfig:
    geometry = Geometry(num_frames=9, max_height=32, max_width=48)
    settings = {"model": "wan-tiny", "encoders": encoders, "output": output, "geometry": geometry}
    return ExtractConfig(**settings | {"data": Data(manifest, workers=0)} | more)


def everything(path: Path) -> dict[str, torch.Tensor]:
    data = FeatureDataset(path)
    found = {"": data.empty_text}
    for i in range(len(data)):
        item = data[i]
        found |= {f"{item['id']} latents": item["latents"]}
        found |= {f"{item['id']} text {k}": text for k, text in enumerate(item["text"])}
    return found


def ranks_extract(rank: int, world: int, settings: ExtractConfig) -> None:
    as_torchrun(rank, world)
    extract(settings)


def test_features_are_the_encoders_answers(encoders, manifest, tmp_path, capsys):
    assert extract(config(encoders, manifest, tmp_path / "f", dtype="float32")) == 1
    said = capsys.readouterr().err
    assert "a/broken.mp4" in said
    assert "4 of 5 samples" in said
    failures = [json.loads(line) for line in (tmp_path / "f/failures.jsonl").read_text().splitlines()]
    assert [f["id"] for f in failures] == ["a/broken.mp4"]

    data = FeatureDataset(tmp_path / "f")
    assert data.ids == ["a/0.mp4", "b/0.mp4", "a/2.mp4", "a/3.mp4"]
    text = TextEncoder(encoders, dtype=torch.float32)
    assert torch.equal(data[1]["text"][0], text.encode(["two"])[0])
    assert torch.equal(data[2]["text"][1], text.encode(["drei"])[0])
    assert torch.equal(data.empty_text, text.encode([""])[0])

    clip = VideoDataset(read_manifest(manifest)[:1], Geometry(num_frames=9, max_height=32, max_width=48))[0]
    assert torch.equal(data[0]["latents"], WanVAE(encoders).encode(clip["video"][None])[0])
    assert not torch.equal(data[0]["latents"], data[1]["latents"])  # same file name, other folder


def test_a_second_run_encodes_nothing_and_another_geometry_everything(encoders, manifest, tmp_path, capsys):
    extract(config(encoders, manifest, tmp_path / "f"))
    first = everything(tmp_path / "f")
    capsys.readouterr()
    extract(config(encoders, manifest, tmp_path / "f"))
    assert "4 in the store" in capsys.readouterr().err
    assert {k: v.tolist() for k, v in everything(tmp_path / "f").items()} == {k: v.tolist() for k, v in first.items()}
    other = Geometry(num_frames=5, max_height=32, max_width=48)
    extract(config(encoders, manifest, tmp_path / "f", geometry=other))
    assert "stale" in capsys.readouterr().err
    assert {tuple(s) for s in FeatureDataset(tmp_path / "f").buckets} == {(16, 2, 4, 6)}


def test_ranks_and_batches_give_the_same_store(encoders, manifest, tmp_path):
    extract(config(encoders, manifest, tmp_path / "one", dtype="float32"))
    spawn(2, ranks_extract, config(encoders, manifest, tmp_path / "two", dtype="float32", batch=2), timeout=120)
    one, two = everything(tmp_path / "one"), everything(tmp_path / "two")
    assert list(one) == list(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)


def ranks_train(rank: int, world: int, argv: list[str]) -> None:
    as_torchrun(rank, world)
    train(load_config(argv))


def test_what_was_extracted_trains_and_is_sampled_while_training(encoders, manifest, tmp_path):
    """…on one rank and on two, with the same videos."""
    extract(config(encoders, manifest, tmp_path / "f"))
    argv = ["--model", "wan-tiny", "--weights", "random", "--dtype", "float32", "--steps", "2", "--sample.every", "2"]
    argv += ["--data.features", str(tmp_path / "f"), "--data.global_batch", "2", "--optim.ema", "0.9"]
    argv += ["--sample.prompts", '["one", "two", "three"]', "--sample.encoders", str(encoders), "--sample.steps", "2"]
    argv += ["--sample.height", "32", "--sample.width", "48", "--sample.frames", "5", "--optim.lr", "3e-2"]
    argv += ["--optim.clip", "0"]  # a norm is a sum, whose rounding depends on the shards
    assert "\n" not in check_features(Asked(load_config(argv)))
    other = shutil.copytree(encoders, tmp_path / "other")
    with open(other / "vae/config.json", "a", encoding="utf-8") as file:
        file.write(" ")
    said = check_features(Asked(load_config([*argv, "--sample.encoders", str(other)])))
    assert re.search(
        r"\n--sample.encoders .*other are not those that made --data.features .*: vae/config.json was ", said
    )
    train(load_config([*argv, "--output", str(tmp_path / "one")]))
    spawn(2, ranks_train, [*argv, "--output", str(tmp_path / "two")], timeout=120)
    frames = {}
    for run in ("one", "two"):
        videos = sorted((tmp_path / run / "samples/step-00000002").glob("*.mp4"))
        assert [v.name for v in videos] == ["000.mp4", "001.mp4", "002.mp4"]
        frames[run] = np.stack([read_video(video).frames for video in videos]).astype(int)
    assert frames["one"].shape == (3, 5, 32, 48, 3)
    between_runs = np.abs(frames["one"] - frames["two"]).mean()  # rounding, which H.264 makes larger in places
    between_prompts = np.abs(frames["one"][0] - frames["one"][1]).mean()
    assert between_runs < 0.1 * between_prompts, (between_runs, between_prompts)


GEOMETRY = Geometry(num_frames=9, max_height=32, max_width=48)


def test_images_of_i2v_are_the_clips_own(encoders, manifest, tmp_path):
    """…its first frame, and for flf2v its last as well, cut like the clip."""
    extract(config(encoders, manifest, tmp_path / "f", model="wan-tiny-i2v"))
    data = FeatureDataset(tmp_path / "f")
    clip = VideoDataset(read_manifest(manifest)[:1], GEOMETRY)[0]["video"][None]
    vae, clip_encoder = WanVAE(encoders), ImageEncoder(encoders)
    first, last = clip[:, :, 0], clip[:, :, -1]
    assert set(data[0]["conditions"]) == {"condition", "image"}
    assert torch.equal(data[0]["conditions"]["condition"], vae.encode(condition_video(9, first))[0])
    assert torch.equal(data[0]["conditions"]["image"], clip_encoder.encode(first)[0])

    model = replace(preset("wan-tiny-i2v"), image_tokens=514)
    both = Encoders(encoders, model, "flf2v")
    features = both.encode([{"id": "", "video": clip[0], "captions": ("one",), "fps": 8, "meta": {}}])[0]
    assert torch.equal(features["condition_both"], vae.encode(condition_video(9, first, last))[0])
    assert torch.equal(features["image"], torch.cat([clip_encoder.encode(first)[0], clip_encoder.encode(last)[0]]))
    assert features["image"].shape[0] == stored(model, "flf2v")["image"]


def test_conditions_of_vace(encoders):
    """What is kept, what changes and the mask; every reference a latent frame of its own, before all of them."""
    vace = Encoders(encoders, preset("wan-tiny-vace"), "vace", dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(shape, generator=random) * 2 - 1  # noqa: E731
    video, source, references = draw(3, 9, 32, 48), draw(3, 9, 32, 48), [draw(3, 32, 48), draw(3, 32, 48)]
    mask = torch.full((1, 9, 32, 48), 0.4)  # less than half: kept, and yet folded as it is
    mask[..., 24:] = 1
    told = {"id": "", "video": video, "captions": ("one",), "fps": 8.0, "meta": {}}
    full, bare = vace.encode([told | {"source": source, "mask": mask, "references": references}, told])

    kept, changed = source.clone(), source.clone()
    kept[..., 24:], changed[..., :24] = 0, 0
    one = lambda image: vace.codec.encode(image[None])[0]  # noqa: E731
    close = lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # noqa: E731
    before = torch.cat([one(image[:, None]) for image in references], dim=1)
    close(full["latents"], torch.cat([before, one(video)], dim=1))
    close(full["control"][:, 2:], torch.cat([one(kept), one(changed)]))
    close(full["control"][:, :2], torch.cat([before, torch.zeros_like(before)]))
    assert full["control_mask"].dtype == torch.uint8
    assert not full["control_mask"][:, :2].any()
    assert torch.equal(full["control_mask"][:, 2:], (fold_mask(mask[None], 3)[0] * 255).round().byte())
    assert full["control_mask"].unique().tolist() == [0, 102, 255]

    grey = one(torch.zeros_like(video))
    close(bare["control"], torch.cat([grey, grey]))
    assert (bare["control_mask"] == 255).all()
    sizes = {name: bare[name].shape[0] for name in ("control", "control_mask")}
    assert sizes == stored(preset("wan-tiny-vace"), "vace")


def test_features_are_told_apart_by_task_where_they_differ(encoders):
    plain, from_image = preset("wan-tiny"), replace(preset("wan-tiny-i2v"), image_dim=None)
    pairs = [
        (plain, "t2v"),
        (plain, "ti2v"),
        (from_image, "i2v"),
        (from_image, "flf2v"),
        (preset("wan-tiny-i2v"), "i2v"),
    ]
    t2v, ti2v, *others = (Encoders(encoders, model, task).identity for model, task in pairs)
    assert t2v == ti2v == f"{WanVAE(encoders).identity} {TextEncoder(encoders).identity}"
    assert len({t2v, *others}) == 4


@pytest.mark.parametrize(("part", "name"), [("text", "text.0"), ("codec", "latents")])
def test_features_that_are_no_numbers_are_refused(encoders, part, name):
    broken = Encoders(encoders, preset("wan-tiny"), "t2v", dtype=torch.float32)
    module = broken.text.model if part == "text" else broken.codec.vae
    next(module.parameters()).data.fill_(torch.nan)
    clip = {"id": "a.mp4", "video": torch.zeros(3, 5, 32, 48), "captions": ("a cat",), "meta": {}}
    with pytest.raises(FloatingPointError, match=rf"a\.mp4: {name} came out as NaN or infinite: .* weights in"):
        broken.encode([clip])
    if part == "text":
        with pytest.raises(FloatingPointError, match="the empty prompt: text came out as NaN"):
            assert broken.empty_text is None


def test_sizes_suit_the_vae_of_the_model(tmp_path):
    """That of Wan2.2 5B packs 16x16 pixels, so a token is 32x32."""
    model = replace(preset("wan-tiny"), in_channels=48, out_channels=48)
    encoders = Encoders(write_encoders(tmp_path, text_dim=64, vae="wan2.2"), model, "ti2v")
    assert encoders.fit_geometry(Geometry(dynamic=True)).stride == 32
    with pytest.raises(ValueError, match=r"max_height=720 .* use 704 or 736 .* takes 32x32 pixels.* multiples of 32"):
        encoders.fit_geometry(Geometry(max_height=720, max_width=1280))


def test_a_manifest_of_which_nothing_is_left_is_an_error(encoders, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"path": "not/there.mp4", "cap": "a"}]))
    with pytest.raises(ValueError, match=r"not one sample .*failures\.jsonl"):
        extract(config(encoders, tmp_path / "data.json", tmp_path / "f"))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_that_is_left_out_stands_in_failures(encoders, tmp_path, workers):
    """…with its reason, whatever it is: none ends the run, and none is left out for what its annotation says alone."""
    write_clip(tmp_path / "good.mp4", seed=0)
    write_clip(tmp_path / "good.mp4#2", seed=1)
    (tmp_path / "unknown.mp4").write_bytes((tmp_path / "good.mp4").read_bytes().replace(b"avc1", b"zz~1"))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    sound = [
        {"path": "good.mp4", "cap": "believed", "num_frames": 0, "resolution": {"height": 1, "width": 1}},
        {"path": "good.mp4", "caption": "numbered", "num_frames": 9.0, "fps": float("nan")},
        {"path": "good.mp4#2", "text": "called as numbered"},
    ]
    odd = {
        "unknown.mp4": "unknown.mp4",
        "empty.mp4": "empty (0 bytes)",
        "folder": "is a folder",
        "pipe.mp4": "named pipe",
        "gone\x1b[2J.mp4": "is not there",
        "x" * 5000: "File name too long",
        "\0": "NUL",
    }
    dropped = [{"path": path, "cap": "x"} for path in odd]
    dropped += [{"path": "good.mp4", "cap": caption, "cut": cut} for caption, cut in ((None, [0, 9]), ("x", [0, 1]))]
    (tmp_path / "data.json").write_text(json.dumps(sound + dropped))
    geometry = Geometry(num_frames=9, min_frames=5, max_height=32, max_width=48)
    settings = config(encoders, tmp_path / "data.json", tmp_path / "f", geometry=geometry)
    assert extract(replace(settings, data=Data(tmp_path / "data.json", workers))) == len(dropped)
    assert FeatureDataset(tmp_path / "f").ids == ["good.mp4", "good.mp4#2", "good.mp4#2#2"]
    lines = [json.loads(line) for line in (tmp_path / "f/failures.jsonl").read_text().splitlines()]
    failures = {line["id"]: line["reason"] for line in lines}
    assert failures.keys() == odd.keys() | {"good.mp4[0:9]", "good.mp4[0:1]"}
    for path, reason in odd.items():
        assert reason in failures[path]
    assert failures["good.mp4[0:9]"].startswith("no_caption: ")
    assert failures["good.mp4[0:1]"].startswith("too_short: 1 frame, ")


def test_what_fails_of_encoding_ends_the_run(encoders, manifest, tmp_path, monkeypatch):
    """…and is no failure of a file."""

    def fail(self, video):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(WanVAE, "encode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        extract(replace(config(encoders, manifest, tmp_path / "f"), data=Data(manifest, workers=1)))
    assert not (tmp_path / "f/dataset.jsonl").exists()
    assert not multiprocessing.active_children()


def test_features_that_the_disk_cannot_hold_are_refused(encoders, manifest, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    with pytest.raises(ValueError, match=r"features of 5 clips take 0\.0 GiB or more \(4 were .* has 0\.0 GiB free"):
        extract(config(encoders, manifest, tmp_path / "f"))
    monkeypatch.undo()
    extract(config(encoders, manifest, tmp_path / "f"))


def test_a_name_that_is_too_long_is_said_in_words(encoders, manifest, tmp_path, capsys):
    asked = config(encoders, manifest, tmp_path / "f", data=Data(tmp_path / ("x" * 300)))
    with pytest.raises(SystemExit) as stop:
        command.run(asked.check, lambda _: None)
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("x")) == (2, 40), said
    assert "is a name of 300 bytes, and a file's has at most 255" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "wan-small"}, "wan-tiny"),
        ({"encoders": Path("nowhere")}, "nowhere"),
        ({"batch": 0}, "at least 1"),
        ({"model": "wan2.1-t2v-1.3b"}, "text width 64 instead of 4096"),
        ({"model": "wan2.1-i2v-14b-480p"}, "CLIP width 32 instead of 1280"),
        ({"model": "wan2.2-ti2v-5b"}, "video channels 16 instead of 48"),
        ({"model": "wan-tiny-vace", "task": "t2v"}, "--task t2v: wan-tiny-vace can be trained for vace"),
        ({"task": "i2v"}, "wan-tiny can be trained for t2v, ti2v"),
    ],
)
def test_what_cannot_work_is_said(encoders, manifest, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        extract(replace(config(encoders, manifest, tmp_path / "f"), **change))


def test_what_videos_lose_is_said_also_where_they_are_in_the_store(encoders, tmp_path, capsys):
    with av.open(str(tmp_path / "old.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"x264-params": "tff=1"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.color_trc = 16
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame(48, 32, "yuv420p")))
        container.mux(stream.encode())
    (tmp_path / "data.json").write_text('[{"path": "old.mp4", "cap": "a cat"}]')
    for _ in range(2):
        assert extract(config(encoders, tmp_path / "data.json", tmp_path / "out")) == 0
        said = capsys.readouterr().err
        assert "note: HDR (PQ): 1 sample, e.g. old.mp4: their colours are taken as they are stored" in said
        assert "note: interlaced: 1 sample, e.g. old.mp4: a frame holds two moments" in said
