"""What no single package can promise: weights go from one program to the next, in every form, and stay one model."""

import json

import pytest
import torch

from mm_convert import convert, diff, open_checkpoint
from mm_data import FeatureCache
from mm_infer import load
from mm_models.wan.testing import write_encoders
from mm_train.recipe import load_config
from mm_train.train import train

SMALL = {"dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_tokens": 16}
FORMS = ("first/weights", "diffusers", "original", "dcp", "mindspeed", "original.pt")
VIDEO = {"height": 32, "width": 48, "frames": 5, "steps": 2, "guidance": 2.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Features, encoders, and a model trained for two steps, with its weights in every form."""
    place = tmp_path_factory.mktemp("chain")
    random = torch.Generator().manual_seed(0)
    with FeatureCache(place / "features") as cache:
        for i in range(4):
            tensors = {"latents": torch.randn(16, 2, 4, 6, generator=random)}
            tensors["text.0"] = torch.randn(5, 64, generator=random)
            cache.put(f"{i:064d}", tensors, {"id": f"{i}.mp4"})
        cache.finish()
    write_encoders(place / "encoders", text_dim=64)
    weights = run(place, "first", "random", "--steps", "2", "--optim.lr", "1e-2")
    for form in ("diffusers", "original", "dcp"):
        convert(weights, place / form, to=form)
    convert(weights, place / "mindspeed", to="mindspeed", pp_layers=[1, 1])
    convert(weights, place / "original.pt", to="original")
    return place


def run(place, name, weights, *more):
    """Train, and give the directory of what comes out."""
    argv = [
        "--model",
        "wan-tiny",
        "--dtype",
        "float32",
        "--architecture",
        json.dumps(SMALL),
        "--data.global_batch",
        "2",
    ]
    argv += ["--data.features", str(place / "features"), "--output", str(place / name), "--weights", str(weights)]
    return train(load_config([*argv, *more]))


def loss(place, name):
    return json.loads((place / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_training_starts_from_every_form_alike(place):
    for form in FORMS:
        run(place, f"from-{form.replace('/', '-')}", place / form, "--steps", "1")
    losses = {loss(place, f"from-{form.replace('/', '-')}") for form in FORMS}
    assert len(losses) == 1
    assert losses != {loss(place, "first")}  # which began at random


def test_every_form_generates_the_same_video(place):
    made = [load(place / form, place / "encoders")("a cat", **VIDEO) for form in FORMS]
    assert all(torch.equal(made[0].latents, other.latents) for other in made[1:])


def test_a_trained_adapter_is_generated_with(place):
    adapter = run(place, "lora", place / "diffusers", "--steps", "3", "--lora.rank", "2", "--optim.lr", "1e-1")
    plain = load(place / "diffusers", place / "encoders")("a cat", **VIDEO)
    adapted = load(place / "diffusers", place / "encoders", lora=adapter)("a cat", **VIDEO)
    assert not torch.allclose(plain.latents, adapted.latents, rtol=1e-3)


def test_a_run_is_opened_and_converted_as_it_is(place):
    assert open_checkpoint(place / "first").layout == "dcp"  # the newest training checkpoint, without exporting it
    assert not any(diff(place / "first", place / "first/weights"))
    convert(place / "first", place / "tree-of-run", "mindspeed", pp_layers=[1, 1])
    assert not any(diff(place / "tree-of-run", place / "diffusers"))
