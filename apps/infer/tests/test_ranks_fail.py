"""Inference on ranks of which one is killed, stopped, or never gets to its first step. Real processes."""

import os
import signal
from functools import partial

import pytest

from mm_infer.__main__ import main
from mm_parallel.guard import join
from mm_parallel.testing import launch

SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def infer(rank: int, argv: list[str], fate: str) -> None:
    from mm_infer import generate, ranks

    ranks.join = partial(join, interval=0.2, silence=2)
    if rank == 1 and fate == "killed":  # after the first step
        generate._watched = lambda *_: lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and fate == "stopped":
        generate.prepare = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    main([*argv, *(["--config", "no.toml"] if rank == 1 and fate == "asked otherwise" else [])])


@pytest.fixture
def asked(pipeline, tmp_path) -> list[str]:
    size = ["--height", "16", "--width", "16", "--frames", "5", "--steps", "3", "--parallel.guidance", "2"]
    return ["--weights", str(pipeline), "--prompt", "a cat", "--output", str(tmp_path), *size]


@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_a_rank_that_is_gone_is_named(asked, fate):
    ends = launch(2, infer, asked, fate, within=20)
    assert [end.code for end in ends] == [1, {"killed": -signal.SIGKILL, "stopped": None}[fate]]
    assert "[rank 0] rank 1 is gone or stopped: no heartbeat for 2 s; it was last heard in " in ends[0].said


def test_a_rank_that_cannot_begin_ends_the_others_and_says_why(asked):
    ends = launch(2, infer, asked, "asked otherwise", within=20)
    assert [end.code for end in ends] == [1, 2]
    assert "mm_infer: error: cannot read no.toml" in ends[1].said
    assert "rank 1 failed before it joined the others: mm_infer: error: cannot read no.toml" in ends[0].said
