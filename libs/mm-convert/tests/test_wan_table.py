"""The table of Wan's names and shapes against diffusers' own model and MindSpeed-MM's names."""

from __future__ import annotations

import pytest

from mm_convert.families import WAN
from mm_convert.read.content import identify

_KINDS = ("weight", "bias")


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "wide"])
def test_sizes_are_read_from_the_shapes(kind, toys):
    config = identify(toys.shapes("mindspeed", toys.kinds[kind]), kind).config
    expected = {"image_dim": None, "image_tokens": 257, "patch_size": [1, 2, 2], **toys.kinds[kind]}
    expected["num_layers"] = expected.pop("layers")
    assert config == expected


def test_the_names_of_mindspeed(toys):
    names = set(toys.shapes("mindspeed", toys.kinds["flf2v"]))
    block = {name.removeprefix("blocks.1.") for name in names if name.startswith("blocks.1.")}
    affine = ["proj_q", "proj_k", "proj_v", "proj_out"]
    both = [f"{attn}.{name}.{kind}" for attn in ("self_attn", "cross_attn") for name in affine for kind in _KINDS]
    norms = [f"{attn}.{name}.weight" for attn in ("self_attn", "cross_attn") for name in ("q_norm", "k_norm")]
    image = [f"cross_attn.{name}.{kind}" for name in ("k_img", "v_img") for kind in _KINDS]
    rest = [f"{name}.{kind}" for name in ("ffn.0", "ffn.2", "norm3") for kind in _KINDS]
    assert block == {*both, *norms, *image, *rest, "cross_attn.k_norm_img.weight", "modulation"}
    stem = ["text_embedding.linear_1", "text_embedding.linear_2", "time_embedding.0", "time_embedding.2"]
    stem += ["patch_embedding", "time_projection.1", *(f"img_emb.proj.{i}" for i in (0, 1, 3, 4)), "head.head"]
    outside = {name for name in names if not name.startswith("blocks.")}
    assert outside == {f"{n}.{kind}" for n in stem for kind in _KINDS} | {"head.modulation", "img_emb.emb_pos"}


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "wide"])
def test_names_and_shapes_are_those_of_the_diffusers_model(kind, toys):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        config = toys.diffusers_config(toys.kinds[kind])
        model = diffusers.WanTransformer3DModel.from_config(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert theirs == toys.shapes("diffusers", toys.kinds[kind])


def test_values_that_cannot_be_are_left_out_and_said(toys):
    content = identify(toys.shapes("original", toys.kinds["t2v"]), "toy")
    published = {"dim": 16, "eps": 2, "num_heads": 16, "text_len": [1, 2, 2], "num_layers": "many"}
    config, notes = WAN.complete(WAN.read_config(published) | content.config)
    assert (config["eps"], config["text_tokens"], config["num_layers"]) == (1e-6, 512, 3)
    assert "num_heads" not in config
    said = "; ".join(notes)
    for words in ("eps is said to be 2", "text_tokens is said to be [1, 2, 2]", "num_heads is said to be 16"):
        assert words in said
    for dialect, field in (("original", "num_heads"), ("diffusers", "num_attention_heads")):
        written = WAN.write_config[dialect](config)
        assert field not in written
        assert "attention_head_dim" not in written
        assert WAN.complete(WAN.read_config(written) | content.config)[0] == config


@pytest.mark.parametrize("heads", ["2", True, 0, -2, 2.0, [2]])
def test_a_number_of_heads_that_is_none(heads, toys):
    content = identify(toys.shapes("original", toys.kinds["t2v"]), "toy")
    said = WAN.read_config({"num_attention_heads": heads, "attention_head_dim": 12})
    assert "num_heads" not in WAN.complete(said | content.config)[0]


@pytest.mark.parametrize("dialect", ["original", "diffusers"])
@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "wide"])
def test_config_json_there_and_back(kind, dialect, toys):
    content = identify(toys.shapes("original", toys.kinds[kind]), "toy")
    config, _ = WAN.complete(content.config | {"num_heads": 2})
    said = WAN.read_config(WAN.write_config[dialect](config))
    assert said.items() <= config.items()
    assert WAN.complete(said | content.config)[0] == config


def test_an_image_among_the_text(toys):
    """diffusers can make a model whose layers have no keys and values for the image."""
    shapes = toys.shapes("original", toys.kinds["i2v"])
    layers = {name for name in shapes if "k_img" in name or "v_img" in name}
    content = identify({name: shape for name, shape in shapes.items() if name not in layers}, "x")
    assert (content.config["image_dim"], content.config["image_kv"]) == (20, False)
    assert WAN.write_config["diffusers"](WAN.complete(content.config)[0])["added_kv_proj_dim"] is None
    assert "image_kv" not in identify(shapes, "x").config
    with pytest.raises(ValueError, match="img_emb, which makes it, is missing"):
        identify({name: shape for name, shape in shapes.items() if not name.startswith("img_emb")}, "x")
