"""Ranks that make one video together: the latents of one device, and the same files from the command."""

import contextlib
import io
import os

import numpy as np
import pytest
import torch

import mm_infer
from mm_data import made_with, read_video
from mm_infer.__main__ import main
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
ADAPTED = "t2v with two adapters"


def latents(paths: dict[str, str], here: Share, loras: list[str]) -> dict[str, np.ndarray]:
    made = {}
    for kind, path in paths.items():
        adapters = {"lora": loras, "lora_strength": [0.8, -0.5]} if kind == ADAPTED else {}
        how = {"dtype": torch.float32, "device": "cpu", "mesh": here.mesh, "pair": here.pair}
        sampler = mm_infer.load(path, **how, **adapters)
        made[kind] = sampler("a cat", **SMALL | TASKS.get(kind, {})).latents.numpy()
        if kind == "t2v":  # ranks decide alike which layers to skip
            made["cached"] = (cached := sampler("a cat", first_block_cache=0.8, **SMALL)).latents.numpy()
            assert cached.skipped
    return made


def together(
    rank: int, world: int, paths: dict[str, str], layouts: list[Ranks], loras: list[str]
) -> list[tuple[dict, bool, tuple]]:
    shares = [share(ranks) for ranks in layouts]
    return [(latents(paths, here, loras), here.leads, here.prompts) for here in shares]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_latents_are_those_of_one_device(tiny, world, loras):
    paths = {kind: str(tiny(kind)) for kind in (TASKS if world == 2 else ["t2v"])}
    paths |= {ADAPTED: paths["t2v"]} if world == 2 else {}
    files = [str(path) for path in loras]
    alone = latents(paths, Share(), files)
    layouts = [r for r in LAYOUTS if (r.cp or (r.ulysses or 1) * (r.ring or 1)) * r.guidance == world]
    assert layouts
    for rank, made in enumerate(spawn(world, together, paths, layouts, files, timeout=120)):
        for shared, leads, prompts in made:
            for kind in alone:
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


def command(rank: int, world: int, argv: list[str]) -> str:
    """What the command prints, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(argv)
    return printed.getvalue()


def test_by_the_command_a_video_is_written_once(pipeline, tmp_path, capsys):
    size = ["--height", "48", "--width", "48", "--frames", "9", "--steps", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    asked = ["--weights", str(pipeline), "--prompt", "a cat", *size]
    shared = [*asked, "--parallel.guidance", "2", "--output", str(two)]
    said = ["".join(spawn(2, command, shared, timeout=120)) for _ in range(2)]
    main([*asked, "--output", str(one)])
    said.append(capsys.readouterr().out)
    assert [text.count("1 video(s) in") for text in said] == [1, 0, 1]
    assert [text.count("kept, made by the same command") for text in said] == [0, 1, 0]
    assert made_with(one / "video_0.mp4") == made_with(two / "video_0.mp4")
    frames = [read_video(folder / "video_0.mp4").frames.astype(int) for folder in (one, two)]
    assert abs(frames[0] - frames[1]).max() <= 2
