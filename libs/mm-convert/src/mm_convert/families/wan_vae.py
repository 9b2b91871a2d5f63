"""The VAEs of Wan: of 2.1 (`wan-vae`) and of 2.2 TI2V-5B (`wan2.2-vae`), which is wider and has a shortcut per level.

Neither has layers to count: every tensor of the two pyramids stands here by name. Our names are those of diffusers'
`AutoencoderKLWan` (`diffusers`); Wan-AI published `Wan2.1_VAE.pth` and `Wan2.2_VAE.pth` (`original`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_convert.families.family import Config, Family
from mm_convert.tensors.rules import Row, Table

WIDTHS = (1, 2, 4, 4)  # of the levels, times base_dim

Names = tuple[str, str]  # diffusers, original


def _row(names: Names, kind: str, shape: str) -> Row:
    return Row({"diffusers": f"{names[0]}.{kind}", "original": f"{names[1]}.{kind}"}, shape)


def _conv(diffusers: str, original: str, shape: str) -> list[Row]:
    """A weight of this shape and a bias as long as its first side."""
    names = (diffusers, original)
    return [_row(names, "weight", shape), _row(names, "bias", shape.split()[0])]


def _resnet(names: Names, out: str, into: str) -> list[Row]:
    d, o = names
    return [
        _row((f"{d}.norm1", f"{o}.residual.0"), "gamma", f"{into} 1 1 1"),
        *_conv(f"{d}.conv1", f"{o}.residual.2", f"{out} {into} 3 3 3"),
        _row((f"{d}.norm2", f"{o}.residual.3"), "gamma", f"{out} 1 1 1"),
        *_conv(f"{d}.conv2", f"{o}.residual.6", f"{out} {out} 3 3 3"),
        *(_conv(f"{d}.conv_shortcut", f"{o}.shortcut", f"{out} {into} 1 1 1") if out != into else []),
    ]


def _resample(names: Names, out: str, into: str, over_time: str) -> list[Row]:
    """Over rows and columns; `over_time`: the channels made where frames are halved or doubled as well, or nothing."""
    rows = _conv(f"{names[0]}.resample.1", f"{names[1]}.resample.1", f"{out} {into} 3 3")
    if over_time:
        rows += _conv(f"{names[0]}.time_conv", f"{names[1]}.time_conv", f"{over_time} {into} 3 1 1")
    return rows


def _middle(side: str, width: str) -> list[Row]:
    d, o = f"{side}.mid_block.attentions.0", f"{side}.middle.1"
    return [
        *_resnet((f"{side}.mid_block.resnets.0", f"{side}.middle.0"), width, width),
        _row((f"{d}.norm", f"{o}.norm"), "gamma", f"{width} 1 1"),
        *_conv(f"{d}.to_qkv", f"{o}.to_qkv", f"3*{width} {width} 1 1"),
        *_conv(f"{d}.proj", f"{o}.proj", f"{width} {width} 1 1"),
        *_resnet((f"{side}.mid_block.resnets.1", f"{side}.middle.2"), width, width),
    ]


def _head(side: str, width: str, out: str) -> list[Row]:
    return [
        _row((f"{side}.norm_out", f"{side}.head.0"), "gamma", f"{width} 1 1 1"),
        *_conv(f"{side}.conv_out", f"{side}.head.2", f"{out} {width} 3 3 3"),
    ]


def _encoder(nested: bool) -> list[Row]:
    """Nested, in 2.2, are the names: level and place. In 2.1 all places are counted in one go."""

    def names(level: int, place: int) -> Names:
        if not nested:
            return f"encoder.down_blocks.{3 * level + place}", f"encoder.downsamples.{3 * level + place}"
        inner = "downsampler" if place == 2 else f"resnets.{place}"
        return f"encoder.down_blocks.{level}.{inner}", f"encoder.downsamples.{level}.downsamples.{place}"

    width = "1*base_dim"
    rows = _conv("encoder.conv_in", "encoder.conv1", f"{width} in_channels 3 3 3")
    for level, factor in enumerate(WIDTHS):
        for place in (0, 1):
            into, width = width, f"{factor}*base_dim"
            rows += _resnet(names(level, place), width, into)
        if level < 3:
            rows += _resample(names(level, 2), width, width, over_time=width if level else "")
    return rows + _middle("encoder", width) + _head("encoder", width, "2*z_dim")


def _decoder(nested: bool) -> list[Row]:
    base = "decoder_base_dim" if nested else "base_dim"

    def names(level: int, place: int) -> Names:
        inner = f"resnets.{place}" if place < 3 else "upsampler" if nested else "upsamplers.0"
        number = f"{level}.upsamples.{place}" if nested else 4 * level + place
        return f"decoder.up_blocks.{level}.{inner}", f"decoder.upsamples.{number}"

    width = f"{WIDTHS[-1]}*{base}"
    rows = _conv("decoder.conv_in", "decoder.conv1", f"{width} z_dim 3 3 3") + _middle("decoder", width)
    for level, factor in enumerate(reversed(WIDTHS)):
        for place in (0, 1, 2):
            into, width = width, f"{factor}*{base}"
            rows += _resnet(names(level, place), width, into)
        if level < 3:  # the later version does not narrow here
            into, width = width, width if nested else f"{factor // 2}*{base}"
            rows += _resample(names(level, 3), width, into, over_time=f"2*{into}" if level < 2 else "")
    return rows + _head("decoder", width, "out_channels")


def _table(nested: bool) -> Table:
    between = _conv("quant_conv", "conv1", "2*z_dim 2*z_dim 1 1 1")
    between += _conv("post_quant_conv", "conv2", "z_dim z_dim 1 1 1")
    return Table([*_encoder(nested), *between, *_decoder(nested)])


def from_sizes(sizes: Mapping[str, int], groups: set[str], layers: Mapping[str, int]) -> Config:
    same = ("base_dim", "decoder_base_dim", "z_dim", "in_channels", "out_channels")
    return {field: sizes[field] for field in same if field in sizes}


# --- config.json of diffusers; Wan-AI publishes none

_SPELLINGS = ("base_dim", "decoder_base_dim", "z_dim", "in_channels", "out_channels", "latents_mean", "latents_std")


def read_config(json: Mapping[str, Any]) -> Config:
    """Our fields from a config.json of `AutoencoderKLWan`, only those that stand in it."""
    return {field: json[field] for field in _SPELLINGS if json.get(field) is not None}


def _complete(statistics: Mapping[str, list[float]], config: Config) -> tuple[Config, list[str]]:
    """The mean and the deviation of each latent channel, by which models want them normalised."""
    config, notes = dict(config), []
    for field, published in statistics.items():
        said, count = config.get(field), config["z_dim"]
        if said is not None and not _are_numbers(said, count):
            notes.append(f"{field} is said to be {said!r}, which is not {count} numbers: it is left out")
            del config[field]
        if field not in config and len(published) == count:
            config[field] = published
        elif field not in config:
            notes.append(f"{field} of {count} channels is unknown; a config.json beside the tensors could say it")
    return config, notes


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(v) in (int, float) for v in value)


def _write_diffusers(nested: bool, config: Config) -> Config:
    wider = {"decoder_base_dim": config["decoder_base_dim"], "patch_size": 2} if nested else {}
    return {
        "_class_name": "AutoencoderKLWan",
        **{field: config[field] for field in _SPELLINGS if field in config},
        **wider,
        "dim_mult": list(WIDTHS),
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "is_residual": nested,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 16 if nested else 8,
    }


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


STATISTICS = {
    "latents_mean": _numbers("""
        -0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497
        0.2503 -0.2921
    """),
    "latents_std": _numbers("""
        2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.916
    """),
}
STATISTICS_2_2 = {
    "latents_mean": _numbers("""
        -0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891 0.157 -0.0098 0.0375
        -0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 0.1567 -0.0729
        0.0899 -0.2799 -0.123 -0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.052 0.3748 0.0152 0.1957 0.1433 -0.2944
        0.3573 -0.0548 -0.1681 -0.0667
    """),
    "latents_std": _numbers("""
        0.4765 1.0364 0.4514 1.1677 0.5313 0.499 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454 0.4978
        0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093
        0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 0.3971 1.06 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
    """),
}


def _family(name: str, nested: bool, statistics: Mapping[str, list[float]], preset: str, sizes: Config) -> Family:
    return Family(
        name=name,
        table=_table(nested),
        from_sizes=from_sizes,
        read_config=read_config,
        write_config={"diffusers": partial(_write_diffusers, nested)},
        complete=partial(_complete, statistics),
        comfyui="original",
        presets={preset: sizes},
    )


WAN_VAE = _family(
    name="wan-vae",
    nested=False,
    statistics=STATISTICS,
    preset="wan2.1-vae",
    sizes={"base_dim": 96, "z_dim": 16, "in_channels": 3, "out_channels": 3},
)
WAN_2_2_VAE = _family(
    name="wan2.2-vae",
    nested=True,
    statistics=STATISTICS_2_2,
    preset="wan2.2-vae",
    sizes={"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12},
)
