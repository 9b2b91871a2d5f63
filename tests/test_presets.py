"""A preset is stated twice, in mm_models to build it and in mm_convert to recognise it; both must say the same."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from mm_convert.families import OPENSORAPLAN, QWEN2_5_VL, VACE, WAN
from mm_convert.families.presets import name_preset
from mm_convert.read.content import identify
from mm_models import boundary, build, presets
from mm_models.families import family_of

WIDTHS = {"q_dim", "kv_dim"}  # which tensors show in place of numbers of heads
OTHER_TOKENS = {"qwen2.5-vl-tiny"}  # than all that were released, which no tensor shows
OURS_ALONE = {name for name in presets() if "-tiny" in name}  # released by nobody


@pytest.mark.parametrize("name", presets())
def test_the_model_of_a_preset_is_understood(name):
    """What names and shapes alone say of the model is what mm_models states."""
    model = build(name, device="meta")
    content = identify({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, name)
    config = content.config if name in OTHER_TOKENS else content.family.complete(content.config)[0]
    stated = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(model.config).items()}
    assert {key: stated[key] for key in config.keys() - WIDTHS} == {key: config[key] for key in config.keys() - WIDTHS}
    if name not in OURS_ALONE:
        assert name in name_preset(content.family, content.config | config).split(", ")
        assert build(name, device="meta", **config).config == model.config


def test_both_know_the_same_presets():
    assert set(presets()) - OURS_ALONE == {*WAN.presets, *VACE.presets, *OPENSORAPLAN.presets, *QWEN2_5_VL.presets}
    experts = {name: boundary(name) for name in set(presets()) - OURS_ALONE if boundary(name) is not None}
    assert experts == {**WAN.boundaries, **VACE.boundaries}


def test_a_small_clip_of_two_images_is_known_by_its_positions():
    """34 tokens with positions, from the tensors alone, in our names and in those of diffusers."""
    model = build("wan-tiny-i2v", device="meta", image_tokens=34, image_positions=True)
    content = identify({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, "it")
    assert (content.config["image_tokens"], content.config["image_positions"]) == (34, True)
    read = family_of(model.config).config(**content.config | {"num_heads": 5, "text_dim": 64})
    assert [task.name for task in family_of(read).tasks(read)] == ["flf2v"]
    plain = build("wan-tiny-i2v", device="meta")
    assert "image_positions" not in identify({k: tuple(t.shape) for k, t in plain.state_dict().items()}, "it").config
