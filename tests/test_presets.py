"""A preset is stated twice, in mm_models to build it and in mm_convert to recognise it; both must say the same."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from mm_convert.content import understand
from mm_convert.families import WAN
from mm_convert.inspection import preset
from mm_models import build, presets

OURS_ALONE = {"wan-tiny"}  # small enough for a laptop; released by nobody


@pytest.mark.parametrize("name", sorted(set(presets()) - OURS_ALONE))
def test_the_model_of_a_preset_is_recognised(name):
    model = build(name, device="meta")
    content = understand({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, name)
    config, _ = content.family.complete(content.config)
    assert name in preset(content.family, config).split(", ")
    stated = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(model.config).items()}
    assert {key: stated[key] for key in config} == config


def test_only_presets_that_can_be_built_later_are_missing():
    assert set(presets()) - OURS_ALONE <= {name for name in WAN.presets}
