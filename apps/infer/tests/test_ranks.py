"""Ranks that make one video together: the latents of one device, and the same files from the command."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import mm_infer
from mm_data import made_with, read_video
from mm_infer.config import Ranks
from mm_infer.ranks import Share, share
from mm_parallel.testing import spawn

SMALL = {"height": 48, "width": 48, "frames": 9, "steps": 3, "seed": 3}  # 27 tokens, 2 heads
LAYOUTS = [
    Ranks(cp=2),
    Ranks(ring=2),
    Ranks(cp=3),  # more ranks than heads
    Ranks(guidance=2),
    Ranks(cp=2, guidance=2),
    Ranks(ulysses=2, ring=2),
]


IMAGE = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
TASKS = {
    "t2v": {},
    "i2v": {"image": IMAGE},
    "5b": {"image": IMAGE, "height": 96, "width": 96},
    "vace": {"references": (IMAGE,)},
    "a14b": {"guidance": (4.0, 3.0)},
}


def latents(paths: dict[str, str], here: Share) -> dict[str, np.ndarray]:
    made = {}
    for kind, path in paths.items():
        sampler = mm_infer.load(path, dtype=torch.float32, device="cpu", mesh=here.mesh, pair=here.pair)
        made[kind] = sampler("a cat", **SMALL | TASKS[kind]).latents.numpy()
    return made


def together(rank: int, world: int, paths: dict[str, str], layouts: list[Ranks]) -> list[tuple[dict, bool, tuple]]:
    shares = [share(ranks) for ranks in layouts]
    return [(latents(paths, here), here.leads, here.prompts) for here in shares]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_latents_are_those_of_one_device(tiny, world):
    paths = {kind: str(tiny(kind)) for kind in (TASKS if world == 2 else ["t2v"])}
    alone = latents(paths, Share())
    layouts = [r for r in LAYOUTS if (r.cp or (r.ulysses or 1) * (r.ring or 1)) * r.guidance == world]
    assert layouts
    for rank, made in enumerate(spawn(world, together, paths, layouts, timeout=120)):
        for shared, leads, prompts in made:
            for kind in paths:
                np.testing.assert_allclose(shared[kind], alone[kind], rtol=1e-4, atol=1e-4, err_msg=kind)
            assert leads == (rank == 0)
            assert prompts == (0, 1)


def teams(rank: int, world: int) -> tuple:
    here = share(Ranks(cp=2))
    decided = here.decide(lambda: rank)
    with pytest.raises(ValueError, match="no disk of"):
        here.decide(fail)
    return here.prompts, here.leads, decided


def fail() -> None:
    raise ValueError("no disk of ours")


def test_what_is_left_of_the_ranks_makes_other_prompts():
    assert spawn(4, teams) == [((0, 2), True, 0), ((0, 2), False, 0), ((1, 2), True, 2), ((1, 2), False, 2)]


def misfit(rank: int, world: int) -> None:
    share(Ranks(cp=1, guidance=2))


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match=r"guidance 2 x 1 context ranks are 2 ranks per video, and 3 were started"):
        spawn(3, misfit)
    with pytest.raises(ValueError, match=r"1 ranks cannot be laid out as ulysses=2"):
        share(Ranks(cp=2))


def test_from_a_shell_a_video_is_written_once(pipeline, tmp_path):
    size = ["--height", "48", "--width", "48", "--frames", "9", "--steps", "2"]
    asked = ["-m", "mm_infer", "--weights", str(pipeline), "--prompt", "a cat", *size]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shared = [*asked, "--parallel.guidance", "2", "--output", "two"]
    said = []
    for command in ([*torchrun, *shared], [*torchrun, *shared], [*asked, "--output", "one"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout)
    assert [text.count("1 video(s) in") for text in said] == [1, 0, 1]
    assert [text.count("kept, made by the same command") for text in said] == [0, 1, 0]
    one, two = tmp_path / "one/video_0.mp4", tmp_path / "two/video_0.mp4"
    assert made_with(one) == made_with(two)
    frames = [read_video(file).frames.astype(int) for file in (one, two)]
    assert abs(frames[0] - frames[1]).max() <= 2
