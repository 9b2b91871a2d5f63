"""The causal VAE of Open-Sora-Plan 1.2. It has no layers to count: every tensor of its pyramids stands here by name.

MindSpeed-MM leaves the released names as they are. A causal convolution wraps another, hence `.conv.conv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_convert.families.family import Config, Family
from mm_convert.tensors.rules import Row, Table

WIDTHS = (1, 2, 4, 4)  # of the levels, times base_dim


def _row(name: str, shape: str) -> Row:
    return Row({"original": name, "mindspeed": name}, shape)


def _affine(name: str, shape: str) -> list[Row]:
    """A weight of this shape and a bias as long as its first side."""
    return [_row(f"{name}.weight", shape), _row(f"{name}.bias", shape.split()[0])]


def _conv(name: str, out: str, into: str, kernel: str = "3 3 3") -> list[Row]:
    """A causal convolution, or with a kernel of two sides a plain one, frame by frame."""
    wrapped = f"{name}.conv" if len(kernel.split()) == 3 else name
    return _affine(wrapped, f"{out} {into} {kernel}")


def _resnet(name: str, out: str, into: str, flat: bool = False) -> list[Row]:
    kernel, point = ("3 3", "1 1") if flat else ("3 3 3", "1 1 1")
    return [
        *_affine(f"{name}.norm1", into),
        *_conv(f"{name}.conv1", out, into, kernel),
        *_affine(f"{name}.norm2", out),
        *_conv(f"{name}.conv2", out, out, kernel),
        *(_conv(f"{name}.nin_shortcut", out, into, point) if out != into else []),
    ]


def _middle(side: str, width: str) -> list[Row]:
    attention = f"{side}.mid.attn_1"
    return [
        *_resnet(f"{side}.mid.block_1", width, width),
        *_affine(f"{attention}.norm", width),
        *(row for part in ("q", "k", "v", "proj_out") for row in _conv(f"{attention}.{part}", width, width, "1 1 1")),
        *_resnet(f"{side}.mid.block_2", width, width),
    ]


def _encoder() -> list[Row]:
    rows, width = _conv("encoder.conv_in", "1*base_dim", "channels", "3 3"), "1*base_dim"
    for level, factor in enumerate(WIDTHS):
        for block in range(2):
            into, width = width, f"{factor}*base_dim"
            rows += _resnet(f"encoder.down.{level}.block.{block}", width, into, flat=level < 2)
        if level < 3:  # the first halves rows and columns, the next two frames as well
            rows += _conv(f"encoder.down.{level}.downsample.conv", width, width, "3 3 3" if level else "3 3")
    rows += _middle("encoder", width) + _affine("encoder.norm_out", width)
    return rows + _conv("encoder.conv_out", "2*z_channels", width)


def _decoder() -> list[Row]:
    width = f"{WIDTHS[-1]}*base_dim"
    rows = _conv("decoder.conv_in", width, "z_channels") + _middle("decoder", width)
    for level, factor in reversed(list(enumerate(WIDTHS))):
        for block in range(3):
            into, width = width, f"{factor}*base_dim"
            rows += _resnet(f"decoder.up.{level}.block.{block}", width, into)
        if level:  # the last doubles rows and columns only
            rows += _conv(f"decoder.up.{level}.upsample.conv", width, width, "3 3 3" if level > 1 else "1 3 3")
    return rows + _affine("decoder.norm_out", width) + _conv("decoder.conv_out", "channels", width)


TABLE = Table(
    rows=[
        *_encoder(),
        *_decoder(),
        *_conv("quant_conv", "2*embed_dim", "2*z_channels", "1 1 1"),
        *_conv("post_quant_conv", "z_channels", "embed_dim", "1 1 1"),
    ],
)


def from_sizes(sizes: Mapping[str, int], groups: set[str], layers: Mapping[str, int]) -> Config:
    return {field: sizes[field] for field in ("base_dim", "channels", "z_channels", "embed_dim")}


_SPELLINGS = {
    "base_dim": ("hidden_size",),
    "channels": ("in_channels", "out_channels"),
    "z_channels": ("z_channels",),
    "embed_dim": ("embed_dim",),
}


def read_config(json: Mapping[str, Any]) -> Config:
    """Our fields from a config.json of `CausalVAEModel`, only those that stand in it.

    `attention` stands there for the older kind alone: its tensors are the same, and what it computes is not.
    ValueError for a VAE of other blocks, whose tensors may have the same names too.
    """
    for key, published in _BLOCKS.items():
        if json.get(key, published) != published:
            raise ValueError(f"{key} is {json[key]!r}, and must be {published!r}: it is no VAE of Open-Sora-Plan 1.2")
    kinds = [json.get(key, _FIXED) for key in _ATTENTION]
    if kinds not in ([_FIXED] * 2, [_OLDER] * 2):
        raise ValueError(
            f"{' and '.join(_ATTENTION)} are {kinds[0]!r} and {kinds[1]!r}, and must both be {_FIXED}, or both {_OLDER}"
        )
    attention = {"attention": _OLDER} if kinds[0] == _OLDER else {}
    return attention | {ours: json[theirs[0]] for ours, theirs in _SPELLINGS.items() if json.get(theirs[0]) is not None}


_FIXED, _OLDER = "AttnBlock3DFix", "AttnBlock3D"
_ATTENTION = ("encoder_attention", "decoder_attention")
_BLOCKS = {
    "q_conv": "CausalConv3d",
    "encoder_conv_in": "Conv2d",
    "encoder_conv_out": "CausalConv3d",
    "encoder_resnet_blocks": ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"],
    "encoder_mid_resnet": "ResnetBlock3D",
    "encoder_spatial_downsample": ["Downsample", *["Spatial2xTime2x3DDownsample"] * 2, ""],
    "encoder_temporal_downsample": [""] * 4,
    "decoder_conv_in": "CausalConv3d",
    "decoder_conv_out": "CausalConv3d",
    "decoder_resnet_blocks": ["ResnetBlock3D"] * 4,
    "decoder_mid_resnet": "ResnetBlock3D",
    "decoder_spatial_upsample": ["", "SpatialUpsample2x", *["Spatial2xTime2x3DUpsample"] * 2],
    "decoder_temporal_upsample": [""] * 4,
}


def _write_original(config: Config) -> Config:
    return {
        "_class_name": "CausalVAEModel",
        **{theirs: config[ours] for ours, spellings in _SPELLINGS.items() for theirs in spellings},
        "hidden_size_mult": list(WIDTHS),
        "num_res_blocks": 2,
        "double_z": True,
        "dropout": 0.0,
        "attn_resolutions": [],
        "resolution": 256,
        "use_quant_layer": True,
        **dict.fromkeys(_ATTENTION, config.get("attention", _FIXED)),
        **_BLOCKS,
    }


OPENSORAPLAN_VAE = Family(
    name="opensoraplan-vae",
    table=TABLE,
    from_sizes=from_sizes,
    read_config=read_config,
    write_config={"original": _write_original},
    complete=lambda config: (config, []),
    presets={"opensoraplan-1.2-vae": {"base_dim": 128, "channels": 3, "z_channels": 4, "embed_dim": 4}},
    mindspeed_file="casualvae_mm.pt",
)
