"""Files of the same names and times that hold something else: on another rank, or when a run is continued."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

import mm_train.__main__ as training
import mm_train.extract as extracting
from mm_models.wan.testing import write_encoders
from mm_parallel.guard import join
from mm_parallel.testing import launch
from mm_train.export import export
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import arguments, config, rows, write_features
from test_extract import write_clip


def change(folder: Path) -> str:
    """Another number in a file of tensors, at the same time stamp; returns its name."""
    file = max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    time = file.stat().st_mtime_ns
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(time, time))
    return file.name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    return train(config(write_features(root / "features"), root / "run", "--steps", "1"))


@pytest.mark.parametrize("what", ["data.features", "validation.features", "weights"])
def test_a_run_is_not_continued_on_other_contents_unasked(base, tmp_path, capfd, what):
    places = {name: tmp_path / name for name in ("data.features", "validation.features", "weights")}
    write_features(places["data.features"])
    write_features(places["validation.features"], count=3)
    shutil.copytree(base, places["weights"])
    more = ("--weights", str(places["weights"]), "--lora.rank", "2", "--lora.targets", '["q"]')
    more += ("--validation.features", str(places["validation.features"]))
    run = partial(config, places["data.features"], tmp_path / "run", *more)
    train(run("--steps", "1"))
    train(run("--steps", "2"))  # nothing has changed
    name = change(places[what])
    with pytest.raises(ValueError, match=rf"other contents of --{what}: .*{name} was .*--checkpoint\.resume changed"):
        train(run("--steps", "3"))
    capfd.readouterr()
    train(run("--steps", "3", "--checkpoint.resume", "changed"))
    assert f"contents of {what}: " in capfd.readouterr().err
    train(run("--steps", "4"))  # the new contents are the run's by now
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


def test_weights_that_are_not_read_again_may_go(base, tmp_path):
    features, weights = write_features(tmp_path / "features"), shutil.copytree(base, tmp_path / "weights")
    train(config(features, tmp_path / "run", "--weights", str(weights), "--steps", "1"))
    change(weights)
    train(config(features, tmp_path / "run", "--weights", str(weights), "--steps", "2"))


def test_what_was_not_trained_is_not_exported_from_another_base(base, tmp_path):
    features, weights = write_features(tmp_path / "features"), shutil.copytree(base, tmp_path / "weights")
    train(config(features, tmp_path / "run", "--weights", str(weights), "--trained", '["head.*"]', "--steps", "1"))
    name = change(weights)
    with pytest.raises(ValueError, match=rf"other contents of --weights .*{name} was .*: put the old files back"):
        export(tmp_path / "run", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def from_own_disk(rank: int, main: object, argv: list[str], disks: Path) -> None:
    from mm_train import extraction, run

    run.join = extraction.join = partial(join, interval=0.2, silence=2)
    os.chdir(disks / str(rank))
    main(argv)


@pytest.mark.parametrize("what", ["data.features", "validation.features", "weights"])
def test_ranks_that_see_other_contents_are_named(base, tmp_path, what):
    write_features(tmp_path / "0" / "data.features")
    write_features(tmp_path / "0" / "validation.features", count=3)
    shutil.copytree(base, tmp_path / "0" / "weights")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    name = change(tmp_path / "1" / what)
    argv = arguments(Path("data.features"), tmp_path / "run", "--weights", "weights")
    argv += ["--validation.features", "validation.features", "--parallel.dp_shard", "2"]
    for end in launch(2, from_own_disk, training.main, argv, tmp_path):
        assert end.code in (1, 2)
        assert f"what is read differs between ranks: --{what} " in end.said
        assert f"{name} is " in end.said
        assert "on rank 1: copy the files from one host to the others" in end.said


@pytest.mark.parametrize("what", ["manifest", "vae"])
def test_ranks_that_would_extract_other_features_are_named(tmp_path, what):
    for rank in (0, 1):
        disk = tmp_path / str(rank)
        write_encoders(disk / "encoders", text_dim=64, image_dim=32)
        for i in range(2):
            write_clip(disk / f"{i}.mp4", seed=i)
        caption = "another" if rank and what == "manifest" else "one"
        samples = [{"path": f"{i}.mp4", "cap": caption} for i in range(2)]
        (disk / "data.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    if what == "vae":
        change(tmp_path / "1" / "encoders" / "vae")
    flags = {"model": "wan-tiny", "encoders": "encoders", "output": tmp_path / "out", "data.manifest": "data.jsonl"}
    flags |= {"data.workers": 0, "geometry.num_frames": 9, "geometry.max_height": 32, "geometry.max_width": 48}
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    for end in launch(2, from_own_disk, extracting.main, argv, tmp_path):
        assert end.code in (1, 2)
        said = {"manifest": "the samples of --data.manifest differs", "vae": "what is read differs"}
        assert f"{said[what]} between ranks: " in end.said
        assert {"manifest": "0.mp4 is (('one',), ", "vae": "--encoders vae/"}[what] in end.said
