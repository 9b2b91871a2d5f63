"""Open-Sora-Plan 1.2 transformers.

Our names are the released ones (`original`), of the class `OpenSoraT2V`; diffusers' `AllegroTransformer3DModel` has the
same. MindSpeed-MM renames inside of the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_convert.families.family import Config, Cuts, Family, Ladder
from mm_convert.families.fields import is_count, is_small, settle, settle_heads
from mm_convert.files import brief
from mm_convert.tensors.rules import Row, Table


def _row(original: str, shape: str, mindspeed: str = "") -> Row:
    return Row({"original": original, "mindspeed": mindspeed or original}, shape)


def _affine(original: str, shape: str, mindspeed: str = "") -> list[Row]:
    """A weight of this shape and a bias as long as its first side."""
    sides = {"weight": shape, "bias": shape.split()[0]}
    return [_row(f"{original}.{kind}", side, f"{mindspeed or original}.{kind}") for kind, side in sides.items()]


_O, _M = "transformer_blocks.{i}.", "videodit_blocks.{i}."


def _attention(original: str, mindspeed: str) -> list[Row]:
    return [
        *_affine(f"{_O}{original}.to_q", "dim dim", f"{_M}{mindspeed}.proj_q"),
        *_affine(f"{_O}{original}.to_k", "dim dim", f"{_M}{mindspeed}.proj_k"),
        *_affine(f"{_O}{original}.to_v", "dim dim", f"{_M}{mindspeed}.proj_v"),
        *_affine(f"{_O}{original}.to_out.0", "dim dim", f"{_M}{mindspeed}.proj_out"),
    ]


TABLE = Table(
    rows=[
        # stem
        *_affine("pos_embed.proj", "dim in_channels patch patch"),
        *_affine("adaln_single.emb.timestep_embedder.linear_1", "dim freq_dim"),
        *_affine("adaln_single.emb.timestep_embedder.linear_2", "dim dim"),
        *_affine("adaln_single.linear", "6*dim dim"),
        *_affine("caption_projection.linear_1", "dim text_dim"),
        *_affine("caption_projection.linear_2", "dim dim"),
        # layer i
        _row(_O + "scale_shift_table", "6 dim", _M + "scale_shift_table"),
        *_attention("attn1", "self_atten"),
        *_attention("attn2", "cross_atten"),
        *_affine(_O + "ff.net.0.proj", "ffn_dim dim", _M + "ff.net.0.proj"),
        *_affine(_O + "ff.net.2", "dim ffn_dim", _M + "ff.net.2"),
        # head
        _row("scale_shift_table", "2 dim"),
        *_affine("proj_out", "patch*patch*out_channels dim"),
    ],
)

HEAD_DIM = 96  # of the published weights; the shapes do not tell the number of heads
PREDICTION_TYPES = ("epsilon", "v_prediction")
USUAL: Config = {"text_tokens": 512, "prediction_type": "epsilon"}  # of the published weights, which do not say so


def from_sizes(sizes: Mapping[str, int], groups: set[str], layers: Mapping[str, int]) -> Config:
    config: Config = {k: sizes[k] for k in ("dim", "ffn_dim", "freq_dim", "text_dim", "in_channels", "out_channels")}
    return config | {"num_layers": layers["i"], "patch_size": [1, sizes["patch"], sizes["patch"]]}


def complete(config: Config) -> tuple[Config, list[str]]:
    """`interpolation_scale` and `sample_size` are frames, rows and columns; the latter of latents, None where it is
    said that there is none.

    Published weights differ in both, so nothing is assumed where nothing is said: both stay absent then.
    """
    config = dict(config)
    notes = settle(config, "eps", 1e-6, is_small)
    if "interpolation_scale" in config:
        notes += settle(config, "interpolation_scale", [1.0, 1.0, 1.0], _are_scales)
    size = config.get("sample_size")
    if size is not None and not _are_counts(size):
        notes.append(f"sample_size is said to be {brief(size)}, which cannot be: it is left out")
        del config["sample_size"]
    notes += settle(config, "text_tokens", USUAL["text_tokens"], is_count)
    notes += settle(config, "prediction_type", USUAL["prediction_type"], lambda value: value in PREDICTION_TYPES)
    return config, notes + settle_heads(config, HEAD_DIM)


def _are_scales(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) and v > 0 for v in value)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(is_count, value))


# --- config.json, as it is published

_SPELLINGS = {
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "text_dim": "caption_channels",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "eps": "norm_eps",
    "text_tokens": "text_tokens",
    "prediction_type": "prediction_type",
}
_SCALES = ("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w")
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_single",
    "patch_size_t": 1,
    "use_rope": True,
}
# Other attention with the same tensors, as in version 1.3
_WITHOUT = ("sparse1d", "only_cross_attention", "double_self_attention")


def read_config(json: Mapping[str, Any]) -> Config:
    """Our fields from a config.json of `OpenSoraT2V`, or of diffusers' Allegro, only those that stand in it."""
    for key, value in {**_FIXED, **dict.fromkeys(_WITHOUT, False)}.items():
        if json.get(key, value) != value:
            raise ValueError(f"{key} is {json[key]!r}; of Open-Sora-Plan 1.2 only {value!r} is published and supported")
    found = {ours: json[theirs] for ours, theirs in _SPELLINGS.items() if json.get(theirs) is not None}
    heads, head_dim = json.get("num_attention_heads"), json.get("attention_head_dim")
    if is_count(heads) and is_count(head_dim):
        found["dim"] = heads * head_dim
    frames, size = (json.get(key, "unsaid") for key in ("sample_size_t", "sample_size"))
    size = [size, size] if is_count(size) else size
    if isinstance(size, list) and frames not in (None, "unsaid"):
        found["sample_size"] = [frames, *size]
    elif frames is size is None:  # it is said that there is none
        found["sample_size"] = None
    scales = [json.get(scale) for scale in _SCALES]
    if None in scales and set(_SCALES) <= json.keys() and _are_counts(found.get("sample_size")):
        usual = _scales_of(*found["sample_size"])
        scales = [theirs if said is None else said for said, theirs in zip(scales, usual, strict=True)]
    if None not in scales:
        found["interpolation_scale"] = scales
    return found


def _scales_of(frames: int, rows: int, columns: int) -> list[float]:
    """What `OpenSoraT2V` makes of null: scales that follow from the size of its latents."""
    return [(frames - 1) // 16 + 1.0 if frames % 2 else frames / 16, rows / 30, columns / 40]


def _is_written(field: str, config: Config) -> bool:
    """The fields that are not published are written only where they are unusual."""
    return config[field] != USUAL.get(field)


def _write_original(config: Config) -> Config:
    heads, scales = config.get("num_heads"), config.get("interpolation_scale")
    frames, *size = config.get("sample_size") or [None]
    return {
        "_class_name": "OpenSoraT2V",
        **{theirs: config[ours] for ours, theirs in _SPELLINGS.items() if ours in config and _is_written(ours, config)},
        **({"attention_head_dim": config["dim"] // heads} if heads else {}),
        **_FIXED,
        **(dict(zip(_SCALES, scales, strict=True)) if scales else {}),
        **({"sample_size_t": frames, "sample_size": size or None} if "sample_size" in config else {}),
        "cross_attention_dim": config["dim"],
        "patch_size": config["patch_size"][1],
    }


NAMES = ("opensoraplan-1.2", *(f"opensoraplan-1.2-{size}" for size in ("29x480p", "93x720p", "29x720p")))
PUBLISHED: Config = {  # other trainings, the same shapes
    "dim": 2304,
    "ffn_dim": 9216,
    "num_layers": 32,
    "text_dim": 4096,
    "in_channels": 4,
    "out_channels": 4,
}

OPENSORAPLAN = Family(
    name="opensoraplan",
    table=TABLE,
    from_sizes=from_sizes,
    read_config=read_config,
    write_config={"original": _write_original},
    complete=complete,
    presets=dict.fromkeys(NAMES, PUBLISHED),
    cuts=Cuts(
        ladders=(Ladder("layers", "videodit_blocks.", first=("",), last=("proj_out.", "scale_shift_table")),),
        rows=(
            *(f"*atten.proj_{name}.{kind}" for name in "qkv" for kind in ("weight", "bias")),
            *(f"*.ff.net.0.proj.{kind}" for kind in ("weight", "bias")),
        ),
        columns=("*atten.proj_out.weight", "*.ff.net.2.weight"),
        divides={"heads": "num_heads", "feed-forward channels": "ffn_dim"},
    ),
)
