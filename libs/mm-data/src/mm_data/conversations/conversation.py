"""What a model is taught to answer: turns of text, pictures, videos and boxes. This package imports no torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from mm_data.files import shorten

if TYPE_CHECKING:
    import numpy as np

    from mm_data.video import VideoInfo

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

# Errors that say nothing of a file: it can be read another time, or by another process.
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


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

    # A model's processing imports nothing from here: it asks a medium to open itself, which raises Unusable.

    def read_size(self) -> tuple[int, int]:
        """Of a picture: height and width of what `read_image` gives, from the header alone."""
        from mm_data.images import read_size

        with self._refusing():
            return read_size(self.path)

    def read_image(self) -> np.ndarray:
        """Of a picture: H W 3 uint8; see `mm_data.images.read_image`."""
        from mm_data.images import read_image

        with self._refusing():
            return read_image(self.path)

    def probe(self) -> VideoInfo:
        """Of a video: what its packets tell; see `mm_data.video.probe`."""
        from mm_data.video import probe

        with self._refusing():
            return probe(self.path)

    def read_frames(
        self, info: VideoInfo, indices: Sequence[int], each: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Of a video that was probed: frames F H W 3 uint8 by their numbers, each of which went through `each`."""
        from mm_data.video import read_video

        with self._refusing():
            return read_video(info, indices, each=each).frames

    def refuse(self, reason: str) -> Unusable:
        """The error for what a model cannot take: `raise media.refuse("is 3x9000: ...")`."""
        return Unusable("unreadable_media", f"{shorten(self.path, 200)} {reason}")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Unusable:
            raise
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) in OF_THE_MACHINE:
                raise
            there = self.path.startswith("data:") or os.path.exists(self.path)
            raise Unusable("unreadable_media" if there else "missing_media", str(error)) from error


@dataclass(frozen=True)
class Box:
    """A box (x1, y1, x2, y2) or a point (x, y) in a picture: in pixels of the picture as `read_image` gives it, or from
    0 to 1 where `normalized`. `media` counts the media of the conversation from 0.
    """

    numbers: tuple[float, ...]
    media: int
    normalized: bool = False

    def scale(self, size: tuple[int, int], resized: tuple[int, int]) -> tuple[int, ...]:
        """Its numbers in a picture of height and width `size` that was resized: whole pixels, as models say them.

        Raises Unusable for what lies outside of the picture.
        """
        (height, width), (rows, columns) = size, resized
        by_x, by_y = (columns, rows) if self.normalized else (columns / width, rows / height)
        scaled = tuple(number * by for number, by in zip(self.numbers, (by_x, by_y) * 2, strict=False))
        if not all(-0.5 <= number <= most + 0.5 for number, most in zip(scaled, (columns, rows) * 2, strict=False)):
            picture = "0 to 1" if self.normalized else f"a picture of {height}x{width}"
            raise Unusable("boxes", f"a box of {list(self.numbers)} lies outside of {picture}")
        return tuple(round(number) for number in scaled)


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

    @property
    def question(self) -> str:
        """The last one, with <image>, <video> and <box> where such stand; empty where nothing is asked."""
        asked = next((turn.parts for turn in reversed(self.turns) if turn.role == "user"), ())
        return "".join(part if isinstance(part, str) else f"<{getattr(part, 'kind', 'box')}>" for part in asked)
