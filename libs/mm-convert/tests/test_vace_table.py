"""The table of VACE against published fingerprints, counts, and diffusers' own model."""

from __future__ import annotations

from math import prod

import pytest

from mm_convert.content import fingerprint, understand
from mm_convert.families import VACE

COMMON = dict(freq_dim=256, text_dim=4096, in_channels=16, out_channels=16, control_channels=96)
SMALL = COMMON | dict(dim=1536, ffn_dim=8960, layers=30, control_blocks=15)
LARGE = COMMON | dict(dim=5120, ffn_dim=13824, layers=40, control_blocks=8)

# sizes, md5 of the published original files, parameters and tensors, those of the control ladder
PUBLISHED = {
    "vace-1.3b": (SMALL, "a61453409b67cd3246cf0c3bebad47ba", 2_153_972_032, 1264, 734_975_232, 439),
    "vace-14b": (LARGE, "7a513e1f257a861512b1afd387a8ecd9", 17_337_592_896, 1331, 3_049_101_312, 236),
}


@pytest.mark.parametrize("dialect", ["diffusers", "mindspeed"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_other_names_become_the_published_original(name, dialect, toys):
    sizes, md5, parameters, tensors, control_parameters, control_tensors = PUBLISHED[name]
    theirs = toys.shapes(dialect, sizes)
    content = understand(theirs, name)
    ours = {content.names[key]: shape for key, shape in theirs.items()}
    control = {key: shape for key, shape in ours.items() if key.startswith("vace")}
    assert (content.family.name, content.dialect) == ("vace", dialect)
    assert fingerprint(ours) == md5
    assert (sum(map(prod, ours.values())), len(ours)) == (parameters, tensors)
    assert (sum(map(prod, control.values())), len(control)) == (control_parameters, control_tensors)
    assert content.translate(dialect) == {ours: theirs for theirs, ours in content.names.items()}


def test_the_control_ladder_alone(toys):
    control = {name: shape for name, shape in toys.shapes("original", LARGE).items() if name.startswith("vace")}
    assert fingerprint(control) == "3b2726384e4f64837bdf216eea3f310d"


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
    content = understand(toys.shapes("original", toys.control), "toy")
    config, _ = VACE.complete(content.config | {"num_heads": 2, "vace_layers": [0, 2]})
    with torch.device("meta"):
        model = diffusers.WanVACETransformer3DModel.from_config(VACE.write_config["diffusers"](config))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert theirs == toys.shapes("diffusers", toys.control)


@pytest.mark.parametrize("dialect", ["original", "diffusers"])
def test_config_json_there_and_back(dialect, toys):
    content = understand(toys.shapes(dialect, toys.control), "toy")
    config, notes = VACE.complete(content.config | {"num_heads": 2, "vace_layers": [0, 2]})
    assert not notes
    assert (config["vace_layers"], config["control_channels"]) == ([0, 2], 12)
    json = VACE.write_config[dialect](config)
    assert json["_class_name"] == {"original": "VaceWanModel", "diffusers": "WanVACETransformer3DModel"}[dialect]
    said = VACE.read_config(json)
    assert said.items() <= config.items()
    assert VACE.complete(said | content.config) == (config, [])
    assert VACE.complete(config) == (config, [])


@pytest.mark.parametrize(("sizes", "layers"), [(SMALL, [*range(0, 30, 2)]), (LARGE, [0, 5, 10, 15, 20, 25, 30, 35])])
def test_without_config_json_control_is_spread_evenly(sizes, layers, toys):
    config, notes = VACE.complete(understand(toys.shapes("original", sizes), "toy").config)
    assert config["vace_layers"] == layers
    assert "evenly" in "; ".join(notes)


@pytest.mark.parametrize("said", [[0], [0, 1, 2], [0, 0], [2, 0], [0, 3], [1, 2], [0, 1.0], "02", 2, {}])
def test_control_at_layers_that_cannot_be(said, toys):
    content = understand(toys.shapes("original", toys.control), "toy")
    config, notes = VACE.complete(content.config | {"num_heads": 2, "vace_layers": said})
    assert config["vace_layers"] == [0, 1]
    assert repr(said) in "; ".join(notes)


def test_more_control_blocks_than_layers(toys):
    content = understand(toys.shapes("original", toys.control | {"control_blocks": 4}), "toy")
    with pytest.raises(ValueError, match=r"4 control blocks .* 3 layers"):
        VACE.complete(content.config)


def test_every_missing_tensor_is_noticed(toys):
    shapes = toys.shapes("mindspeed", toys.control)
    for name in shapes:
        rest = {other: shape for other, shape in shapes.items() if other != name}
        with pytest.raises(ValueError, match=r"missing: .*" + name.replace(".", r"\.")):
            understand(rest, "toy")
