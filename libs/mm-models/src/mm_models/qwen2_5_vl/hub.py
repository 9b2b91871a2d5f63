"""The spelling of the released files. This file imports no torch."""

from __future__ import annotations

from typing import Any

from mm_models.qwen2_5_vl.config import Qwen25VLConfig


def write_config(config: Qwen25VLConfig) -> dict[str, Any]:
    """config.json, as transformers 4 and 5 read it."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token,
        "eos_token_id": config.eos_token,
        "image_token_id": config.image_token,
        "video_token_id": config.video_token,
        "vision_start_token_id": config.vision_start_token,
        "vision_end_token_id": config.vision_end_token,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.eps,
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section)},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": config.vision_layers,
            "fullatt_block_indexes": list(config.full_attention_layers),
            "hidden_act": "silu",
            "hidden_size": config.vision_dim,
            "in_chans": config.channels,
            "intermediate_size": config.vision_ffn_dim,
            "model_type": "qwen2_5_vl",
            "num_heads": config.vision_heads,
            "out_hidden_size": config.dim,
            "patch_size": config.patch_size,
            "spatial_merge_size": config.spatial_merge_size,
            "spatial_patch_size": config.patch_size,
            "temporal_patch_size": config.temporal_patch_size,
            "tokens_per_second": int(pace) if (pace := config.tokens_per_second) == int(pace) else pace,
            "window_size": config.window_size,
        },
        "vocab_size": config.vocab_size,
    }
