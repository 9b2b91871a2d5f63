"""Wan2.1 and Wan2.2 transformers: text, image and first-and-last-frame to video.

Names and shapes after Wan-AI's published files (`original`), diffusers' `WanTransformer3DModel` (`diffusers`) and
MindSpeed-MM's `WanDiT` (`mindspeed`). Our own names are the original ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_convert.families.family import Config, Cuts, Family, Ladder
from mm_convert.families.fields import is_count, is_small, settle, settle_heads
from mm_convert.tensors.rules import Row, Table


def _row(original: str, diffusers: str, shape: str, group: str = "", *, mindspeed: str = "") -> Row:
    """MindSpeed-MM's name is the original one where none is given."""
    return Row({"original": original, "diffusers": diffusers, "mindspeed": mindspeed or original}, shape, group)


def affine(original: str, diffusers: str, shape: str, group: str = "", *, mindspeed: str = "") -> list[Row]:
    """A weight of this shape and a bias as long as its first side."""
    mindspeed = mindspeed or original
    return [
        _row(f"{original}.weight", f"{diffusers}.weight", shape, group, mindspeed=f"{mindspeed}.weight"),
        _row(f"{original}.bias", f"{diffusers}.bias", shape.split()[0], group, mindspeed=f"{mindspeed}.bias"),
    ]


def _attention(original: str, diffusers: str) -> list[Row]:
    o, d = "blocks.{i}." + original, "blocks.{i}." + diffusers
    return [
        *affine(f"{o}.q", f"{d}.to_q", "dim dim", mindspeed=f"{o}.proj_q"),
        *affine(f"{o}.k", f"{d}.to_k", "dim dim", mindspeed=f"{o}.proj_k"),
        *affine(f"{o}.v", f"{d}.to_v", "dim dim", mindspeed=f"{o}.proj_v"),
        *affine(f"{o}.o", f"{d}.to_out.0", "dim dim", mindspeed=f"{o}.proj_out"),
        _row(f"{o}.norm_q.weight", f"{d}.norm_q.weight", "dim", mindspeed=f"{o}.q_norm.weight"),
        _row(f"{o}.norm_k.weight", f"{d}.norm_k.weight", "dim", mindspeed=f"{o}.k_norm.weight"),
    ]


_TEXT, _TIME, _IMAGE = (f"condition_embedder.{part}_embedder" for part in ("text", "time", "image"))

TABLE = Table(
    rows=[
        # stem
        *affine("patch_embedding", "patch_embedding", "dim in_channels patch_t patch_h patch_w"),
        *affine("text_embedding.0", f"{_TEXT}.linear_1", "dim text_dim", mindspeed="text_embedding.linear_1"),
        *affine("text_embedding.2", f"{_TEXT}.linear_2", "dim dim", mindspeed="text_embedding.linear_2"),
        *affine("time_embedding.0", f"{_TIME}.linear_1", "dim freq_dim"),
        *affine("time_embedding.2", f"{_TIME}.linear_2", "dim dim"),
        *affine("time_projection.1", "condition_embedder.time_proj", "6*dim dim"),
        *affine("img_emb.proj.0", f"{_IMAGE}.norm1", "image_dim", "image"),
        *affine("img_emb.proj.1", f"{_IMAGE}.ff.net.0.proj", "image_dim image_dim", "image"),
        *affine("img_emb.proj.3", f"{_IMAGE}.ff.net.2", "dim image_dim", "image"),
        *affine("img_emb.proj.4", f"{_IMAGE}.norm2", "dim", "image"),
        _row("img_emb.emb_pos", f"{_IMAGE}.pos_embed", "1 image_tokens image_dim", "image positions"),
        # layer i
        _row("blocks.{i}.modulation", "blocks.{i}.scale_shift_table", "1 6 dim"),
        *_attention("self_attn", "attn1"),
        *affine("blocks.{i}.norm3", "blocks.{i}.norm2", "dim"),  # before cross-attention; 1 and 2 have no tensors
        *_attention("cross_attn", "attn2"),
        *affine("blocks.{i}.cross_attn.k_img", "blocks.{i}.attn2.add_k_proj", "dim dim", "image kv"),
        *affine("blocks.{i}.cross_attn.v_img", "blocks.{i}.attn2.add_v_proj", "dim dim", "image kv"),
        _row(
            "blocks.{i}.cross_attn.norm_k_img.weight",
            "blocks.{i}.attn2.norm_added_k.weight",
            "dim",
            "image kv",
            mindspeed="blocks.{i}.cross_attn.k_norm_img.weight",
        ),
        *affine("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj", "ffn_dim dim"),
        *affine("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2", "dim ffn_dim"),
        # head
        _row("head.modulation", "scale_shift_table", "1 2 dim"),
        *affine("head.head", "proj_out", "patch_t*patch_h*patch_w*out_channels dim"),
    ],
    ignored={
        "diffusers": {"blocks.{i}.attn2.norm_added_q.weight": "zeros that no model reads, in the published I2V files"}
    },
)

HEAD_DIM = 128  # of every published Wan; the shapes do not tell the number of heads
IMAGE_TOKENS = 257  # of one CLIP picture


def from_sizes(sizes: Mapping[str, int], groups: set[str], layers: Mapping[str, int]) -> Config:
    config: Config = {k: sizes[k] for k in ("dim", "ffn_dim", "freq_dim", "text_dim", "in_channels", "out_channels")}
    config["num_layers"] = layers["i"]
    config["patch_size"] = [sizes["patch_t"], sizes["patch_h"], sizes["patch_w"]]
    config["image_dim"] = sizes["image_dim"] if "image" in groups else None
    if "image kv" in groups and "image" not in groups:
        raise ValueError("the layers read an image (cross_attn.k_img), but img_emb, which makes it, is missing")
    if "image" in groups and "image kv" not in groups:
        config["image_kv"] = False  # as nobody has published it, but diffusers can make it
    config["image_tokens"] = sizes["image_tokens"] if "image positions" in groups else IMAGE_TOKENS
    if "image positions" in groups and config["image_tokens"] <= IMAGE_TOKENS:
        config["image_positions"] = True  # of two images, which a smaller CLIP than Wan's has seen
    return config


def has_positions(config: Config) -> bool:
    """Whether there is a position for each image token: so it is where a first and a last image are seen."""
    stated = config.get("image_positions")
    return config["image_tokens"] > IMAGE_TOKENS if stated is None else stated


def complete(config: Config) -> tuple[Config, list[str]]:
    config = dict(config)
    notes = settle(config, "eps", 1e-6, is_small) + settle(config, "text_tokens", 512, is_count)
    return config, notes + settle_heads(config, HEAD_DIM)


# --- config.json, as it is published

# ours: (diffusers, original). Not published, and written only where unusual: text_dim, patch_size and image_tokens of
# the original files, which their tensors tell, and text_len of diffusers, whose pipeline always pads to 512.
_SPELLINGS = {
    "dim": ("dim", "dim"),
    "ffn_dim": ("ffn_dim", "ffn_dim"),
    "num_heads": ("num_attention_heads", "num_heads"),
    "num_layers": ("num_layers", "num_layers"),
    "freq_dim": ("freq_dim", "freq_dim"),
    "text_dim": ("text_dim", "text_dim"),
    "in_channels": ("in_channels", "in_dim"),
    "out_channels": ("out_channels", "out_dim"),
    "patch_size": ("patch_size", "patch_size"),
    "eps": ("eps", "eps"),
    "image_tokens": ("pos_embed_seq_len", "pos_embed_seq_len"),
    "text_tokens": ("text_len", "text_len"),
}
_USUAL_DIFFUSERS = {"text_tokens": 512}
_USUAL_ORIGINAL = {"text_dim": 4096, "patch_size": [1, 2, 2]}
_FIXED = {"cross_attn_norm": (True,), "qk_norm": ("rms_norm_across_heads", True)}


def read_config(json: Mapping[str, Any]) -> Config:
    """Our fields from a published config.json of either spelling, only those that stand in it."""
    for key, values in _FIXED.items():
        if key in json and json[key] not in values:
            raise ValueError(f"{key} is {json[key]!r}; of Wan only {values[0]!r} is published and supported")
    found = {
        ours: json[spelling]
        for ours, spellings in _SPELLINGS.items()
        for spelling in spellings
        if json.get(spelling) is not None
    }
    heads, head_dim = found.get("num_heads"), json.get("attention_head_dim")
    if is_count(heads) and is_count(head_dim):
        found["dim"] = heads * head_dim
    return found


def write_diffusers(config: Config) -> Config:
    image, positions = config["image_dim"] is not None, has_positions(config)
    json = {
        theirs: config[ours]
        for ours, (theirs, _) in _SPELLINGS.items()
        if ours in config and ours not in ("dim", "image_tokens") and config[ours] != _USUAL_DIFFUSERS.get(ours)
    }
    head_dim = {"attention_head_dim": config["dim"] // config["num_heads"]} if "num_heads" in config else {}
    return {
        "_class_name": "WanTransformer3DModel",
        **json,
        **head_dim,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": config["image_dim"],
        "added_kv_proj_dim": config["dim"] if image and config.get("image_kv", True) else None,
        "pos_embed_seq_len": config["image_tokens"] if image and positions else None,
        "rope_max_seq_len": 1024,
    }


def write_original(config: Config) -> Config:
    json = {
        theirs: config[ours]
        for ours, (_, theirs) in _SPELLINGS.items()
        if ours in config and ours != "image_tokens" and config[ours] != _USUAL_ORIGINAL.get(ours)
    }
    return {"_class_name": "WanModel", "model_type": _model_type(config), **json}


def _model_type(config: Config) -> str:
    if config["image_dim"] is not None:
        return "flf2v" if has_positions(config) else "i2v"
    if config["in_channels"] > config["out_channels"]:
        return "i2v"  # Wan2.2: the picture comes through the channels alone
    return "ti2v" if config["in_channels"] == 48 else "t2v"


# --- how training splits it, and what is published

TP_ROWS = tuple(
    f"*attn.{name}.{kind}" for name in ("proj_q", "proj_k", "proj_v", "k_img", "v_img") for kind in ("weight", "bias")
)
TP_COLUMNS = ("*attn.proj_out.weight",)
DIVIDES = {"heads": "num_heads"}

SMALL: Config = {"dim": 1536, "ffn_dim": 8960, "num_layers": 30, "in_channels": 16, "out_channels": 16}
LARGE: Config = {"dim": 5120, "ffn_dim": 13824, "num_layers": 40, "in_channels": 16, "out_channels": 16}
_NO_CLIP: Config = {"image_dim": None, "image_tokens": IMAGE_TOKENS}
_CLIP: Config = {"in_channels": 36, "image_dim": 1280, "image_tokens": IMAGE_TOKENS}

PRESETS: dict[str, Config] = {
    "wan2.1-t2v-1.3b": SMALL | _NO_CLIP,
    "wan2.1-t2v-14b": LARGE | _NO_CLIP,
    "wan2.1-i2v-1.3b": SMALL | _CLIP,
    "wan2.1-i2v-14b-480p": LARGE | _CLIP,
    "wan2.1-i2v-14b-720p": LARGE | _CLIP,  # another training, the same shapes
    "wan2.1-flf2v-14b": LARGE | _CLIP | {"image_tokens": 2 * IMAGE_TOKENS},
    "wan2.2-ti2v-5b": _NO_CLIP
    | {"dim": 3072, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    "wan2.2-t2v-a14b": LARGE | _NO_CLIP,  # each of its two experts; the shapes of wan2.1-t2v-14b
    "wan2.2-i2v-a14b": LARGE | _NO_CLIP | {"in_channels": 36},
}

WAN = Family(
    name="wan",
    table=TABLE,
    from_sizes=from_sizes,
    read_config=read_config,
    write_config={"original": write_original, "diffusers": write_diffusers},
    complete=complete,
    comfyui="original",
    presets=PRESETS,
    boundaries={"wan2.2-t2v-a14b": 0.875, "wan2.2-i2v-a14b": 0.9},
    cuts=Cuts(
        ladders=(Ladder("layers", layer="blocks.", first=("",), last=("head.",)),),
        rows=TP_ROWS,
        columns=TP_COLUMNS,
        divides=DIVIDES,
    ),
)
