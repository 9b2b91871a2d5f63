"""Training and extraction on ranks of which one is killed, stopped, or never gets to its first step. Real processes."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

import mm_train.__main__ as training
import mm_train.extract as extracting
from mm_models.wan.testing import write_encoders
from mm_parallel.guard import join
from mm_parallel.testing import End, launch

sys.path.insert(0, str(Path(__file__).parent))
from runs import arguments, write_features
from test_extract import write_clip

SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def train(rank: int, argv: list[str], fate: str, victim: int) -> None:
    from mm_train import run

    run.join = partial(join, interval=0.2, silence=2)
    if rank == victim:
        name = "build_model" if fate == "stopped" else "all_sum"  # before the first step, or in it
        setattr(run, name, lambda *_, **__: os.kill(os.getpid(), SIGNALS[fate]))
    training.main(argv)


def extract(rank: int, argv: list[str], fate: str, victim: int) -> None:
    from mm_train import extraction

    extraction.join = partial(join, interval=0.2, silence=2)
    if rank == victim:
        extraction.Encoders.encode = lambda *_: os.kill(os.getpid(), SIGNALS[fate])
    extracting.main(argv)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """By program, its arguments."""
    root = tmp_path_factory.mktemp("asked")
    write_encoders(root / "encoders", text_dim=64, image_dim=32)
    for i in range(6):
        write_clip(root / f"{i}.mp4", seed=i)
    (root / "data.jsonl").write_text("".join(f'{{"path": "{root}/{i}.mp4", "cap": "{i}"}}\n' for i in range(6)))
    flags = {"encoders": root / "encoders", "output": root / "out", "data.manifest": root / "data.jsonl"}
    flags |= {"data.workers": 0, "geometry.num_frames": 9, "geometry.max_height": 32, "geometry.max_width": 48}
    flags = {"model": "wan-tiny"} | flags
    return {
        train: arguments(write_features(root / "features"), root / "run"),
        extract: [word for name, value in flags.items() for word in (f"--{name}", str(value))],
    }


@pytest.mark.parametrize("fate", ["killed", "stopped"])
@pytest.mark.parametrize("program", [train, extract])
def test_a_rank_that_is_gone_is_named(asked, program, fate):
    victim = 0 if (program, fate) == (train, "killed") else 1
    ends = launch(2, program, asked[program], fate, victim, within=90)
    other = ends[1 - victim]
    assert ends[victim].code in (-signal.SIGKILL, None)
    assert other.code == 1
    gone = "the process that hosts the store (rank 0, or torchrun on its host) is gone"
    expected = gone if victim == 0 else "rank 1 is gone or stopped: no heartbeat for 2 s"
    assert expected in other.said
    assert f"[rank {1 - victim}] " in other.said


def one_is_asked_otherwise(rank: int, program: object, argv: list[str], otherwise: list[str]) -> None:
    program([*argv, *(otherwise if rank else [])])


@pytest.mark.parametrize(
    ("program", "otherwise", "message"),
    [
        (train, ["--config", "no.toml"], "cannot read no.toml"),
        (train, ["--data.features", "no/where"], "error: --data.features no/where is not a directory"),
        (extract, ["--data.manifest", "no/where"], "error: --data.manifest no/where is not a file"),
    ],
)
def test_a_rank_that_cannot_begin_ends_the_others_and_says_why(asked, program, otherwise, message):
    main = {train: training.main, extract: extracting.main}[program]
    ends: list[End] = launch(2, one_is_asked_otherwise, main, asked[program], otherwise, within=90)
    assert [end.code for end in ends] == [1, 2]
    assert message in ends[1].said
    assert "rank 1 failed before it joined the others: " in ends[0].said
    assert message in ends[0].said


def test_what_is_wrong_on_all_ranks_is_said_once(asked):
    for wrong in (["--weights", "nope"], ["--optim.leraning_rate", "1"]):
        ends = launch(2, one_is_asked_otherwise, training.main, [*asked[train], *wrong], [], within=90)
        assert [end.code for end in ends] == [2, 2]
        assert (ends[0].said.count("error: "), ends[1].said) == (1, "")
