"""Conversations of one or several files, read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mm_data.conversations.conversation import Conversation

Boxes = Literal["text", "original"]


@dataclass(frozen=True)
class Source:
    """A JSON or JSONL file, and how often its conversations are shown: a weight of 2 shows each twice in an epoch."""

    path: str | Path
    weight: Annotated[float, "> 0"] = 1.0


class Conversations(Sequence[Conversation]):
    """Items of all sources in their order; each is read and parsed when it is asked for. Several threads may ask.

    `self[i]` raises Unusable for an item that cannot be used.
    """

    sources: tuple[Source, ...]
    spans: tuple[range, ...]  # the indices of each source
    ids: Sequence[str]  # "data.json[12]": the file and the number of the item in it; made when asked for

    def num_bytes(self, index: int) -> int:
        """Bytes of the item in its file: its texts have no more in UTF-8, so it has no more text tokens."""
        raise NotImplementedError


def read_conversations(
    sources: Sequence[Source], media: str | Path | None = None, *, boxes: Boxes = "text", answered: bool = True
) -> Conversations:
    """Find the items of all files, without parsing them.

    media: the folder in which relative paths of pictures and videos are looked for first; then beside the file that
    names them, then where the program runs.
    boxes: "original" makes `bbox_2d` lists in the JSON of answers boxes (of the only picture, or the last one before);
    "text" leaves them. `objects` are always read.
    answered: a conversation must end with an answer; with False it may end with a question.

    Raises ValueError, naming file, line and byte, for a file of which the items cannot be told from one another.
    """
    raise NotImplementedError
