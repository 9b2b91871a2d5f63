"""A training run and an export are killed before every change that they make to the file system, and run again."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from mm_convert.testing.kills import Scenario, kill_everywhere
from mm_parallel.testing import spawn
from mm_train.checkpoint import is_full
from mm_train.recipe import load_config
from mm_train.resume import latest
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import SMALL, arguments, as_torchrun, config, rows, write_features


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "store")


def names(folder: Path) -> set[str]:
    """What is there, but for the files of TensorBoard, of which every start makes one."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "tfevents" not in p.name}


def weights(folder: Path) -> bytes:
    return (folder / "model-00001-of-00001.safetensors").read_bytes()


@pytest.mark.long
def test_killed_before_any_change_and_given_again_a_run_ends_whole(features, tmp_path):
    small = ["--data.global_batch", "2", "--steps", "2", "--checkpoint.every", "1", "--checkpoint.keep", "1"]
    small += ["--architecture", json.dumps(SMALL | {"num_layers": 1})]
    small += ["--sample.encoders", "编码器"]  # stands in the configuration of every checkpoint
    train(config(features, tmp_path / "done/run", *small))
    (tmp_path / "empty").mkdir()
    trained = Scenario(
        "mm_train.__main__:main",
        arguments(features, Path("run"), *small),
        str(tmp_path / "empty"),
        ignored="tfevents",
        warm="mm_train.recipe:load_config",
    )
    exported = Scenario(
        "mm_train.export:main", ["run", "--output", "run/weights", "--overwrite"], str(tmp_path / "done")
    )
    runs, exports = kill_everywhere(
        [trained, exported], tmp_path / "work", ["mm_train", "mm_models", "mm_convert", "torch", "einops"]
    )
    assert len(runs.kills) > 40
    assert len(exports.kills) > 12
    whole = {"config.toml", "progress.json", ".metadata", "__0_0.distcp"}
    for kill in runs.kills + exports.kills:
        at, run = f"killed before {kill.change}", kill.killed / "run"
        for checkpoint in run.glob("checkpoints/step-*"):
            assert names(checkpoint) == whole, at
        latest(run / "checkpoints")  # names one that is there
        if (run / "weights").exists():
            assert weights(run / "weights") == weights(tmp_path / "done/run/weights"), at
        assert kill.code == 0, f"{at}\n{kill.said}"
        again, undisturbed = kill.again / "run", tmp_path / "done/run"
        assert names(again) == names(undisturbed), at
        assert weights(again / "weights") == weights(undisturbed / "weights"), at
        assert [(row["step"], row["loss"]) for row in rows(again)] == [
            (row["step"], row["loss"]) for row in rows(undisturbed)
        ], at


def hold(folder: Path) -> subprocess.Popen:
    """Another process that has the lock of a folder."""
    folder.mkdir(parents=True)
    command = "import sys, mm_convert; lock = mm_convert.lock_output(sys.argv[1]); lock.__enter__(); "
    command += "print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", command, str(folder)], stdin=-1, stdout=-1)
    other.stdout.readline()
    return other


def ranks_are_refused(rank: int, world: int, argv: list[str]) -> str:
    as_torchrun(rank, world)
    with pytest.raises(ValueError, match="is being written by process") as error:
        train(load_config(argv))
    return str(error.value)


def test_a_second_run_in_one_output_is_refused_on_every_rank(features, tmp_path):
    argv = arguments(features, tmp_path / "run", "--data.micro_batch", "1")
    with hold(tmp_path / "run") as other:
        told = spawn(2, ranks_are_refused, argv, timeout=60)
        other.kill()
    assert told[0] == told[1]
    assert f"process {other.pid} on " in told[0]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
    train(load_config(argv))  # the lock has gone with its process
    assert not (tmp_path / "run/.lock").exists()


def test_a_checkpoint_that_cannot_be_written_says_why(features, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # what is full is not the disk
    try:
        with pytest.raises(OSError, match=r"File too large.*see to the reason and start again"):
            train(config(features, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [*(tmp_path / "run/checkpoints").iterdir()]
    assert not (tmp_path / "run/.lock").exists()


@pytest.mark.parametrize(("code", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_only_a_full_disk_is_called_full(code, full):
    error = OSError(code, os.strerror(code))
    assert is_full(error) is full
    assert is_full(CheckpointException("of a rank", {1: (error, None)})) is full
    assert not is_full(UnicodeEncodeError("latin-1", "猫", 0, 1, "ordinal not in range"))
