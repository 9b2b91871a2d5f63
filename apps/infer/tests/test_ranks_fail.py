"""Inference on ranks of which one is killed, stopped, or never gets to its first step. Real processes."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mm_data import write_video
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


def from_own_disk(rank: int, argv: list[str], disks: Path) -> None:
    from mm_infer import ranks

    ranks.join = partial(join, interval=0.2, silence=2)
    os.chdir(disks / str(rank))
    main(argv)


@pytest.mark.parametrize("what", ["transformer", "vae", "prompts.txt", "video.mp4"])
def test_ranks_that_see_other_contents_are_named(pipeline, tmp_path, what):
    for rank in (0, 1):
        disk = tmp_path / str(rank)
        shutil.copytree(pipeline, disk / "W")
        (disk / "prompts.txt").write_text("a cat\n" if rank and what == "prompts.txt" else "a dog\n")
        shade = rank if what == "video.mp4" else 0
        write_video(disk / "video.mp4", np.full((5, 16, 16, 3), 100 + 100 * shade, np.uint8), fps=8)
    if what in ("transformer", "vae"):
        file = next((tmp_path / "1" / "W" / what).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    argv = ["--weights", "W", "--prompt_file", "prompts.txt", "--video", "video.mp4", "--output", str(tmp_path / "out")]
    argv += ["--height", "16", "--width", "16", "--frames", "5", "--steps", "3", "--parallel.guidance", "2"]
    messages = {
        "prompts.txt": "what is asked for differs between ranks: video 0 is ",
        "video.mp4": "what is made differs between ranks: video of video_0.mp4 is ",
    }
    for end in launch(2, from_own_disk, argv, tmp_path, within=90):
        assert end.code in (1, 2)
        assert messages.get(what, "what is read differs between ranks: --") in end.said


def test_ranks_that_read_another_boundary_are_named_though_they_make_other_videos(tiny, tmp_path):
    for rank in (0, 1):
        shutil.copytree(tiny("a14b"), tmp_path / str(rank) / "W")
        (tmp_path / str(rank) / "prompts.txt").write_text("a cat\na dog\n")
    index = tmp_path / "1" / "W" / "model_index.json"
    index.write_text(index.read_text().replace("0.875", "0.5"))
    argv = ["--weights", "W", "--prompt_file", "prompts.txt", "--output", str(tmp_path / "out")]
    argv += ["--height", "16", "--width", "16", "--frames", "5", "--steps", "3"]
    for end in launch(2, from_own_disk, argv, tmp_path, within=90):
        assert end.code in (1, 2)
        assert "the boundary of --weights is 0.875 on rank 0, 0.5 on rank 1" in end.said


@pytest.fixture
def asked(pipeline, tmp_path) -> list[str]:
    size = ["--height", "16", "--width", "16", "--frames", "5", "--steps", "3", "--parallel.guidance", "2"]
    return ["--weights", str(pipeline), "--prompt", "a cat", "--output", str(tmp_path), *size]


@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_a_rank_that_is_gone_is_named(asked, fate):
    ends = launch(2, infer, asked, fate, within=90)
    assert [end.code for end in ends] == [1, {"killed": -signal.SIGKILL, "stopped": None}[fate]]
    assert "[rank 0] rank 1 is gone or stopped: no heartbeat for 2 s; it was last heard in " in ends[0].said


def test_a_rank_that_cannot_begin_ends_the_others_and_says_why(asked):
    ends = launch(2, infer, asked, "asked otherwise", within=90)
    assert [end.code for end in ends] == [1, 2]
    assert "mm_infer: error: cannot read no.toml" in ends[1].said
    assert "rank 1 failed before it joined the others: mm_infer: error: cannot read no.toml" in ends[0].said
