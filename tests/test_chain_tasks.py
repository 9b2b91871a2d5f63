"""Every kind of Wan goes from training to a video, and to diffusers and back, as one artifact each."""

import json

import numpy as np
import pytest
import torch

from mm_convert import cli, open_checkpoint, open_experts
from mm_data import FeatureCache, write_video
from mm_infer import load
from mm_models import preset
from mm_models.wan import WanConfig
from mm_models.wan.tasks import stored, tasks
from mm_models.wan.testing import write_encoders
from mm_train.recipe import load_config
from mm_train.train import train

SMALL = {"dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_tokens": 16}
VIDEO = {"height": 32, "width": 48, "frames": 5, "steps": 2, "guidance": 2.0}
MODELS = {
    "i2v": ("wan-tiny-i2v", {}),
    "ti2v": ("wan-tiny", {}),
    "vace": ("wan-tiny-vace", {"vace_layers": [0, 1]}),
}
IMAGE = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("chain")
    write_encoders(place / "encoders", text_dim=64, image_dim=32)
    write_video(place / "clip.mp4", np.random.default_rng(1).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8), fps=8)
    return place


def features(place, model, changes):
    """Four samples with what the model is conditioned on."""
    config = WanConfig(**vars(preset(model)) | SMALL | changes)
    random = torch.Generator().manual_seed(0)
    path = place / f"features-{model}"
    with FeatureCache(path) as cache:
        for i in range(4):
            tensors = {"latents": (16, 2, 4, 6), "text.0": (5, 64)}
            for name, size in stored(config, tasks(config)[0].name).items():
                tensors[name] = (size, 32) if name == "image" else (size, 2, 4, 6)
            drawn = {name: torch.randn(shape, generator=random) for name, shape in tensors.items()}
            cache.put(f"{i:064d}", drawn, {"id": f"{i}.mp4"})
        cache.finish()
    return path


def trained(place, model, changes, name, *more):
    argv = ["--model", model, "--architecture", json.dumps(SMALL | changes), "--dtype", "float32", "--steps", "2"]
    argv += ["--data.features", str(features(place, model, changes)), "--output", str(place / name)]
    return train(load_config([*argv, "--data.global_batch", "2", "--optim.lr", "1e-2", *more]))


def convert(source, target):
    cli.main(["convert", str(source), str(target), "--to", "diffusers"])


def given(place, task):
    return {
        "t2v": {},
        "i2v": {"image": IMAGE},
        "ti2v": {"image": IMAGE, "task": "ti2v"},
        "vace": {"video": place / "clip.mp4", "references": [IMAGE]},
    }[task]


@pytest.mark.parametrize("task", MODELS)
def test_from_training_to_a_video_and_through_diffusers_names(place, task):
    model, changes = MODELS[task]
    objective = ["--objective.task", "ti2v"] if task == "ti2v" else []
    weights = trained(place, model, changes, f"run-{task}", "--weights", "random", *objective)
    convert(weights, place / f"diffusers-{task}")
    adapter = trained(place, model, changes, f"lora-{task}", "--weights", str(weights), "--lora.rank", "2", *objective)
    convert(adapter, place / f"adapter-{task}.safetensors")
    encoders, asked = place / "encoders", given(place, task) | VIDEO
    ours, theirs = (load(path, encoders)("a cat", **asked) for path in (weights, place / f"diffusers-{task}"))
    assert ours.frames.shape == (5, 32, 48, 3)
    assert torch.equal(ours.latents, theirs.latents)
    adapted = load(weights, encoders, lora=adapter)("a cat", **asked)
    assert not torch.equal(adapted.latents, ours.latents)
    other = load(weights, encoders)("a cat", **asked | {"image": 255 - IMAGE} if "image" in asked else VIDEO)
    assert not torch.allclose(other.latents, ours.latents, rtol=1e-3)  # it looks at what it is given


def test_two_experts_are_trained_into_one_directory_and_generate_in_one_call(place):
    base = trained(place, "wan-tiny", {}, "base", "--weights", "random")
    for expert in ("high", "low"):
        trained(place, "wan-tiny-a14b", {}, "pair", "--weights", str(base), "--expert", expert)
        trained(place, "wan-tiny-a14b", {}, "adapters", "--weights", str(base), "--expert", expert, "--lora.rank", "2")
    weights, adapter = place / "pair/weights", place / "adapters/adapter"
    asked = VIDEO | {"guidance": (3.0, 2.0), "steps": 3}
    ours = load(weights, place / "encoders")("a cat", **asked)
    swapped = open_experts(weights)
    alone = [load(path, place / "encoders")("a cat", **VIDEO).latents for path in (swapped.high, swapped.low)]
    assert not any(torch.equal(ours.latents, one) for one in alone)
    convert(weights, place / "pair-diffusers")
    theirs = load(place / "pair-diffusers", place / "encoders")("a cat", **asked)
    assert torch.equal(ours.latents, theirs.latents)
    assert not torch.equal(load(weights, place / "encoders", lora=adapter)("a cat", **asked).latents, ours.latents)
    again = open_checkpoint(open_experts(place / "pair-diffusers").low)
    assert all(torch.equal(again[name], value) for name, value in open_checkpoint(swapped.low).items())
