"""The tables of Open-Sora-Plan 1.2 against diffusers' classes and MindSpeed-MM's names."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from mm_convert.families import OPENSORAPLAN, OPENSORAPLAN_VAE
from mm_convert.read.content import identify

TOY = dict(dim=48, ffn_dim=192, freq_dim=256, text_dim=32, in_channels=4, out_channels=6, patch=2)
LAYERS = {"i": 3}


def shapes(dialect: str = "original") -> dict[str, tuple[int, ...]]:
    return OPENSORAPLAN.table.shapes(dialect, TOY, LAYERS)


def test_names_and_shapes_are_those_of_diffusers_allegro():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=3,
            out_channels=6,
            cross_attention_dim=48,
            caption_channels=32,
        )
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes()


def test_the_names_of_mindspeed():
    content = identify(shapes("mindspeed"), "toy")
    assert (content.family.name, content.dialect) == ("opensoraplan", "mindspeed")
    # as its script renames: one word after the other, anywhere in the name
    words = {"transformer_blocks": "videodit_blocks", "attn1": "self_atten", "attn2": "cross_atten"}
    words |= {"to_q": "proj_q", "to_k": "proj_k", "to_v": "proj_v", "to_out.0": "proj_out"}
    for theirs, ours in content.names.items():
        for word, other in words.items():
            ours = ours.replace(word, other)
        assert ours == theirs
    assert list(content.names.values()) == list(shapes())


def test_config_json_there_and_back():
    content = identify(shapes(), "toy")
    said = {"num_heads": 2, "interpolation_scale": [1.0, 1.5, 2.0], "sample_size": [5, 8, 12]}
    config, notes = OPENSORAPLAN.complete(content.config | said)
    assert not notes
    json = OPENSORAPLAN.write_config["original"](config)
    assert (json["attention_head_dim"], json["cross_attention_dim"], json["patch_size"]) == (24, 48, 2)
    read = OPENSORAPLAN.read_config(json)
    assert read.items() <= config.items()
    assert OPENSORAPLAN.complete(read | content.config) == (config, [])


def test_what_is_predicted_and_how_much_text_is_read():
    """Both are not published, and usual where nothing is said: they are written only where they are not."""
    content = identify(shapes(), "toy")
    usual, _ = OPENSORAPLAN.complete(content.config | {"num_heads": 2})
    assert (usual["prediction_type"], usual["text_tokens"]) == ("epsilon", 512)
    assert not {"prediction_type", "text_tokens"} & set(OPENSORAPLAN.write_config["original"](usual))
    said = {"prediction_type": "v_prediction", "text_tokens": 300}
    json = OPENSORAPLAN.write_config["original"](usual | said)
    assert said.items() <= OPENSORAPLAN.read_config(json).items()
    config, notes = OPENSORAPLAN.complete(usual | {"prediction_type": "x", "text_tokens": 0})
    assert config == usual
    assert len(notes) == 2


def test_nothing_is_assumed_of_size_and_scale():
    """Weights of 29 frames and of 93, of 480p and of 720p have the same tensors."""
    content = identify(shapes(), "toy")
    config, _ = OPENSORAPLAN.complete(content.config | {"num_heads": 2})
    assert not {"sample_size", "interpolation_scale"} & set(config)
    json = OPENSORAPLAN.write_config["original"](config)
    assert not {"sample_size", "sample_size_t", "interpolation_scale_h"} & set(json)
    assert OPENSORAPLAN.complete(config | {"sample_size": None})[0] == config | {"sample_size": None}  # of any size


@pytest.mark.parametrize(
    ("said", "size", "scales"),
    [
        ((24, [60, 80], None, None, None), [24, 60, 80], [1.5, 2.0, 2.0]),
        ((8, [90, 160], 1.0, None, None), [8, 90, 160], [1.0, 3.0, 4.0]),
        ((17, 60, None, 1.5, None), [17, 60, 60], [2.0, 1.5, 1.5]),
        ((1, [60, 80], None, 1.0, 1.0), [1, 60, 80], [1.0, 1.0, 1.0]),
    ],
)
def test_scales_that_are_null_follow_from_the_size(said, size, scales):
    """As `OpenSoraT2V` of v1.2.0 makes them of latents: frames / 16 (odd ones by whole 16), rows / 30, columns / 40."""
    names = ("sample_size_t", "sample_size", "interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w")
    read = OPENSORAPLAN.read_config(dict(zip(names, said, strict=True)))
    assert (read["sample_size"], read["interpolation_scale"]) == (size, scales)
    without_size = dict(zip(names[2:], said[2:], strict=True))
    assert "interpolation_scale" not in OPENSORAPLAN.read_config(without_size)


def test_values_that_cannot_be_are_left_out_and_said():
    content = identify(shapes(), "toy")
    said = {"num_heads": 5, "interpolation_scale": [1.0, "2"], "sample_size": [0, 8, 12], "eps": 3}
    config, notes = OPENSORAPLAN.complete(said | content.config)
    assert len(notes) == 5  # and that the number of heads is unknown
    assert (config["interpolation_scale"], config["eps"]) == ([1.0, 1.0, 1.0], 1e-6)
    assert "sample_size" not in config  # None would say that there is no such size
    json = OPENSORAPLAN.write_config["original"](config)
    assert not {"num_attention_heads", "attention_head_dim", "sample_size"} & set(json)


@pytest.mark.parametrize(("key", "value"), [("use_rope", False), ("sparse1d", True), ("only_cross_attention", True)])
def test_a_config_json_of_another_network_is_refused(key, value):
    """Also of version 1.3, whose sparse attention has the same tensors."""
    with pytest.raises(ValueError, match=f"{key} is {value}"):
        OPENSORAPLAN.read_config({key: value})


@pytest.mark.parametrize("size", [None, [24, 60, 80]])
def test_that_there_is_no_size_is_said_too(size):
    config = {"dim": 48, "patch_size": [1, 2, 2], "eps": 1e-6, "sample_size": size}
    assert OPENSORAPLAN.read_config(OPENSORAPLAN.write_config["original"](config))["sample_size"] == size
    del config["sample_size"]
    assert "sample_size" not in OPENSORAPLAN.read_config(OPENSORAPLAN.write_config["original"](config))
    assert "sample_size" not in OPENSORAPLAN.read_config({"sample_size": [60, 80]})  # and of how many frames?


def test_cuts_name_what_there_is():
    cuts, names = OPENSORAPLAN.cuts, shapes("mindspeed")
    rows = [name for name in names if any(fnmatchcase(name, pattern) for pattern in cuts.rows)]
    columns = [name for name in names if any(fnmatchcase(name, pattern) for pattern in cuts.columns)]
    assert len(rows) == 3 * (2 * 3 * 2 + 2)  # layers x (attentions x q, k, v x weight, bias; feed-forward)
    assert len(columns) == 3 * 3
    assert not any(name.endswith("bias") for name in columns)


# --- the VAE


def vae_shapes() -> dict[str, tuple[int, ...]]:
    return OPENSORAPLAN_VAE.table.shapes("original", dict(base_dim=32, channels=3, z_channels=4, embed_dim=4), {})


def test_the_vae_is_that_of_diffusers_but_for_time():
    """Every tensor of diffusers' AutoencoderKL of the same widths has its like, with kernels over time added."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        flat = diffusers.AutoencoderKL(
            block_out_channels=(32, 64, 128, 128),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
        ).state_dict()
    words = {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1", "norm_out": "conv_norm_out"}
    words |= {"mid.attn_1.norm": "mid_block.attentions.0.group_norm", "nin_shortcut": "conv_shortcut"}
    words |= {f"mid.attn_1.{part}": f"mid_block.attentions.0.to_{part}" for part in "qkv"}
    words |= {"mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0", ".conv.conv.": ".conv."}
    words |= {f"down.{n}.block": f"down_blocks.{n}.resnets" for n in range(4)}
    words |= {f"down.{n}.downsample": f"down_blocks.{n}.downsamplers.0" for n in range(4)}
    words |= {f"up.{n}.block": f"up_blocks.{3 - n}.resnets" for n in range(4)}
    words |= {f"up.{n}.upsample": f"up_blocks.{3 - n}.upsamplers.0" for n in range(4)}
    found = {}
    for name, shape in vae_shapes().items():
        for word, other in words.items():
            name = name.replace(word, other)
        if len(shape) == 5 and "samplers" not in name:
            name = name.removesuffix(".conv.weight") + ".weight"
        elif "samplers" not in name:
            name = name.removesuffix(".conv.bias") + ".bias" if name.endswith(".conv.bias") else name
        spatial = shape if len(shape) < 5 else shape[:2] + shape[3:]
        found[name] = spatial[:2] if ".to_" in name else spatial
    assert found == {name: tuple(tensor.shape) for name, tensor in flat.items()}


def test_config_json_of_the_vae_there_and_back():
    content = identify(vae_shapes(), "toy")
    assert content.family.name == "opensoraplan-vae"
    assert content.config == {"base_dim": 32, "channels": 3, "z_channels": 4, "embed_dim": 4}
    json = OPENSORAPLAN_VAE.write_config["original"](content.config)
    assert OPENSORAPLAN_VAE.read_config(json) == content.config
