"""Text encoders of the T5 family: UMT5, the text side of Wan and VACE, and mT5, that of Open-Sora-Plan.

UMT5 has position biases in every layer, mT5 in the first alone. Our names are those of transformers' `UMT5EncoderModel`
and `MT5EncoderModel` (`transformers`); Wan-AI published UMT5 with others (`original`), and llama.cpp writes its own
(`gguf`). What Google publishes holds a decoder as well, which no prompt needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mm_convert.families.family import Config, Family
from mm_convert.families.fields import is_count, is_small, settle
from mm_convert.tensors.rules import GGUF, Row, Table

_T, _O, _G = "encoder.block.{i}.layer.", "blocks.{i}.", "enc.blk.{i}."
_ATTENTION, _FFN = _T + "0.SelfAttention.", _T + "1.DenseReluDense."
_BIAS = "relative_attention_bias"

# transformers, original, gguf, shape; all are weights
_ROWS = [
    ("shared", "token_embedding", "token_embd", "vocab_size dim"),
    # layer i
    (_T + "0.layer_norm", _O + "norm1", _G + "attn_norm", "dim"),
    (_ATTENTION + _BIAS, _O + "pos_embedding.embedding", _G + "attn_rel_b", "buckets num_heads"),
    (_ATTENTION + "q", _O + "attn.q", _G + "attn_q", "num_heads*head_dim dim"),
    (_ATTENTION + "k", _O + "attn.k", _G + "attn_k", "num_heads*head_dim dim"),
    (_ATTENTION + "v", _O + "attn.v", _G + "attn_v", "num_heads*head_dim dim"),
    (_ATTENTION + "o", _O + "attn.o", _G + "attn_o", "dim num_heads*head_dim"),
    (_T + "1.layer_norm", _O + "norm2", _G + "ffn_norm", "dim"),
    (_FFN + "wi_0", _O + "ffn.gate.0", _G + "ffn_gate", "ffn_dim dim"),  # the one that is activated
    (_FFN + "wi_1", _O + "ffn.fc1", _G + "ffn_up", "ffn_dim dim"),
    (_FFN + "wo", _O + "ffn.fc2", _G + "ffn_down", "dim ffn_dim"),
    # head
    ("encoder.final_layer_norm", "norm", "enc.output_norm", "dim"),
]
_DECODER = [
    "lm_head",
    "decoder.embed_tokens",
    "decoder.final_layer_norm",
    *(f"decoder.block.{{i}}.layer.{number}.layer_norm" for number in range(3)),
    *(f"decoder.block.{{i}}.layer.0.SelfAttention.{part}" for part in ("q", "k", "v", "o", _BIAS)),
    *(f"decoder.block.{{i}}.layer.1.EncDecAttention.{part}" for part in ("q", "k", "v", "o", _BIAS)),
    *(f"decoder.block.{{i}}.layer.2.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
]
_IGNORED = {
    "encoder.embed_tokens.weight": "a second name of shared.weight",
    "spiece_model": "the tokenizer's model, no weight",
    **{f"{name}.weight": "of the decoder: a prompt needs the encoder alone" for name in _DECODER},
}
_UMT5_TABLE = Table(
    rows=[
        Row({"transformers": f"{ours}.weight", "original": f"{wan}.weight", GGUF: f"{llama}.weight"}, shape)
        for ours, wan, llama, shape in _ROWS
    ],
    ignored={"transformers": _IGNORED},
)
_MT5_TABLE = Table(
    rows=[
        Row({"transformers": f"{ours.format(i=0) if ours.endswith(_BIAS) else ours}.weight"}, shape)
        for ours, _, _, shape in _ROWS
    ],
    ignored={"transformers": _IGNORED},
)


def from_sizes(sizes: Mapping[str, int], groups: set[str], layers: Mapping[str, int]) -> Config:
    same = ("vocab_size", "dim", "ffn_dim", "num_heads", "head_dim", "buckets")
    return {key: sizes[key] for key in same} | {"num_layers": layers["i"]}


def complete(config: Config) -> tuple[Config, list[str]]:
    config = dict(config)
    return config, settle(config, "max_distance", 128, is_count) + settle(config, "eps", 1e-6, is_small)


_SPELLINGS = {
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "ffn_dim": "d_ff",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "num_layers": "num_layers",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}
_ACTIVATION = "gated-gelu"


def _reader(kind: str) -> Callable[[Mapping[str, Any]], Config]:
    def read_config(json: Mapping[str, Any]) -> Config:
        """Our fields from a config.json of transformers, only those that stand in it."""
        for key, value in {"model_type": kind, "feed_forward_proj": _ACTIVATION}.items():
            if json.get(key, value) != value:
                raise ValueError(f"{key} is {json[key]!r}; of {kind} only {value!r} is supported")
        return {ours: json[theirs] for ours, theirs in _SPELLINGS.items() if json.get(theirs) is not None}

    return read_config


def _writer(kind: str) -> Callable[[Config], Config]:
    def write_config(config: Config) -> Config:
        return {
            "architectures": [f"{kind.upper()}EncoderModel"],
            "model_type": kind,
            "feed_forward_proj": _ACTIVATION,
            **{theirs: config[ours] for ours, theirs in _SPELLINGS.items()},
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }

    return write_config


def _family(kind: str, table: Table, vocab_size: int, comfyui: str = "") -> Family:
    xxl = {"dim": 4096, "ffn_dim": 10240, "num_heads": 64, "head_dim": 64, "buckets": 32, "num_layers": 24}
    return Family(
        name=kind,
        table=table,
        from_sizes=from_sizes,
        read_config=_reader(kind),
        write_config={"transformers": _writer(kind)},
        complete=complete,
        comfyui=comfyui,
        copies={"transformers": {"encoder.embed_tokens.weight": "shared.weight"}},
        presets={f"{kind}-xxl": {"vocab_size": vocab_size, **xxl}},
    )


UMT5 = _family("umt5", _UMT5_TABLE, 256384, comfyui="transformers")
MT5 = _family("mt5", _MT5_TABLE, 250112)
