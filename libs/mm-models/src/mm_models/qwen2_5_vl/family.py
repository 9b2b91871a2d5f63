"""Qwen2.5-VL's record: what all others ask."""

from mm_models.family import Chat, Family, later
from mm_models.qwen2_5_vl import tasks
from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.qwen2_5_vl.presets import PRESETS


def start():
    """What a Qwen2.5-VL begins with."""
    from mm_models.qwen2_5_vl import start

    return start


CHAT = Chat(
    processing=later("mm_models.qwen2_5_vl.processing", "Qwen25VLProcessing"),
    generator=later("mm_models.qwen2_5_vl.generation", "Qwen25VLGenerator"),
    files=(
        *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
        *("special_tokens_map.json", "chat_template.json", "chat_template.jinja", "generation_config.json"),
        *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    ),
)

QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    presets=PRESETS,
    config=Qwen25VLConfig,
    checkpoints=("qwen2.5-vl",),
    tasks=tasks.tasks,
    describe=tasks.describe,
    build=later("mm_models.qwen2_5_vl.model", "Qwen25VLModel"),
    plan=later("mm_models.qwen2_5_vl.plan", "plan"),
    cost=later("mm_models.qwen2_5_vl.cost", "Cost"),
    lora_targets=(
        *(f"language:self_attn.{name}_proj" for name in "qkvo"),
        *(f"language:mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
    start=start,
    objective=later("mm_models.qwen2_5_vl.objective", "objective"),
    objective_options={"average": "token"},
    example=later("mm_models.qwen2_5_vl.example", "example"),
    chat=CHAT,
    parts={
        "vision": ("visual.patch_embed.*", "visual.blocks.*"),
        "merger": ("visual.merger.*",),
        "language": ("model.*", "lm_head.*"),
    },
    unadapted=("lm_head",),  # the head goes from its input straight to losses
    unserved=("vision", "merger"),
    exported="transformers",
)
