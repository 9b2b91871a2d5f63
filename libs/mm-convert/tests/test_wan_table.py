"""The table of Wan's names and shapes against published fingerprints, counts, and diffusers' own model."""

from __future__ import annotations

from math import prod

import pytest

from mm_convert.content import fingerprint, understand
from mm_convert.families import WAN

SMALL = dict(dim=1536, ffn_dim=8960, layers=30)
LARGE = dict(dim=5120, ffn_dim=13824, layers=40)
_KINDS = ("weight", "bias")
COMMON = dict(freq_dim=256, text_dim=4096, in_channels=16, out_channels=16)

# sizes, md5 of the published original files, parameters, tensors
PUBLISHED = {
    "t2v-1.3b": (SMALL, "9269f8db9040a9d860eaca435be61814", 1_418_996_800, 825),
    "t2v-14b": (LARGE, "aafcfd9672c3a2456dc46e1cb6e52c70", 14_288_491_584, 1095),
    "i2v-14b": (LARGE | dict(in_channels=36, image_dim=1280), "6bfcfb3b342cb286ce886889d519a77e", 16_394_878_784, 1303),
    "i2v-1.3b": (SMALL | dict(in_channels=36, image_dim=1280), "6d6ccde6845b95ad9114ab993d917893", 1_564_428_608, 983),
    "flf2v-14b": (
        LARGE | dict(in_channels=36, image_dim=1280, image_tokens=514),
        "3ef3b1f8e1dab83d5b71fd7b617f859f",
        16_395_536_704,
        1304,
    ),
    "ti2v-5b": (
        dict(dim=3072, ffn_dim=14336, layers=30, in_channels=48, out_channels=48),
        "1f5ab7703c6fc803fdded85ff040c316",
        4_999_787_712,
        825,
    ),
    "i2v-a14b": (LARGE | dict(in_channels=36), "5b013604280dd715f8457c6ed6d6a626", 14_288_901_184, 1095),
}


@pytest.mark.parametrize("dialect", ["diffusers", "mindspeed"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_other_names_become_the_published_original(name, dialect, toys):
    sizes, md5, parameters, tensors = PUBLISHED[name]
    theirs = toys.shapes(dialect, COMMON | sizes)
    content = understand(theirs, name)
    ours = {content.names[key]: shape for key, shape in theirs.items()}
    assert (content.family.name, content.dialect) == ("wan", dialect)
    assert fingerprint(ours) == md5
    assert sum(map(prod, ours.values())) == parameters
    assert len(ours) == tensors
    assert content.translate(dialect) == {ours: theirs for theirs, ours in content.names.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_read_from_the_shapes(name, toys):
    sizes, *_ = PUBLISHED[name]
    config = understand(toys.shapes("original", COMMON | sizes), name).config
    expected = {"image_dim": None, "image_tokens": 257, "patch_size": [1, 2, 2], **COMMON, **sizes}
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


def test_the_published_names_of_diffusers(toys):
    assert fingerprint(toys.shapes("diffusers", COMMON | LARGE)) == "cb104773c6c2cb6df4f9529ad5c60d0b"


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
    content = understand(toys.shapes("original", toys.kinds["t2v"]), "toy")
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
    content = understand(toys.shapes("original", toys.kinds["t2v"]), "toy")
    said = WAN.read_config({"num_attention_heads": heads, "attention_head_dim": 12})
    assert "num_heads" not in WAN.complete(said | content.config)[0]


@pytest.mark.parametrize("dialect", ["original", "diffusers"])
@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "wide"])
def test_config_json_there_and_back(kind, dialect, toys):
    content = understand(toys.shapes("original", toys.kinds[kind]), "toy")
    config, _ = WAN.complete(content.config | {"num_heads": 2})
    said = WAN.read_config(WAN.write_config[dialect](config))
    assert said.items() <= config.items()
    assert WAN.complete(said | content.config)[0] == config
