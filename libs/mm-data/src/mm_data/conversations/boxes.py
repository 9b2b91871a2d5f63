"""Boxes of an item: its `objects`, and those that are written in the JSON of answers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mm_data.conversations.conversation import Box, Media, Turn, Unusable
from mm_data.files import shorten, show

_KEYS = ("ref", "bbox", "bbox_type", "image_id", "width", "height")
_WRITTEN = re.compile(r'"(?:bbox_2d|point_2d)"\s*:\s*(?=\[)')
_NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_LIST = re.compile(rf"\[\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*\]")


class Objects:
    """The names and boxes of an item, taken one after the other as the marks come."""

    def __init__(self, objects: Any):
        if objects is not None and not isinstance(objects, dict):
            raise Unusable("boxes", f"objects is {show(objects)}: it must be an object with ref and bbox")
        self.names: list[str] = []
        self.boxes: list[Box] = []
        self.marks = {"ref-object": 0, "bbox": 0}
        if not objects:
            return
        if odd := [shorten(key) for key in objects if key not in _KEYS]:
            raise Unusable("boxes", f"objects has {', '.join(odd)}: what is read is {', '.join(_KEYS[:4])}")
        kind = objects.get("bbox_type") or "real"
        if kind not in ("real", "norm1"):
            raise Unusable("boxes", f"bbox_type is {show(kind)}: it must be real or norm1")
        self.names, boxes, pictures = (_list(objects, key) for key in ("ref", "bbox", "image_id"))
        if pictures and len(pictures) != len(boxes):
            raise Unusable("boxes", f"there are {len(boxes)} boxes, but {len(pictures)} numbers in image_id")
        pictures = pictures or [0] * len(boxes)
        self.boxes = [make_box(box, picture, kind == "norm1") for box, picture in zip(boxes, pictures, strict=True)]

    def take(self, mark: str) -> Iterator[str | Box]:
        """The next name or box, whose `media` counts the pictures only; nothing where there is none left."""
        listed = self.boxes if mark == "bbox" else self.names
        self.marks[mark] += 1
        yield from listed[self.marks[mark] - 1 : self.marks[mark]]

    def place(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns with boxes whose `media` counts all media. Raises Unusable where something was not taken."""
        for mark, listed in (("ref-object", self.names), ("bbox", self.boxes)):
            if len(listed) != self.marks[mark]:
                raise Unusable("marks", f"<{mark}> is there {self.marks[mark]} times, for {len(listed)} in objects")
        if not self.boxes:
            return turns
        media = [part for turn in turns for part in turn.parts if isinstance(part, Media)]
        pictures = [number for number, one in enumerate(media) if one.kind == "image"]

        def place(part: str | Media | Box) -> str | Media | Box:
            if not isinstance(part, Box):
                return part
            if part.media >= len(pictures):
                raise Unusable("boxes", f"a box is of image {part.media}, and there are {len(pictures)}")
            return replace(part, media=pictures[part.media])

        return tuple(replace(turn, parts=tuple(map(place, turn.parts))) for turn in turns)


def _list(objects: dict, key: str) -> list:
    found = objects.get(key)
    if found is not None and not isinstance(found, list):
        raise Unusable("boxes", f"{key} of objects is {show(found)}, not a list")
    if key == "ref" and not all(isinstance(name, str) and name for name in found or []):
        raise Unusable("boxes", f"ref of objects is {show(found)}: names are texts")
    return found or []


def make_box(numbers: Any, media: Any, normalized: bool = False) -> Box:
    """Raises Unusable for what is no box and no point."""
    good = isinstance(numbers, list) and len(numbers) in (2, 4)
    if not good or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise Unusable("boxes", f"a box is {show(numbers)}: it must be four numbers, or two of a point")
    box = tuple(map(float, numbers))
    most = 1.0 if normalized else math.inf
    if not all(math.isfinite(n) and 0 <= n <= most for n in box) or (
        len(box) == 4 and (box[:2] > box[2:] or box[1] > box[3])
    ):
        rule = "0 <= x1 <= x2 <= 1" if normalized else "0 <= x1 <= x2"
        raise Unusable("boxes", f"a box is {show(numbers)}: it must be [x1, y1, x2, y2] with {rule}, and y as well")
    if isinstance(media, bool) or not isinstance(media, int) or media < 0:
        raise Unusable("boxes", f"image_id has {show(media)}: it must be the number of an image, from 0")
    return Box(box, media, normalized)


def split_answers(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns, where every list behind "bbox_2d": or "point_2d": of an answer is a box of the last picture or video
    before it, in its pixels. Raises Unusable for a list that is no box, and where there is no picture.
    """
    media, split = 0, []
    for turn in turns:
        media += sum(isinstance(part, Media) for part in turn.parts)
        if turn.role == "assistant":
            parts = tuple(
                piece
                for part in turn.parts
                for piece in (_split_text(part, media - 1) if isinstance(part, str) else [part])
            )
            turn = replace(turn, parts=parts)
        split.append(turn)
    return tuple(split)


def _split_text(text: str, media: int) -> Iterator[str | Box]:
    begin = 0
    for found in _WRITTEN.finditer(text):
        numbers = _LIST.match(text, found.end())
        if numbers is None:
            shown = shorten(text[found.start() : found.start() + 60])
            raise Unusable("boxes", f"an answer has {shown}: a list of four numbers, or of two, must follow")
        if media < 0:
            raise Unusable(
                "boxes", f"an answer has {shorten(text[found.start() : numbers.end()])}, and no image is before it"
            )
        yield text[begin : found.end()]
        yield make_box([float(n) for n in numbers[1].split(",")], media)
        begin = numbers.end()
    if begin < len(text):
        yield text[begin:]
