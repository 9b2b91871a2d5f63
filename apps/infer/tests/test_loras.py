"""Several adapters, with strengths, for both experts or one; what cannot be meant is refused."""

import re
from pathlib import Path

import pytest
import torch

import mm_infer
from mm_convert import open_checkpoint
from mm_convert.lora.base import describe_content
from mm_data import made_with
from mm_infer.__main__ import main
from mm_infer.loras import Lora, read_loras
from mm_infer.weights import Weights
from mm_models.distilled import find_distilled
from mm_models.wan.distilled import DISTILLED

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2, "guidance": 1.0}


def test_several_with_strengths_from_the_command(pipeline, loras, tmp_path, capsys):
    """The order makes no difference; the record says all, and each is part of what the video is made from."""
    a, b = map(str, loras)

    def output(name):
        return ["--output", str(tmp_path / name)]

    asked = ["--weights", str(pipeline), "--prompt", "x", *(f"--{k}={v}" for k, v in SMALL.items())]
    flags = ["--lora", a, "--lora", b, "--lora_strength", "0.8", "--lora_strength", "-0.5"]
    main([*asked, *flags, *output("one")])
    said = made_with(tmp_path / "one/video_0.mp4")
    assert (said["lora"], said["lora_strength"]) == ([a, b], [0.8, -0.5])
    with pytest.raises(SystemExit, match="0"):
        main([*asked, "--lora", f'["{b}", "{a}"]', "--lora_strength", "[-0.5, 0.8]", "--check", *output("two")])
    told = " ".join(capsys.readouterr().out.split())
    assert f"{b}: 3 linears, 1 whole difference, strength -0.5; {a}: 3 linears" in told

    def latents(lora, strength):
        return mm_infer.load(pipeline, lora=lora, lora_strength=strength)("x", **SMALL).latents

    one, two = latents([a, b], [0.8, -0.5]), latents([b, a], [-0.5, 0.8])
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert (one - latents(a, 0.8)).norm() > 0.01 * one.norm()


def test_one_for_each_expert(tiny, loras, write_lora, tmp_path, capsys):
    """By high= and low=, by two files of a folder that are called so; and what one alone is known for is not taken."""
    high, low = loras
    pair = Weights(tiny("a14b"), lora=[f"high={high}", f"low={low}"])
    assert [[lora.path for lora, _ in one.adapters] for one in pair.experts] == [[high], [low]]
    folder = tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
    names = [write_lora(folder / f"{expert}_noise_model.safetensors", 2) for expert in ("high", "low")]
    known = Weights(tiny("a14b"), lora=folder)
    assert [[adapter.rank for _, adapter in one.adapters] for one in known.experts] == [[2], [2]]
    published = known.facts.published
    assert (published.steps, published.guidance, published.flow_shift, published.sampler) == (4, 1.0, 5.0, "euler")
    half = Weights(tiny("a14b"), lora=[f"high={names[0]}"])
    assert half.facts.distilled is None
    assert "one of the two experts is known as Wan2.2-Lightning" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"is for one of two experts, but .* holds one model"):
        Weights(tiny("t2v"), lora=f"high={high}")


def test_what_cannot_be_meant(pipeline, loras, write_lora, tmp_path):
    a, b = loras
    for arguments, message in (
        (([a, a],), r"2.safetensors is given twice: .*--lora_strength"),
        (([f"high={a}", a],), "is given twice"),
        (([a, b], [1.0]), r"lora_strength has 1 numbers, and there are 2 adapters"),
        (([], 0.5), "lora_strength 0.5 is that of an adapter"),
        (([a, b], 1.0, 8.0), r"lora_alpha 8.0 is of one adapter, and there are 2"),
    ):
        with pytest.raises(ValueError, match=message):
            read_loras(*arguments)
    assert read_loras([f"high={a}", f"low={a}"], [1, 2]) == (Lora(a, "high", 1.0), Lora(a, "low", 2.0))
    other = write_lora(tmp_path / "other.safetensors", 2, dim=48)
    with pytest.raises(ValueError, match=r"other.safetensors: .*misshapen.*q.weight \(\[48, 48\], here \[40, 40\]\)"):
        Weights(pipeline, lora=[a, other])


@pytest.mark.parametrize(
    ("kind", "expert", "said", "message"),
    [
        ("t2v", "", {"prediction": "v_prediction"}, "on weights of prediction v_prediction, and these are of .* flow"),
        ("t2v", "", {"family": "opensoraplan"}, "on weights of family opensoraplan, and these are of family wan"),
        ("t2v", "", {"family": "wan", "prediction": "flow", "expert": "high"}, ""),
        ("a14b", "high=", {"expert": "low"}, r"on weights of expert low.* Give weights of expert low, or an adapter"),
        ("a14b", "low=", {"expert": "low"}, ""),
    ],
)
def test_what_it_was_trained_on_must_be_what_it_is_put_on(
    tiny, write_lora, tmp_path, capsys, kind, expert, said, message
):
    lora = f"{expert}{write_lora(tmp_path / 'lora.safetensors', 2, trained_on=said)}"
    asked = [
        "--weights",
        str(tiny(kind)),
        "--prompt",
        "x",
        "--output",
        str(tmp_path / "out"),
        "--lora",
        lora,
        "--check",
    ]
    with pytest.raises(SystemExit) as end:
        main([*asked, *(f"--{name}={value}" for name, value in SMALL.items())])
    told = " ".join(capsys.readouterr().out.split())
    assert end.value.code == (2 if message else 0), told
    if message:
        assert re.search(f"✗ adapter .*lora.safetensors was trained {message}", told)
        with pytest.raises(ValueError, match=message):
            Weights(tiny(kind), lora=lora)


def test_other_weights_of_the_family_are_noted(pipeline, write_lora, tmp_path, capsys):
    modules = [f"blocks.{i}.self_attn.q" for i in range(3)]
    said = describe_content(open_checkpoint(pipeline).tensors, modules)
    lora = write_lora(tmp_path / "lora.safetensors", 2, trained_on={**said, "model": "mine"})
    Weights(pipeline, lora=lora)
    assert "other weights" not in capsys.readouterr().err
    other = write_lora(tmp_path / "other.safetensors", 2, trained_on={"content": "0" * 16, "model": "mine"})
    Weights(pipeline, lora=other)
    assert "other.safetensors: it was trained on other weights (mine)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("wan2.1_i2v_lora_rank64_lightx2v_4step.safetensors", "lightx2v's distilled"),
        ("wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors", "lightx2v's distilled"),
        ("Wan2.2-Distill-Models/wan2.2_i2v_A14b_low_noise_lightx2v_4step.safetensors", "lightx2v's distilled"),
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors", "lightx2v's StepDistill"),
        ("Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v/distill_model.pt", "lightx2v's StepDistill"),
        ("Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1/low_noise_model.safetensors", "Wan2.2-Lightning"),
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", "Wan2.2-Lightning"),
        ("Wan21_CausVid_14B_T2V_lora_rank32.safetensors", ""),
        ("my-lora/adapter_model.safetensors", ""),
        ("Wan2.1-T2V-14B-Diffusers", ""),
    ],
)
def test_known_names(name, known):
    found = find_distilled(DISTILLED, [Path("/models") / name])
    assert (found.name if found else "").startswith(known)
    assert bool(found) == bool(known)
