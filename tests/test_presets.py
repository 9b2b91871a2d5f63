"""A preset is stated twice, in mm_models to build it and in mm_convert to recognise it; both must say the same."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from mm_convert.families import VACE, WAN
from mm_convert.families.presets import name_preset
from mm_convert.read.content import identify
from mm_models import boundary, build, presets

OURS_ALONE = {name for name in presets() if name.startswith("wan-tiny")}  # released by nobody


@pytest.mark.parametrize("name", presets())
def test_the_model_of_a_preset_is_understood(name):
    """What names and shapes alone say of the model is what mm_models states."""
    model = build(name, device="meta")
    content = identify({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, name)
    config, _ = content.family.complete(content.config)
    stated = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(model.config).items()}
    assert {key: stated[key] for key in config} == config
    if name not in OURS_ALONE:
        assert name in name_preset(content.family, config).split(", ")


def test_both_know_the_same_presets():
    assert set(presets()) - OURS_ALONE == {*WAN.presets, *VACE.presets}
    experts = {name: boundary(name) for name in set(presets()) - OURS_ALONE if boundary(name) is not None}
    assert experts == {**WAN.boundaries, **VACE.boundaries}
