"""What makes tokens and pixels of conversations: the types, and the right one for a folder of the hub.

Conversations are those of `mm_data.conversations`; this library does not import it, and reads no file of theirs: media
open themselves, and boxes scale themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class VideoInfo(Protocol):
    """What the packets of a video tell."""

    num_frames: int
    fps: float
    height: int
    width: int


class Media(Protocol):
    """A picture or a video. What it cannot do, it raises as `mm_data.conversations.Unusable`."""

    kind: Literal["image", "video"]
    max_pixels: int | None

    def read_size(self) -> tuple[int, int]:
        """Of a picture, from its header: height and width, upright."""
        ...

    def read_image(self) -> np.ndarray:
        """Of a picture: H W 3 uint8, upright."""
        ...

    def probe(self) -> VideoInfo:
        """Of a video."""
        ...

    def read_frames(
        self, info: VideoInfo, indices: Sequence[int], each: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Of a video: these frames, upright, each of which went through `each` (H W 3 uint8)."""
        ...

    def refuse(self, reason: str) -> Exception:
        """The error for a picture or a video that a model cannot take."""
        ...


class Box(Protocol):
    """A box or a point in a picture or a video of the conversation."""

    media: int

    def scale(self, size: tuple[int, int], resized: tuple[int, int]) -> tuple[int, ...]:
        """Its numbers, whole, in a picture of height and width `size` that was resized."""
        ...


class Turn(Protocol):
    role: Literal["system", "user", "assistant"]
    parts: Sequence[str | Media | Box]


class Conversation(Protocol):
    turns: Sequence[Turn]
    media: Sequence[Media]


class Size(NamedTuple):
    """What a conversation takes; as `mm_data.processing.Size`."""

    tokens: int
    patches: int
    label_tokens: int
    squares: int
    """The sum, over pictures and pairs of video frames, of (patches of one) ** 2."""


@dataclass(frozen=True)
class Encoded:
    """One conversation as tensors on the CPU; as `mm_data.processing.Encoded`. L tokens, N patches, M media."""

    input_ids: Tensor
    """L int64."""
    labels: Tensor
    """L int64: the token that each position must predict; -100 where none."""
    position_ids: Tensor
    """3 L int64."""
    pixel_values: Tensor
    """N C float32."""
    grid_thw: Tensor
    """M 3 int64."""


def is_exact(answer: str, reference: str) -> bool:
    """Whether an answer is the expected one, but for blanks around it."""
    return answer.strip() == reference.strip()


class Piece(NamedTuple):
    """A part of a conversation as the model sees it, to be looked at."""

    text: str
    """Of one token, or of those few that spell one character."""
    trained: bool
    """Whether the model is trained to say it."""
    times: int
    """How often it stands there: the tokens of a picture are one piece."""


class Processing(Protocol):
    """The processing of one model: an `mm_data.processing.Processing`, with what asking such a model needs besides.

    Its methods may be called from several threads at once.
    """

    identity: str
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    banned_ids: tuple[int, ...]
    """Tokens that no answer has: those that stand for a picture or a video."""

    def measure(self, conversation: Conversation) -> Size: ...

    def encode(self, conversation: Conversation) -> Encoded: ...

    def prompt(self, conversation: Conversation) -> Encoded:
        """All up to where the last answer begins; no label. A conversation may end with a question."""
        ...

    def read_answer(self, ids: Sequence[int]) -> str:
        """The text of an answer, up to a stop token."""
        ...

    def read_reference(self, conversation: Conversation) -> str | None:
        """The last answer of a conversation as the model should say it; None where it ends with a question."""
        ...

    def scale_back(self, answer: str, conversation: Conversation) -> str:
        """An answer whose boxes are in pixels of the picture as it is, not as the model saw it."""
        ...

    def show(self, conversation: Conversation) -> list[Piece]:
        """The tokens of a conversation, to be looked at."""
        ...


def load(folder: Path | str, options: Any) -> Processing:
    """The processing of the model whose tokenizer and processor lie in `folder`, as its config.json says.

    options: `mm_data.chat_options.ChatOptions`.
    ValueError for a folder without config.json, or of a model that is none of ours.
    """
    from mm_models.families import FAMILIES

    said = read_json(Path(folder), "config.json").get("model_type")
    for family in FAMILIES:
        if family.chat is not None and family.name == said:
            return family.chat.processing(Path(folder), options)
    there = ", ".join(family.name for family in FAMILIES if family.chat is not None)
    raise ValueError(f"{folder}/config.json: model_type is {said!r}, which answers nothing here; there are {there}")


def read_json(folder: Path, *names: str) -> Mapping[str, Any]:
    """The first of these files that is there. ValueError where none is, or where it holds no JSON object."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no {' or '.join(names)}: name a folder as it was downloaded from the hub")
    try:
        read = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds no JSON object")
    return read
