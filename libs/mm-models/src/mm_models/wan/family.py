"""Wan's record: what all others ask of Wan2.1, Wan2.2 and VACE."""

from mm_models.family import Family, Video, later
from mm_models.wan import tasks
from mm_models.wan.config import WanConfig
from mm_models.wan.distilled import DISTILLED
from mm_models.wan.presets import PRESETS


def start():
    """What a Wan begins with."""
    from mm_models.wan import start

    return start


WAN = Family(
    name="wan",
    presets=PRESETS,
    config=WanConfig,
    checkpoints=("wan", "vace"),
    tasks=tasks.tasks,
    describe=tasks.describe,
    build=later("mm_models.wan.model", "WanModel"),
    plan=later("mm_models.wan.plan", "plan"),
    cost=later("mm_models.wan.cost", "Cost"),
    lora_targets=("q", "k", "v", "o", "ffn.0", "ffn.2"),
    start=start,
    objective=later("mm_models.wan.encode", "objective"),
    objective_options={
        **{"shift": 5.0, "range": None, "weighting": "bsmntw", "sampling": "uniform"},
        **{"logit_mean": 0.0, "logit_std": 1.0, "shift_by": "fixed", "shift_tokens": None},
    },
    example=later("mm_models.wan.example", "example"),
    video=Video(
        tasks_unasked=tasks.tasks_unasked,
        encoders=tasks.encoders,
        kinds={"vae": "AutoencoderKLWan", "text_encoder": "umt5", "image_encoder": "clip_vision_model"},
        multiples=tasks.multiples,
        fit=tasks.fit,
        prediction=lambda config: "flow",
        conditioning=later("mm_models.wan.encode", "Conditioning"),
        codec=later("mm_models.wan.vae", "WanVAE"),
        text_encoder=later("mm_models.wan.encode", "text_encoder"),
        image_encoder=later("mm_models.encoders.image", "ImageEncoder"),
        distilled=DISTILLED,
    ),
)
