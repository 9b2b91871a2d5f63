"""Facts about released weights: architectures, and what was published with them."""

from dataclasses import replace

from mm_models.family import Preset, Published
from mm_models.opensoraplan.config import OpenSoraPlanConfig

TINY = {"dim": 144, "ffn_dim": 576, "num_heads": 4, "num_layers": 4, "text_dim": 64}  # heads 36 wide

# Of the makers' sampling script, on one line.
PROMPT_TEMPLATE = "(masterpiece), (best quality), (ultra-detailed), {}."
NEGATIVE_PROMPT = (
    "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
    "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
P480, P720 = (480, 640), (720, 1280)

LONG = Published(
    P480,
    frames=93,
    fps=24,
    steps=100,
    guidance=7.5,
    flow_shift=None,
    negative_prompt=NEGATIVE_PROMPT,
    sampler="euler_ancestral",
    prompt_template=PROMPT_TEMPLATE,
    trained_frames=93,
)
SHORT = replace(LONG, frames=29, trained_frames=29)


def _released(frames: int, published: Published) -> Preset:
    """frames: of latents."""
    rows, columns = (side // 8 for side in published.size)
    scale = (1.0, 1.5, 2.0) if published.size == P720 else (1.0, 1.0, 1.0)
    return Preset(OpenSoraPlanConfig(interpolation_scale=scale, sample_size=(frames, rows, columns)), published)


PRESETS = {
    "opensoraplan-1.2": _released(24, LONG),
    "opensoraplan-1.2-29x480p": _released(8, replace(SHORT, guidance=2.5)),  # 7.5 is too much: the makers' issue 393
    "opensoraplan-1.2-93x720p": _released(24, replace(LONG, size=P720)),
    "opensoraplan-1.2-29x720p": _released(8, replace(SHORT, size=P720)),
    # Not released by anybody: small enough to train on a laptop.
    "opensoraplan-tiny": Preset(OpenSoraPlanConfig(**TINY), replace(SHORT, trained_frames=None)),
}
