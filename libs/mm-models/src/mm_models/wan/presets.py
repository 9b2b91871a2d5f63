"""Facts about released weights."""

from mm_models.wan.config import WanConfig

SMALL = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
LARGE = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
FROM_IMAGE = {"in_channels": 36, "image_dim": 1280}

PRESETS = {
    "wan2.1-t2v-1.3b": WanConfig(**SMALL),
    "wan2.1-t2v-14b": WanConfig(**LARGE),
    "wan2.1-i2v-1.3b": WanConfig(**SMALL, **FROM_IMAGE),  # shapes and names of Wan2.1-Fun-1.3B-InP
    "wan2.1-i2v-14b-480p": WanConfig(**LARGE, **FROM_IMAGE),
    "wan2.1-i2v-14b-720p": WanConfig(**LARGE, **FROM_IMAGE),
    # Not released by anybody: small enough to train on a laptop.
    "wan-tiny": WanConfig(dim=160, ffn_dim=480, num_heads=5, num_layers=4, text_dim=64),
}
