"""Qwen2.5-VL: a vision ladder {j} whose head feeds the stem of a language ladder {i}.

Our names are those of the files on the hub (`transformers`). Models in memory since transformers 4.52 call the same
tensors otherwise (`transformers-v5`); MindSpeed-MM (`mindspeed`) fuses q, k and v per key-value group, and gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_convert.families.family import Config, Cuts, Family, Ladder
from mm_convert.families.fields import is_count
from mm_convert.tensors.fusion import Fusion
from mm_convert.tensors.rules import Row, Table

_VISION, _TEXT = "image_encoder.encoder.", "text_decoder."
_VISION_LAYER, _TEXT_LAYER = _VISION + "blocks.layers.{j}.", _TEXT + "decoder.layers.{i}."


def _row(ours: str, mindspeed: str, shape: str, group: str = "") -> Row:
    v5 = ours.replace("model.", "model.language_model.", 1) if ours.startswith("model.") else ours
    v5 = f"model.{ours}" if ours.startswith("visual.") else v5
    return Row({"transformers": ours, "transformers-v5": v5, "mindspeed": mindspeed}, shape, group)


def _affine(ours: str, mindspeed: str, shape: str, part: str = "") -> list[Row]:
    return [
        _row(f"{ours}.weight", f"{mindspeed}.weight{part}", shape),
        _row(f"{ours}.bias", f"{mindspeed}.bias{part}", shape.split()[0]),
    ]


_V, _L = "visual.blocks.{j}.", "model.layers.{i}."

TABLE = Table(
    rows=[
        # vision: stem, layers, head
        _row("visual.patch_embed.proj.weight", _VISION + "patch_embed.proj.weight", "vision_dim channels pt ph pw"),
        _row(_V + "norm1.weight", _VISION_LAYER + "input_layernorm.weight", "vision_dim"),
        _row(_V + "norm2.weight", _VISION_LAYER + "pre_mlp_layernorm.weight", "vision_dim"),
        *_affine(_V + "attn.qkv", _VISION_LAYER + "self_attention.linear_qkv", "3*vision_dim vision_dim", "#whole"),
        *_affine(_V + "attn.proj", _VISION_LAYER + "self_attention.linear_proj", "vision_dim vision_dim"),
        *_affine(_V + "mlp.gate_proj", _VISION_LAYER + "mlp.linear_fc1", "vision_ffn_dim vision_dim", "#gate"),
        *_affine(_V + "mlp.up_proj", _VISION_LAYER + "mlp.linear_fc1", "vision_ffn_dim vision_dim", "#up"),
        *_affine(_V + "mlp.down_proj", _VISION_LAYER + "mlp.linear_fc2", "vision_dim vision_ffn_dim"),
        _row("visual.merger.ln_q.weight", "image_encoder.projector.layernorm.weight", "vision_dim"),
        *_affine("visual.merger.mlp.0", "image_encoder.projector.encoder.linear_fc1", "merged_dim merged_dim"),
        *_affine("visual.merger.mlp.2", "image_encoder.projector.encoder.linear_fc2", "dim merged_dim"),
        # language: stem, layers, head
        _row("model.embed_tokens.weight", _TEXT + "embedding.word_embeddings.weight", "vocab_size dim"),
        _row(_L + "input_layernorm.weight", _TEXT_LAYER + "input_layernorm.weight", "dim"),
        _row(_L + "post_attention_layernorm.weight", _TEXT_LAYER + "pre_mlp_layernorm.weight", "dim"),
        *_affine(_L + "self_attn.q_proj", _TEXT_LAYER + "self_attention.linear_qkv", "q_dim dim", "#q"),
        *_affine(_L + "self_attn.k_proj", _TEXT_LAYER + "self_attention.linear_qkv", "kv_dim dim", "#k"),
        *_affine(_L + "self_attn.v_proj", _TEXT_LAYER + "self_attention.linear_qkv", "kv_dim dim", "#v"),
        _row(_L + "self_attn.o_proj.weight", _TEXT_LAYER + "self_attention.linear_proj.weight", "dim q_dim"),
        _row(_L + "mlp.gate_proj.weight", _TEXT_LAYER + "mlp.linear_fc1.weight#gate", "ffn_dim dim"),
        _row(_L + "mlp.up_proj.weight", _TEXT_LAYER + "mlp.linear_fc1.weight#up", "ffn_dim dim"),
        _row(_L + "mlp.down_proj.weight", _TEXT_LAYER + "mlp.linear_fc2.weight", "dim ffn_dim"),
        _row("model.norm.weight", _TEXT + "decoder.final_layernorm.weight", "dim"),
        _row("lm_head.weight", _TEXT + "output_layer.weight", "vocab_size dim", "untied"),
    ],
)

_GLU = {"gate": "1", "up": "1"}
_QKV = {"q": "num_heads", "k": "num_kv_heads", "v": "num_kv_heads"}
_VISION_QKV = {"q": "vision_heads", "k": "vision_heads", "v": "vision_heads"}
FUSIONS = (
    *(
        Fusion(_VISION_LAYER + f"self_attention.linear_qkv.{kind}", _VISION_QKV, "vision_heads", stacked=True)
        for kind in ("weight", "bias")
    ),
    *(Fusion(_VISION_LAYER + f"mlp.linear_fc1.{kind}", _GLU) for kind in ("weight", "bias")),
    *(Fusion(_TEXT_LAYER + f"self_attention.linear_qkv.{kind}", _QKV, "num_kv_heads") for kind in ("weight", "bias")),
    Fusion(_TEXT_LAYER + "mlp.linear_fc1.weight", _GLU),
)

CUTS = Cuts(
    ladders=(
        Ladder("llm", _TEXT + "decoder.layers.", (_TEXT + "embedding.",), (_TEXT + "decoder.final", _TEXT + "output")),
        Ladder("vit", _VISION + "blocks.layers.", (_VISION + "patch_embed.",), ("image_encoder.projector.",), "j"),
    ),
    rows=("*.word_embeddings.weight", "*.output_layer.weight", "*.linear_qkv.*", "*.projector.encoder.linear_fc1.*"),
    columns=("*.linear_proj.weight", "*.linear_fc2.weight"),
    halves=("*.layers.*.mlp.linear_fc1.*",),
    divides={
        "key-value heads": "num_kv_heads",
        "heads": "num_heads",
        "vision heads": "vision_heads",
        "feed-forward channels": "ffn_dim",
        "vision feed-forward channels": "vision_ffn_dim",
        "tokens of the vocabulary": "vocab_size",
    },
    tied=(_TEXT + "embedding.word_embeddings.weight", _TEXT + "output_layer.weight"),
    version=True,
)

HEAD_DIM, VISION_HEAD_DIM = 128, 80  # of every published size; the shapes do not tell the number of heads


def from_sizes(sizes: Mapping[str, int], groups: set[str], layers: Mapping[str, int]) -> Config:
    same = ("dim", "ffn_dim", "vocab_size", "q_dim", "kv_dim", "vision_dim", "vision_ffn_dim")
    merge = round((sizes["merged_dim"] / sizes["vision_dim"]) ** 0.5)
    return {key: sizes[key] for key in same} | {
        "num_layers": layers["i"],
        "vision_layers": layers["j"],
        "tied": "untied" not in groups,
        "channels": sizes["channels"],
        "patch_size": sizes["ph"],
        "temporal_patch_size": sizes["pt"],
        "spatial_merge_size": merge,
    }


def heads(shapes: Mapping[str, tuple[int, ...]], said: Config) -> Config:
    """The counts by which fused tensors are cut: from a configuration, else as in the published sizes."""
    dim = shapes[_TEXT + "decoder.final_layernorm.weight"][0]
    vision_dim = shapes[_VISION + "patch_embed.proj.weight"][0]
    fused = shapes[_TEXT_LAYER.format(i=0) + "self_attention.linear_qkv.weight"][0]
    said = {field: value for field, value in said.items() if is_count(value)}
    num_heads = said.get("num_heads") or dim // HEAD_DIM
    vision_heads = said.get("vision_heads") or vision_dim // VISION_HEAD_DIM
    if not num_heads or not vision_heads or dim % num_heads:
        raise ValueError(
            f"the numbers of heads are unknown, and widths of {dim} and {vision_dim} are no published ones: "
            "name the model on the hub (hf_dir), or put its config.json beside the files"
        )
    num_kv_heads = said.get("num_kv_heads") or (fused // (dim // num_heads) - num_heads) // 2
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "vision_heads": vision_heads}


_USUAL = {
    "eps": 1e-6,
    "rope_theta": 1e6,
    "mrope_section": [16, 24, 24],
    "max_positions": 128000,
    "image_token": 151655,
    "video_token": 151656,
    "vision_start_token": 151652,
    "vision_end_token": 151653,
    "bos_token": 151643,
    "eos_token": 151645,
    "window_size": 112,
    "full_attention_layers": [7, 15, 23, 31],
    "tokens_per_second": 2,
}


def complete(config: Config) -> tuple[Config, list[str]]:
    config, notes = {**_USUAL, **config}, []
    for field, rows, head_dim in (
        ("num_heads", "q_dim", HEAD_DIM),
        ("num_kv_heads", "kv_dim", HEAD_DIM),
        ("vision_heads", "vision_dim", VISION_HEAD_DIM),
    ):
        said = config.get(field)
        if field in config and not (is_count(said) and config[rows] % said == 0):
            notes.append(f"{field} is said to be {said!r}, which does not divide {config[rows]}: it is left out")
            del config[field]
        if field not in config and config[rows] % head_dim == 0:
            config[field] = config[rows] // head_dim
            notes.append(f"{field} is {config[field]} if heads have {head_dim} channels, as in every published size")
        elif field not in config:
            notes.append(f"{field} is unknown; a config.json beside the tensors could say it")
    heads, kv_heads = config.get("num_heads"), config.get("num_kv_heads")
    if heads and kv_heads and config["q_dim"] // heads != config["kv_dim"] // kv_heads:
        widths = f"{config['q_dim'] // heads} and {config['kv_dim'] // kv_heads} channels"
        notes.append(f"num_heads {heads} and num_kv_heads {kv_heads} would have {widths}: both are left out")
        del config["num_heads"], config["num_kv_heads"]
    del config["q_dim"], config["kv_dim"]  # not fields: what shapes say besides the heads
    return config, notes


# --- config.json, as it is published. The language fields stand at its top or, in newer files, in text_config.

_TEXT_SPELLINGS = {
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "tied": "tie_word_embeddings",
    "eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings",
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
}
_TOKENS = {
    "image_token": "image_token_id",
    "video_token": "video_token_id",
    "vision_start_token": "vision_start_token_id",
    "vision_end_token": "vision_end_token_id",
}
_VISION_SPELLINGS = {
    "vision_dim": "hidden_size",
    "vision_ffn_dim": "intermediate_size",
    "vision_layers": "depth",
    "vision_heads": "num_heads",
    "channels": "in_chans",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "window_size": "window_size",
    "full_attention_layers": "fullatt_block_indexes",
    "tokens_per_second": "tokens_per_second",
}


def read_config(json: Mapping[str, Any]) -> Config:
    """Our fields from a config.json of Qwen2.5-VL, only those that stand in it."""
    text = {**json, **_table(json.get("text_config"))}
    vision = _table(json.get("vision_config"))
    rope = _table(text.get("rope_scaling")) or _table(text.get("rope_parameters"))
    found = {ours: text.get(theirs) for ours, theirs in (_TEXT_SPELLINGS | _TOKENS).items()}
    found |= {ours: vision.get(theirs) for ours, theirs in _VISION_SPELLINGS.items()}
    found["tied"] = json.get("tie_word_embeddings", found["tied"])
    found["mrope_section"] = rope.get("mrope_section")
    found["rope_theta"] = found["rope_theta"] or rope.get("rope_theta")
    return {field: value for field, value in found.items() if value is not None}


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _write_transformers(config: Config) -> Config:
    json = {theirs: config[ours] for ours, theirs in (_TEXT_SPELLINGS | _TOKENS).items() if ours in config}
    vision = {theirs: config[ours] for ours, theirs in _VISION_SPELLINGS.items() if ours in config}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "use_sliding_window": False,
        **json,
        "rope_scaling": {"type": "mrope", "mrope_section": config["mrope_section"]},
        "vision_config": {"model_type": "qwen2_5_vl", "out_hidden_size": config["dim"], "hidden_act": "silu", **vision},
    }


def _size(dim: int, ffn_dim: int, layers: int, kv_heads: int, vision_ffn_dim: int, tied: bool = False) -> Config:
    return {
        "dim": dim,
        "ffn_dim": ffn_dim,
        "num_layers": layers,
        "kv_dim": kv_heads * HEAD_DIM,
        "vocab_size": 151936 if tied else 152064,
        "tied": tied,
        "vision_dim": 1280,
        "vision_ffn_dim": vision_ffn_dim,
        "vision_layers": 32,
    }


QWEN2_5_VL = Family(
    name="qwen2.5-vl",
    table=TABLE,
    from_sizes=from_sizes,
    read_config=read_config,
    write_config={"transformers": _write_transformers, "transformers-v5": _write_transformers},
    complete=complete,
    presets={
        "qwen2.5-vl-3b": _size(2048, 11008, 36, 2, 3420, tied=True),
        "qwen2.5-vl-7b": _size(3584, 18944, 28, 4, 3420),
        "qwen2.5-vl-32b": _size(5120, 27648, 64, 8, 3456),
        "qwen2.5-vl-72b": _size(8192, 29568, 80, 8, 3456),
    },
    fusions={"mindspeed": FUSIONS},
    heads=heads,
    cuts=CUTS,
    tied=("model.embed_tokens.weight", "lm_head.weight"),
    in_memory="transformers-v5",
)
