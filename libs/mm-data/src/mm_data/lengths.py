"""What becomes of conversations that are too long. Pictures and videos are atomic: none is ever cut."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from mm_data.conversations import Box, Conversation, Media, Turn, Unusable
from mm_data.files import shorten
from mm_data.processing import Processing, Size

TooLong = Literal["drop", "refuse", "drop_turns", "shrink"]
_PIXELS = 64  # in steps of so many pictures are shrunk
_MOST_PIXELS = 2**26  # no picture is larger after processing


@dataclass(frozen=True)
class Limits:
    """What a conversation may take, and what is done where it takes more:

    - "drop": it is left out
    - "refuse": nothing is trained
    - "drop_turns": its oldest questions go, with their answers and media, until it fits. A system turn at the beginning
      stays, and so does the last question. A question stays too where a box that is left lies in its picture.
    - "shrink": one limit of pixels for all its media is lowered until it fits: the largest shrink first

    What does not fit after that is left out.
    """

    max_tokens: int
    max_patches: int
    too_long: TooLong = "drop"

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.too_long not in ("drop", "refuse", "drop_turns", "shrink"):
            raise ValueError(f"too_long={self.too_long!r} must be drop, refuse, drop_turns or shrink")

    def hold(self, size: Size) -> bool:
        return size.tokens <= self.max_tokens and size.patches <= self.max_patches


class Fitted(NamedTuple):
    """A conversation that fits."""

    conversation: Conversation
    size: Size
    changed: bool


def fit(conversation: Conversation, processing: Processing, limits: Limits) -> Fitted:
    """The conversation, made to fit as `limits` say. Raises Unusable where it does not ("too_long"), and as `measure`.

    The same for the same conversation, whoever asks and whenever.
    """
    size = processing.measure(conversation)
    if limits.hold(size):
        return Fitted(conversation, size, False)
    if limits.too_long == "drop_turns":
        fitted = _drop_turns(conversation, processing, limits)
    elif limits.too_long == "shrink":
        fitted = _shrink(conversation, processing, limits)
    else:
        fitted = None
    if fitted is None:
        raise Unusable("too_long", _describe(conversation, processing, limits, size))
    return fitted


def _drop_turns(conversation: Conversation, processing: Processing, limits: Limits) -> Fitted | None:
    """The longest end that fits, of whole questions with their answers."""
    kept, size = None, None

    def fits(shorter: Conversation) -> bool:
        nonlocal kept, size
        measured = processing.measure(shorter)
        if limits.hold(measured):
            kept, size = shorter, measured  # of all that fit, the last asked for is the longest
        return limits.hold(measured)

    ends = _ends(conversation)
    bisect_left(ends, True, key=fits)
    return None if kept is None else Fitted(kept, size, True)


def _ends(conversation: Conversation) -> list[Conversation]:
    """The conversation without its oldest question, without the two oldest, …"""
    turns = conversation.turns
    system = turns[:1] if turns[0].role == "system" else ()
    # A question begins with its own system turn, if it has one.
    asked = [number for number, turn in enumerate(turns) if turn.role == "user"]
    starts = [number - (number > len(system) and turns[number - 1].role == "system") for number in asked]
    ends = []
    for start in starts[1:]:
        gone = sum(isinstance(part, Media) for turn in turns[len(system) : start] for part in turn.parts)
        left = [(turn, _renumber(turn, gone)) for turn in turns[start:]]
        if all(renumbered is not None for _, renumbered in left):
            ends.append(replace(conversation, turns=(*system, *(renumbered for _, renumbered in left))))
    return ends


def _renumber(turn: Turn, gone: int) -> Turn | None:
    """A turn after so many media are gone; None where one of its boxes lies in one of them."""
    boxes = [part for part in turn.parts if isinstance(part, Box)]
    if any(box.media < gone for box in boxes):
        return None
    parts = [replace(part, media=part.media - gone) if isinstance(part, Box) else part for part in turn.parts]
    return replace(turn, parts=tuple(parts))


def _shrink(conversation: Conversation, processing: Processing, limits: Limits) -> Fitted | None:
    """The largest pictures that fit."""
    kept, size = None, None

    def is_too_large(steps: int) -> bool:
        nonlocal kept, size
        smaller = _cap(conversation, steps * _PIXELS)
        measured = processing.measure(smaller)
        if limits.hold(measured):
            kept, size = smaller, measured
        return not limits.hold(measured)

    if conversation.media:
        bisect_left(range(1, _MOST_PIXELS // _PIXELS), True, key=is_too_large)
    return None if kept is None else Fitted(kept, size, True)


def _cap(conversation: Conversation, pixels: int) -> Conversation:
    def cap(part: str | Media | Box) -> str | Media | Box:
        if not isinstance(part, Media):
            return part
        return replace(part, max_pixels=min(pixels, part.max_pixels or pixels))

    turns = tuple(replace(turn, parts=tuple(map(cap, turn.parts))) for turn in conversation.turns)
    return replace(conversation, turns=turns)


def _describe(conversation: Conversation, processing: Processing, limits: Limits, size: Size) -> str:
    over = []
    if size.tokens > limits.max_tokens:
        over.append(f"{size.tokens:,} tokens, {limits.max_tokens:,} may be")
    if size.patches > limits.max_patches:
        over.append(f"{size.patches:,} patches, {limits.max_patches:,} may be")
    text = f"takes {' and '.join(over)}"
    if conversation.media:
        alone = {media: processing.measure(_alone(media)).patches for media in conversation.media}
        largest = max(alone, key=alone.__getitem__)
        text += f"; the largest of its media, {shorten(largest.path, 200)}, has {alone[largest]:,} patches"
    return text


def _alone(media: Media) -> Conversation:
    return Conversation(media.path, (Turn("user", (media, "?")), Turn("assistant", (".",))))
