"""The table of VACE against diffusers' own model and MindSpeed-MM's names."""

from __future__ import annotations

import pytest

from mm_convert.families import VACE
from mm_convert.read.content import identify


def test_the_names_of_mindspeed(toys):
    base = toys.shapes("mindspeed", {k: v for k, v in toys.control.items() if not k.startswith("control")})
    block = {name.removeprefix("blocks.0.") for name in base if name.startswith("blocks.0.")}
    ends = ["vace_patch_embedding", "vace_blocks.0.before_proj", "vace_blocks.0.after_proj", "vace_blocks.1.after_proj"]
    expected = {f"wan_dit.{name}" for name in base}
    expected |= {f"vace_dit.{name}.{kind}" for name in ends for kind in ("weight", "bias")}
    expected |= {f"vace_dit.vace_blocks.{j}.wan_dit_block.{name}" for j in (0, 1) for name in block}
    assert set(toys.shapes("mindspeed", toys.control)) == expected


def test_names_and_shapes_are_those_of_the_diffusers_model(toys):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    content = identify(toys.shapes("original", toys.control), "toy")
    config, _ = VACE.complete(content.config | {"num_heads": 2, "vace_layers": [0, 2]})
    with torch.device("meta"):
        model = diffusers.WanVACETransformer3DModel.from_config(VACE.write_config["diffusers"](config))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert theirs == toys.shapes("diffusers", toys.control)


@pytest.mark.parametrize("dialect", ["original", "diffusers"])
def test_config_json_there_and_back(dialect, toys):
    content = identify(toys.shapes(dialect, toys.control), "toy")
    config, notes = VACE.complete(content.config | {"num_heads": 2, "vace_layers": [0, 2]})
    assert not notes
    assert (config["vace_layers"], config["control_channels"]) == ([0, 2], 12)
    json = VACE.write_config[dialect](config)
    assert json["_class_name"] == {"original": "VaceWanModel", "diffusers": "WanVACETransformer3DModel"}[dialect]
    said = VACE.read_config(json)
    assert said.items() <= config.items()
    assert VACE.complete(said | content.config) == (config, [])
    assert VACE.complete(config) == (config, [])


@pytest.mark.parametrize("name", ["vace-1.3b", "vace-14b"])
def test_without_config_json_control_is_spread_evenly(name, toys):
    config, notes = VACE.complete(identify(toys.published(VACE, name), name).config)
    assert config.items() >= VACE.presets[name].items()
    assert "evenly" in "; ".join(notes)


@pytest.mark.parametrize("said", [[0], [0, 1, 2], [0, 0], [2, 0], [0, 3], [1, 2], [0, 1.0], "02", 2, {}])
def test_control_at_layers_that_cannot_be(said, toys):
    content = identify(toys.shapes("original", toys.control), "toy")
    config, notes = VACE.complete(content.config | {"num_heads": 2, "vace_layers": said})
    assert config["vace_layers"] == [0, 1]
    assert repr(said) in "; ".join(notes)


def test_more_control_blocks_than_layers(toys):
    content = identify(toys.shapes("original", toys.control | {"control_blocks": 4}), "toy")
    with pytest.raises(ValueError, match=r"4 control blocks .* 3 layers"):
        VACE.complete(content.config)


def test_every_missing_tensor_is_noticed(toys):
    shapes = toys.shapes("mindspeed", toys.control)
    for name in shapes:
        rest = {other: shape for other, shape in shapes.items() if other != name}
        with pytest.raises(ValueError, match=r"missing: .*" + name.replace(".", r"\.")):
            identify(rest, "toy")
