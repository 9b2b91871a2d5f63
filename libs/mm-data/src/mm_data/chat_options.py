"""What a user may choose of how conversations become tokens and pixels. This file imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

Least = Annotated[int, ">= 0", "<= 1000000000"]
Most = Annotated[int, ">= 1", "<= 1000000000"]


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become tokens and pixels: the same in training and in chat."""

    image_min_pixels: Least | None = None
    "smaller images are enlarged to this area; by default what preprocessor_config.json says (nearest: 1024)"
    image_max_pixels: Most | None = None
    "larger images are shrunk to this area; by default what preprocessor_config.json says (nearest: 589824)"
    resize: Literal["processor", "nearest"] = "processor"
    "processor: as Hugging Face's image processor; nearest: as MindSpeed-MM, which changes the size twice, first without smoothing"  # noqa: E501
    video_fps: Annotated[float, "> 0", "<= 1000"] = 2.0
    "frames taken of each second of a video"
    video_max_frames: Annotated[int, ">= 1", "<= 100000"] = 128
    "of longer videos, this many frames are taken, evenly spread"
    video_min_pixels: Least | None = None
    "as image_min_pixels, of each frame; by default 100352 (nearest: 256)"
    video_max_pixels: Most | None = None
    "as image_max_pixels, of each frame; by default 602112 (nearest: 65536)"
    system: str | None = None
    "system prompt of conversations that have none; by default the model's own; an empty text: none"
    newline: bool = True
    "also train the line break behind the end of an answer, as MindSpeed-MM does"
    mask_history: bool = False
    "train only the last answer of a conversation"
    train_on_prompt: bool = False
    "also train the questions, but no image or video"

    def __post_init__(self) -> None:
        if self.mask_history and self.train_on_prompt:
            raise ValueError("mask_history trains the last answer only, train_on_prompt all questions: leave one out")
        for kind in ("image", "video"):
            least, most = getattr(self, f"{kind}_min_pixels"), getattr(self, f"{kind}_max_pixels")
            if least is not None and most is not None and least > most:
                raise ValueError(f"{kind}_min_pixels {least} is more than {kind}_max_pixels {most}: lower it")


FILE = "chat_options.json"
"""Beside trained weights: the options that they were trained with."""
_OF_TRAINING = ("newline", "mask_history", "train_on_prompt")


def save_options(folder: Path, options: ChatOptions) -> None:
    """Keeps what decides over tokens and pixels of a question, beside weights that were trained so."""
    usual = ChatOptions()
    kept = {name: value for name, value in vars(options).items() if name not in _OF_TRAINING}
    changed = {name: value for name, value in kept.items() if value != getattr(usual, name)}
    (folder / FILE).write_text(json.dumps(changed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_options(folder: Path) -> dict[str, Any]:
    """What `save_options` has kept, {} where nothing was. ValueError for a file that is none."""
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{file} holds {type(said).__name__}, but must be an object of options")
    return said
