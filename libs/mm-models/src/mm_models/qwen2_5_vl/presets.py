"""Facts about released weights: architectures."""

from mm_models.family import Preset
from mm_models.qwen2_5_vl.config import Qwen25VLConfig


def _released(dim: int, ffn_dim: int, num_layers: int, num_kv_heads: int, vision_ffn_dim: int) -> Qwen25VLConfig:
    tied = dim == 2048  # 3B alone, and it has fewer rows that no token uses
    return Qwen25VLConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_layers=num_layers,
        num_heads=dim // 128,
        num_kv_heads=num_kv_heads,
        vocab_size=151936 if tied else 152064,
        tied=tied,
        vision_ffn_dim=vision_ffn_dim,
    )


BYTES = 256
"""Of the tiny model: tokens before the special ones, which follow in the order of the released tokenizer."""

TINY = Qwen25VLConfig(
    dim=64,
    ffn_dim=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=BYTES + 32,
    mrope_section=(2, 3, 3),
    max_positions=32768,
    bos_token=BYTES,
    eos_token=BYTES + 2,
    vision_start_token=BYTES + 9,
    vision_end_token=BYTES + 10,
    image_token=BYTES + 12,
    video_token=BYTES + 13,
    vision_dim=64,
    vision_ffn_dim=96,
    vision_layers=4,
    vision_heads=4,
    full_attention_layers=(1, 3),
)

PRESETS = {
    "qwen2.5-vl-3b": Preset(_released(2048, 11008, 36, 2, 3420)),
    "qwen2.5-vl-7b": Preset(_released(3584, 18944, 28, 4, 3420)),
    "qwen2.5-vl-32b": Preset(_released(5120, 27648, 64, 8, 3456)),
    "qwen2.5-vl-72b": Preset(_released(8192, 29568, 80, 8, 3456)),
    # Not released by anybody: small enough to train on a laptop.
    "qwen2.5-vl-tiny": Preset(TINY),
}
