"""Folders of clips and pictures with texts beside them, and sets of them: extracted, trained on, looked at."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm_data import FeatureDataset, Geometry, write_video
from mm_models.opensoraplan.testing import write_encoders as write_opensoraplan
from mm_models.wan.testing import write_encoders as write_wan
from mm_train.checks import CHECKS, Asked, check
from mm_train.extract import Data, ExtractConfig, extract
from mm_train.recipe import load_config
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import losses, rows

GEOMETRY = Geometry(num_frames=5, max_height=32, max_width=48)
SMALL = {"dim": 72, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_dim": 64}  # suits both
SETS = """
[[set]]
path = "media/clips"
repeats = 2
sizes = [[32, 48], [48, 32]]
caption_prefix = "sks, "

[[set]]
path = "media/stills"
weight = 0.2
"""
ONLINE = [f"--data.geometry.{name}={getattr(GEOMETRY, name)}" for name in ("num_frames", "max_height", "max_width")]


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """Two clips, a file that is none, two pictures, each with its text; sets of them."""
    top = tmp_path_factory.mktemp("sets")
    noise = np.random.default_rng(0)
    for folder in ("clips", "stills"):
        (top / "media" / folder).mkdir(parents=True)
    for name in ("a.mp4", "b.MP4"):
        colours = noise.integers(0, 255, (9, 1, 1, 3), dtype=np.uint8)
        write_video(top / "media/clips" / name.lower(), colours.repeat(40, axis=1).repeat(40, axis=2), fps=8)
        (top / "media/clips" / name.lower()).rename(top / "media/clips" / name)
    (top / "media/clips/bad.mp4").write_bytes(b"no video")
    for name in ("c.jpg", "d.png"):
        Image.fromarray(noise.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(top / "media/stills" / name)
    for path in [*top.glob("media/*/*")]:
        path.with_suffix(".txt").write_text(path.stem)
    (top / "sets.toml").write_text(SETS)
    return top


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("encoders"), text_dim=64, image_dim=32)


def extract_to(output: Path, manifest: Path, encoders: Path, model: str = "wan-tiny", **how) -> FeatureDataset:
    data = Data(manifest, workers=0)
    extract(ExtractConfig(model, encoders, output, data, geometry=GEOMETRY, dtype="float32", **how))
    return FeatureDataset(output)


def asked(output: Path, *more: str, model: str = "wan-tiny", steps: int = 5) -> list[str]:
    run = [
        "--model",
        model,
        "--weights",
        "random",
        "--dtype",
        "float32",
        "--steps",
        str(steps),
        "--output",
        str(output),
    ]
    return [*run, "--architecture", json.dumps(SMALL), "--optim.lr", "1e-2", "--data.global_batch", "2", *more]


def online(manifest: Path, encoders: Path) -> list[str]:
    return ["--data.manifest", str(manifest), "--data.encoders", str(encoders), *ONLINE]


IDS = [f"media/clips/{name}@{size}" for name in ("a.mp4", "b.MP4") for size in ("32x48", "48x32")]
IDS += ["media/stills/c.jpg", "media/stills/d.png"]


@pytest.fixture(scope="module")
def features(top, encoders, tmp_path_factory):
    return extract_to(tmp_path_factory.mktemp("features"), top / "sets.toml", encoders)


def test_sets_are_extracted_and_trained_on_alike(top, encoders, features, tmp_path, capsys):
    assert features.ids == IDS
    assert [shape[1] for shape in features.buckets] == [2] * 4 + [1] * 2
    kept = json.loads((features.path / "sets.json").read_text())
    sizes = {"2x4x6": 2, "2x6x4": 2}
    assert kept == [
        {"set": "media/clips", "samples": 4, "times": 2.0, "share": 0.8, "shapes": sizes, "left_out": 2},
        {"set": "media/stills", "samples": 2, "times": 1.0, "share": 0.2, "shapes": {"1x4x6": 2}, "left_out": 0},
    ]
    failures = [json.loads(line)["id"] for line in (features.path / "failures.jsonl").read_text().splitlines()]
    assert failures == ["media/clips/bad.mp4@32x48", "media/clips/bad.mp4@48x32"]  # once for each size

    stored = ["--data.features", str(features.path)]
    train(load_config(asked(tmp_path / "stored", *stored)))
    said = capsys.readouterr().err
    assert "data       6 samples in 3 shapes, shown 10 times in an epoch" in said
    table = [line.strip() for line in said.splitlines() if line.strip().startswith(("set ", "media/"))]
    assert table == [
        "set           samples  each  of an epoch  latents of frames x rows x columns",
        "media/clips         4    x2        80.0%  2x4x6: 2, 2x6x4: 2",
        "media/stills        2    x1        20.0%  1x4x6: 2",
    ]
    raw = online(top / "sets.toml", encoders)
    train(load_config(asked(tmp_path / "raw", *raw, steps=2)))
    train(load_config(asked(tmp_path / "raw", *raw)))  # continued
    assert losses(tmp_path / "raw") == losses(tmp_path / "stored")
    assert "media/clips         4         2    x2        80.0%  5x32x48: 2, 5x48x32: 2" in capsys.readouterr().err
    kept = json.loads((tmp_path / "raw/sets.json").read_text())
    assert [one["left_out"] for one in kept] == [2, 0]

    # Repeats are a part of the stream: with others this would be another run.
    other = top / "other.toml"
    other.write_text(SETS.replace("repeats = 2", "repeats = 3"))
    with pytest.raises(ValueError, match=r"the samples of --data\.manifest .*other\.toml have changed since this run"):
        train(load_config(asked(tmp_path / "raw", *online(other, encoders), steps=6)))


def test_sets_of_features_are_trained_on_and_what_is_held_out_is_compared(features, tmp_path, capsys):
    """Another size of a clip that is trained is not held out."""
    (tmp_path / "features.toml").write_text(f'[[set]]\npath = "{features.path}"\nrepeats = 2')
    argv = asked(tmp_path / "run", "--data.features", str(tmp_path / "features.toml"), steps=2)
    argv += ["--validation.features", str(features.path), "--validation.every", "2"]
    train(load_config(argv))
    said = capsys.readouterr().err
    assert "6 samples in 3 shapes, shown 20 times in an epoch" in said
    assert f"6 of the samples of --validation.features {features.path}, e.g. media/clips/a.mp4@32x48, are of f" in said
    assert any("validation_loss" in row for row in rows(tmp_path / "run"))


def test_a_folder_is_trained_on_as_it_is(top, tmp_path, capsys):
    """Clips and pictures, each in a bucket of its own; by a model of the other family."""
    encoders = write_opensoraplan(tmp_path / "encoders", text_dim=64)
    argv = asked(tmp_path / "run", *online(top / "media", encoders), model="opensoraplan-tiny", steps=4)
    train(load_config(argv))
    said = capsys.readouterr().err
    assert "4 of 5 samples of" in said
    assert "5x32x48: 2, 1x32x48: 2" in said
    assert len(losses(tmp_path / "run")) == 4
    saw = [one.run(Asked(load_config(argv))) for one in CHECKS if one.name in ("data", "sample", "batches")]
    assert any("5 samples are listed, 2 a step: an epoch is about 2 steps" in text for text in saw)


def test_captions_that_are_missing_are_given_or_refused(top, encoders, tmp_path, capsys):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/a.jpg").write_bytes((top / "media/stills/c.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"1 of 1 clip or picture has no caption, e\.g\. a\.jpg: write it into a\.txt"):
        train(load_config(asked(tmp_path / "run", *online(tmp_path / "media", encoders))))
    argv = asked(tmp_path / "run", *online(tmp_path / "media", encoders), "--data.caption", "", steps=1)
    train(load_config([*argv, "--data.text_dropout", "0"]))
    assert "1 file has no text, e.g. a.jpg: '' is taken as the caption" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--data\.caption is for --data\.manifest"):
        check(load_config(asked(tmp_path / "other", "--data.features", str(tmp_path), "--data.caption", "x")))
    (tmp_path / "sets.toml").write_text('[[set]]\npath = "media"\nrepeat = 2')
    with pytest.raises(
        ValueError, match=r"--data\.manifest .*sets\.toml, set 1 \('media'\): unknown key 'repeat', did "
    ):
        check(load_config(asked(tmp_path / "other", *online(tmp_path / "sets.toml", encoders))))


def test_a_task_that_needs_more_frames_leaves_pictures_out_by_name(top, encoders, features, tmp_path, capsys):
    """Features of a task that does not are refused; extracting again encodes nothing."""
    with pytest.raises(ValueError, match=r"2 of 6 samples, e\.g\. .*c\.jpg, are of one frame, and task ti2v needs 5"):
        check(
            load_config(asked(tmp_path, "--data.features", str(features.path), "--objective.task", "ti2v")),
            "with torch",
        )
    (tmp_path / "again").mkdir()
    (tmp_path / "again/shards").symlink_to(features.path / "shards")
    again = extract_to(tmp_path / "again", top / "sets.toml", encoders, task="ti2v")
    assert again.ids == IDS[:4]
    said = capsys.readouterr().err
    assert "task ti2v needs clips of at least 5 frames: pictures and shorter ones are left out" in said
    assert ": 4 in the store, 2 to encode, 0 repeated" in said  # what is no video is tried again, in both sizes
    reasons = [json.loads(line)["reason"] for line in (again.path / "failures.jsonl").read_text().splitlines()]
    assert (
        sum(reason.endswith("is a picture, which is one frame, and least_frames=5 are needed") for reason in reasons)
        == 2
    )
