"""What a Qwen2.5-VL model can be asked for; facts, known without torch."""

from dataclasses import asdict
from typing import Any

from mm_models.family import Task
from mm_models.qwen2_5_vl.config import Qwen25VLConfig

CHAT = Task("chat", takes=("image", "video"))


def tasks(config: Qwen25VLConfig) -> tuple[Task, ...]:
    """The next answer of a conversation, with any number of images and videos in it."""
    return (CHAT,)


def describe(config: Qwen25VLConfig) -> dict[str, Any]:
    """The fields that are written into config.json: all."""
    return asdict(config)
