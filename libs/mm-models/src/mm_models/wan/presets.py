"""Facts about released weights: architectures, and what was published with them."""

from dataclasses import replace

from mm_models.family import Preset, Published
from mm_models.wan.config import WanConfig

SMALL = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
MEDIUM = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}
LARGE = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
TINY = {"dim": 160, "ffn_dim": 480, "num_heads": 5, "num_layers": 4, "text_dim": 64}
FROM_IMAGE = {"in_channels": 36, "image_dim": 1280}
HIGH_VAE = {"in_channels": 48, "out_channels": 48}  # of Wan2.2: 16 x 16 pixels per latent

# The lists of MindSpeed-MM's guides: English for Wan2.1, Chinese, which says the same, for Wan2.2.
NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn "
    "hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, "
    "three legs, many people in the background, walking backwards"
)
CHINESE_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
P480, P720 = (480, 832), (720, 1280)

UNIPC = {"sampler": "unipc"}
T2V = Published(P480, 81, 16, 50, guidance=5.0, flow_shift=None, negative_prompt=NEGATIVE_PROMPT, **UNIPC)
I2V = replace(T2V, steps=40)
FLF2V = replace(T2V, size=P720, guidance=5.5, flow_shift=16)
VACE = replace(T2V, flow_shift=16)
A14B = Published(P720, 81, 16, 40, (4.0, 3.0), flow_shift=12, negative_prompt=CHINESE_NEGATIVE_PROMPT, **UNIPC)
A14B_I2V = replace(A14B, guidance=3.5, flow_shift=5)
A14B_VACE = replace(A14B, steps=50, guidance=5.0)
TI2V_5B = Published((704, 1280), 121, 24, 50, 5.0, flow_shift=5, negative_prompt=CHINESE_NEGATIVE_PROMPT, **UNIPC)


def _in_720p(published: Published) -> Published:
    return replace(published, size=P720)


PRESETS = {
    "wan2.1-t2v-1.3b": Preset(WanConfig(**SMALL), T2V),
    "wan2.1-t2v-14b": Preset(WanConfig(**LARGE), _in_720p(T2V)),
    "wan2.1-i2v-1.3b": Preset(WanConfig(**SMALL, **FROM_IMAGE), I2V),  # shapes and names of Wan2.1-Fun-1.3B-InP
    "wan2.1-i2v-14b-480p": Preset(WanConfig(**LARGE, **FROM_IMAGE), I2V),
    "wan2.1-i2v-14b-720p": Preset(WanConfig(**LARGE, **FROM_IMAGE), _in_720p(I2V)),
    "wan2.1-flf2v-14b": Preset(WanConfig(**LARGE, **FROM_IMAGE, image_tokens=514), FLF2V),
    "wan2.2-ti2v-5b": Preset(WanConfig(**MEDIUM, **HIGH_VAE), TI2V_5B),
    "wan2.2-t2v-a14b": Preset(WanConfig(**LARGE), A14B, boundary=0.875),  # each of its two experts
    "wan2.2-i2v-a14b": Preset(WanConfig(**LARGE, in_channels=36), A14B_I2V, boundary=0.9),  # likewise
    "vace-1.3b": Preset(WanConfig(**SMALL, vace_layers=tuple(range(0, 30, 2))), VACE),
    "vace-14b": Preset(WanConfig(**LARGE, vace_layers=tuple(range(0, 40, 5))), _in_720p(VACE)),
    "vace-a14b": Preset(WanConfig(**LARGE, vace_layers=tuple(range(0, 40, 5))), A14B_VACE, boundary=0.875),  # likewise
    # Not released by anybody: small enough to train on a laptop.
    "wan-tiny": Preset(WanConfig(**TINY), T2V),
    "wan-tiny-i2v": Preset(WanConfig(**TINY, in_channels=36, image_dim=32), I2V),
    "wan-tiny-a14b": Preset(WanConfig(**TINY), A14B, boundary=0.875),
    "wan-tiny-vace": Preset(WanConfig(**TINY, vace_layers=(0, 2)), VACE),
}
