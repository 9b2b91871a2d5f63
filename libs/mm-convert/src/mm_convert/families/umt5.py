"""UMT5 encoders, the text side of Wan and VACE: every layer has position biases of its own.

Our names are those of transformers' `UMT5EncoderModel` (`transformers`); Wan-AI published it with others (`original`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_convert.families.family import Config, Family
from mm_convert.families.fields import is_count, is_small, settle
from mm_convert.tensors.rules import Row, Table


def _row(transformers: str, original: str, shape: str) -> Row:
    return Row({"transformers": f"{transformers}.weight", "original": f"{original}.weight"}, shape)


_T, _O = "encoder.block.{i}.layer.", "blocks.{i}."
_ATTENTION, _FFN = _T + "0.SelfAttention.", _T + "1.DenseReluDense."

TABLE = Table(
    rows=[
        _row("shared", "token_embedding", "vocab_size dim"),
        # layer i
        _row(_T + "0.layer_norm", _O + "norm1", "dim"),
        _row(_ATTENTION + "relative_attention_bias", _O + "pos_embedding.embedding", "buckets num_heads"),
        _row(_ATTENTION + "q", _O + "attn.q", "num_heads*head_dim dim"),
        _row(_ATTENTION + "k", _O + "attn.k", "num_heads*head_dim dim"),
        _row(_ATTENTION + "v", _O + "attn.v", "num_heads*head_dim dim"),
        _row(_ATTENTION + "o", _O + "attn.o", "dim num_heads*head_dim"),
        _row(_T + "1.layer_norm", _O + "norm2", "dim"),
        _row(_FFN + "wi_0", _O + "ffn.gate.0", "ffn_dim dim"),  # the one that is activated
        _row(_FFN + "wi_1", _O + "ffn.fc1", "ffn_dim dim"),
        _row(_FFN + "wo", _O + "ffn.fc2", "dim ffn_dim"),
        # head
        _row("encoder.final_layer_norm", "norm", "dim"),
    ],
    ignored={
        "transformers": {
            "encoder.embed_tokens.weight": "a second name of shared.weight",
            "spiece_model": "the tokenizer's model, no weight",
        }
    },
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
_FIXED = {"model_type": "umt5", "feed_forward_proj": "gated-gelu"}


def read_config(json: Mapping[str, Any]) -> Config:
    """Our fields from a config.json of transformers, only those that stand in it."""
    for key, value in _FIXED.items():
        if json.get(key, value) != value:
            raise ValueError(f"{key} is {json[key]!r}; of UMT5 only {value!r} is supported")
    return {ours: json[theirs] for ours, theirs in _SPELLINGS.items() if json.get(theirs) is not None}


def _write_transformers(config: Config) -> Config:
    return {
        "architectures": ["UMT5EncoderModel"],
        **_FIXED,
        **{theirs: config[ours] for ours, theirs in _SPELLINGS.items()},
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


UMT5 = Family(
    name="umt5",
    table=TABLE,
    from_sizes=from_sizes,
    read_config=read_config,
    write_config={"transformers": _write_transformers},
    complete=complete,
    copies={"transformers": {"encoder.embed_tokens.weight": "shared.weight"}},
    presets={
        "umt5-xxl": {
            "vocab_size": 256384,
            "dim": 4096,
            "ffn_dim": 10240,
            "num_heads": 64,
            "head_dim": 64,
            "buckets": 32,
            "num_layers": 24,
        }
    },
)
