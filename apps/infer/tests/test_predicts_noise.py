"""A model that predicts noise, by the command: its own samplers, template and lengths, and noise that ranks share."""

import contextlib
import io
import os

import pytest
import torch

import mm_infer
from mm_convert import save_checkpoint
from mm_data import made_with, read_video
from mm_infer.__main__ import main
from mm_models import build
from mm_models.families import find
from mm_models.opensoraplan.testing import write_encoders
from mm_parallel.testing import spawn

SMALL = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "4", "--seed", "3"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[str]:
    """A command without its output: tiny weights, nothing of them at a trivial value."""
    folder = tmp_path_factory.mktemp("tiny")
    model = build("opensoraplan-tiny", dim=72, ffn_dim=96, num_heads=2, num_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    family, _ = find("opensoraplan-tiny")
    save_checkpoint(folder / "weights", dict(model.state_dict()), family.describe(model.config))
    write_encoders(folder / "encoders")
    return ["--weights", str(folder / "weights"), "--encoders", str(folder / "encoders"), "--prompt", "a cat", *SMALL]


def test_what_was_published_is_what_is_made(asked, tmp_path, capsys):
    main([*asked, "--output", str(tmp_path)])
    said, record = capsys.readouterr().out, made_with(tmp_path / "video_0.mp4")
    published = find("opensoraplan-tiny")[1].published
    assert record["prompt"] == "a cat"
    for name in ("sampler", "prompt_template", "negative_prompt", "guidance"):
        assert record[name] == getattr(published, name)
    assert (record["sampler"], record["flow_shift"], record["grid"]) == ("euler_ancestral", None, None)
    assert "video_0.mp4 (1/1): step 4 of 4" in said


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "ddpm"])
def test_other_samplers_and_how_many_steps_they_make(asked, tmp_path, capsys, sampler):
    main([*asked, "--output", str(tmp_path), "--sampler", sampler])
    calls = 13 if sampler == "pndm" else 4
    assert f"video_0.mp4 (1/1): step {calls} of {calls}" in capsys.readouterr().out
    assert made_with(tmp_path / "video_0.mp4")["sampler"] == sampler


def test_as_a_library_the_template_is_part_of_the_prompt(asked):
    sampler = mm_infer.load(asked[1], asked[3])
    options = {"height": 32, "width": 48, "frames": 5, "steps": 2, "guidance": 1.0}
    framed = sampler("a cat", **options, prompt_template="best, {}.").latents
    assert torch.equal(framed, sampler("best, a cat.", **options, prompt_template="{}").latents)
    assert not torch.allclose(framed, sampler("a cat", **options, prompt_template="{}").latents, atol=1e-3)
    other = sampler("a cat", **options, prompt_template="best, {}.", seed=1).latents
    assert not torch.allclose(framed, other, atol=1e-2)


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (
            ["--flow_shift", "3"],
            ["flow_shift 3.0: it moves the steps of flow matching", "predicts epsilon: leave it out"],
        ),
        (["--grid", "guides"], ["grid guides", "leave it out"]),
        (["--sampler", "euler"], ["'euler' does not fit", "did you mean euler_ancestral?"]),
        (["--sampler", "pndm", "--steps", "2"], ["steps is 2, but must be at least 4 for pndm"]),
        (["--prompt_template", "best"], ["prompt_template 'best'", "exactly once"]),
        (["--strength", "0.5"], ["strength 0.5"]),
    ],
)
def test_what_it_has_not_is_refused_at_once(asked, tmp_path, capsys, flags, messages):
    with pytest.raises(SystemExit) as stop:
        main([*asked, "--output", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    for message in messages:
        assert message in error
    assert not (tmp_path / "out").exists()


def command(rank: int, world: int, argv: list[str]) -> str:
    """What the command prints, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(argv)
    return printed.getvalue()


def test_two_ranks_make_the_video_of_one_to_the_bit(asked, tmp_path):
    """…in which each makes a pass of guidance, and both add the same noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads add up in another order
    try:
        main([*asked, "--output", str(tmp_path / "one")])
    finally:
        torch.set_num_threads(threads)
    said = spawn(2, command, [*asked, "--parallel.guidance", "2", "--output", str(tmp_path / "two")], timeout=120)
    assert "step 4 of 4" in said[0]
    one, two = (tmp_path / folder / "video_0.mp4" for folder in ("one", "two"))
    assert made_with(one) == made_with(two)
    assert (read_video(one).frames == read_video(two).frames).all()
