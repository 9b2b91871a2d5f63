"""What a model is taught to answer: turns of text, pictures, videos and boxes. This package imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

# Why a conversation cannot be used: what a ledger counts.
REASONS = (
    "broken_json",  # the text of an item is not JSON, or not UTF-8
    "unknown_format",  # an item, or a part of it, of a shape that is none of those that are read
    "roles",  # turns that do not alternate, do not begin with a question or do not end with an answer
    "tools",  # tool calls and what tools return
    "empty_turn",
    "marks",  # <image>, <video>, <bbox> or <ref-object>: not as many as there are media, boxes or names
    "remote_media",  # media behind http(s)
    "missing_media",
    "unreadable_media",
    "boxes",  # a box that is no two or four numbers, or of a picture that is not there
    "too_long",
)


class Unusable(ValueError):
    """A conversation that cannot be used. `reason`, one of `REASONS`, is what a ledger counts; `text` says it whole."""

    def __init__(self, reason: str, text: str):
        assert reason in REASONS, reason
        super().__init__(reason, text)  # what it is pickled by, for other ranks
        self.reason = reason
        self.text = text

    def __str__(self) -> str:
        return f"{self.reason}: {self.text}"


@dataclass(frozen=True)
class Media:
    """A picture or a video. `path` may also be a `data:` URL, which the functions of `mm_data.images` read as well."""

    kind: Literal["image", "video"]
    path: str
    max_pixels: int | None = None  # of a picture, or of a frame: less than the processor's own, where an item says so


@dataclass(frozen=True)
class Box:
    """A box (x1, y1, x2, y2) or a point (x, y) in a picture: in pixels of the picture as `read_image` gives it, or from
    0 to 1 where `normalized`. `media` counts the media of the conversation from 0.
    """

    numbers: tuple[float, ...]
    media: int
    normalized: bool = False


@dataclass(frozen=True)
class Turn:
    """What one says. Texts are never empty, and no two of them follow one another."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | Media | Box, ...]


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn, each question perhaps after a system turn. `id` is unique in what was read."""

    id: str
    turns: tuple[Turn, ...]

    @cached_property
    def media(self) -> tuple[Media, ...]:
        """Those of all turns, in the order of their places."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, Media))
