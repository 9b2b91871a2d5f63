"""Facts about released weights."""

from mm_models.wan.config import WanConfig

SMALL = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
MEDIUM = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}
LARGE = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
TINY = {"dim": 160, "ffn_dim": 480, "num_heads": 5, "num_layers": 4, "text_dim": 64}
FROM_IMAGE = {"in_channels": 36, "image_dim": 1280}
HIGH_VAE = {"in_channels": 48, "out_channels": 48}  # of Wan2.2: 16 x 16 pixels per latent

PRESETS = {
    "wan2.1-t2v-1.3b": WanConfig(**SMALL),
    "wan2.1-t2v-14b": WanConfig(**LARGE),
    "wan2.1-i2v-1.3b": WanConfig(**SMALL, **FROM_IMAGE),  # shapes and names of Wan2.1-Fun-1.3B-InP
    "wan2.1-i2v-14b-480p": WanConfig(**LARGE, **FROM_IMAGE),
    "wan2.1-i2v-14b-720p": WanConfig(**LARGE, **FROM_IMAGE),
    "wan2.1-flf2v-14b": WanConfig(**LARGE, **FROM_IMAGE, image_tokens=514),
    "wan2.2-ti2v-5b": WanConfig(**MEDIUM, **HIGH_VAE),
    "wan2.2-t2v-a14b": WanConfig(**LARGE),  # each of its two experts
    "wan2.2-i2v-a14b": WanConfig(**LARGE, in_channels=36),  # likewise
    "vace-1.3b": WanConfig(**SMALL, vace_layers=tuple(range(0, 30, 2))),
    "vace-14b": WanConfig(**LARGE, vace_layers=tuple(range(0, 40, 5))),
    "vace-a14b": WanConfig(**LARGE, vace_layers=tuple(range(0, 40, 5))),  # each of its two experts
    # Not released by anybody: small enough to train on a laptop.
    "wan-tiny": WanConfig(**TINY),
    "wan-tiny-i2v": WanConfig(**TINY, in_channels=36, image_dim=32),
    "wan-tiny-a14b": WanConfig(**TINY),
    "wan-tiny-vace": WanConfig(**TINY, vace_layers=(0, 2)),
}

BOUNDARIES = {"wan2.2-t2v-a14b": 0.875, "wan2.2-i2v-a14b": 0.9, "vace-a14b": 0.875, "wan-tiny-a14b": 0.875}
"""Of presets that are two experts: the noise level (sigma) from which on the high-noise one generates."""
