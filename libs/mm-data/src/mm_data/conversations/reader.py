"""Conversations of one or several files, read when they are asked for."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from mm_data.annotations import DECODER
from mm_data.conversations.conversation import Conversation, Unusable
from mm_data.conversations.folders import Folders
from mm_data.conversations.formats import Tags, read_turns
from mm_data.conversations.index import Index, Lines, index_items
from mm_data.files import open_file, parse_json, shorten
from mm_data.identity import identify_files

Boxes = Literal["text", "original"]


@dataclass(frozen=True)
class Source:
    """A JSON or JSONL file, and how often its conversations are shown: a weight of 2 shows each twice in an epoch.

    max_items: of longer files the first so many. media: as that of `read_conversations`, for this file.
    """

    path: str | Path
    weight: Annotated[float, "> 0"] = 1.0
    max_items: int | None = None
    media: str | Path | None = None
    tags: Tags | None = None


class Conversations(Sequence[Conversation]):
    """Items of all sources in their order; each is read and parsed when it is asked for. Several threads may ask.

    `self[i]` raises Unusable for an item that cannot be used.
    """

    def __init__(
        self, sources: Sequence[Source], media: str | Path | None, *, boxes: Boxes = "text", answered: bool = True
    ):
        """As `read_conversations`."""
        if not sources:
            raise ValueError("no files of conversations were given")
        self.sources = tuple(sources)
        self.folders = Folders()
        self._options = {"parse_boxes": boxes == "original", "answered": answered}
        names = _name_files([Path(source.path) for source in sources])
        self._files = [_File(source, name, media) for source, name in zip(sources, names, strict=True)]
        ends = list(accumulate(map(len, self._files)))
        self.spans = tuple(range(end - len(file), end) for end, file in zip(ends, self._files, strict=True))
        """The indices of each source."""
        self._ends = ends
        self.ids: Sequence[str] = _Ids(self)

    @property
    def identity(self) -> str:
        """Changes where an item may come to be read as another: with files, options, and folders of media."""
        contents = identify_files({str(source.path): Path(source.path) for source in self.sources})
        files = [(file.roots, file.tags and repr(file.tags), len(file)) for file in self._files]
        parts = [list(contents.values()), files, self._options]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        file, number = self._place(index)
        turns = file.read(number, self.folders, self._options)
        return Conversation(file.id(number), turns)

    def num_bytes(self, index: int) -> int:
        """Bytes of the item in its file. Its texts have no more in UTF-8, and a token of text has at least one."""
        file, number = self._place(index)
        return int(file.index.ends[number] - file.index.begins[number])

    def read_text(self, index: int) -> str:
        """The item as it stands in its file."""
        file, number = self._place(index)
        return file.read_bytes(number).decode("utf-8", "backslashreplace")

    def find_id(self, id: str) -> int:
        """The index of an id. ValueError where none has it."""
        for span, file in zip(self.spans, self._files, strict=True):
            number = id.removeprefix(f"{file.name}[").removesuffix("]")
            if number.isdecimal() and int(number) < len(file) and file.id(int(number)) == id:
                return span[int(number)]
        raise ValueError(f"no conversation is {shorten(id)}: they are {self.ids[0]} to {self.ids[-1]}")

    def _place(self, index: int) -> tuple[_File, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} conversations, 0 to {len(self) - 1}: not {index}")
        at = bisect_right(self._ends, index)
        return self._files[at], index - self.spans[at].start


class _Ids(Sequence[str]):
    """Made when asked for: a million texts would be 100 MB."""

    def __init__(self, conversations: Conversations):
        self._of = conversations

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, index: int) -> str:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, number = self._of._place(index + len(self) * (index < 0))
        return file.id(number)

    def __iter__(self) -> Iterator[str]:
        for file in self._of._files:
            yield from map(file.id, range(len(file)))


class _File:
    """An open file and where its items are. It can be pickled: another process opens it anew."""

    def __init__(self, source: Source, name: str, media: str | Path | None):
        self.name = name
        self.tags = source.tags
        media = source.media if source.media is not None else media
        roots = [os.fspath(root) for root in (media, Path(source.path).parent, "") if root is not None]
        self.roots = tuple(dict.fromkeys("" if root == "." else root for root in roots))
        index = index_items(source.path)
        most = len(index) if source.max_items is None else source.max_items
        self.index = Index(index.path, index.size, index.begins[:most], index.ends[:most])
        self._open()

    def _open(self) -> None:
        self._file = open_file(self.index.path)
        self._lines = Lines(self.index.path)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_file", "_lines")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.index)

    def id(self, number: int) -> str:
        return f"{self.name}[{number}]"

    def read_bytes(self, number: int) -> bytes:
        begin, end = int(self.index.begins[number]), int(self.index.ends[number])
        data = os.pread(self._file.fileno(), end - begin, begin)
        if len(data) != end - begin or os.fstat(self._file.fileno()).st_size != self.index.size:
            raise ValueError(f"{self.index.path} was changed while it was in use")
        return data

    def read(self, number: int, folders: Folders, options: dict[str, bool]) -> tuple:
        data = self.read_bytes(number)
        try:
            record = parse_json(data.decode(), self.index.path, decoder=DECODER)
        except ValueError as error:  # also another encoding
            raise Unusable("broken_json", self._locate(number, data, error)) from error
        try:
            named = record if self.tags is None else self.tags.rename(record)
            return read_turns(named, lambda name: folders.find(name, self.roots), **options)
        except Unusable as error:
            own = record.get("id") if isinstance(record, dict) else None
            if isinstance(own, str | int):
                raise Unusable(error.reason, f"{error.text} (its own id is {shorten(str(own))})") from error
            raise

    def _locate(self, number: int, data: bytes, error: ValueError) -> str:
        """What is wrong with the JSON of an item, with its place in the file."""
        begin = int(self.index.begins[number])
        if isinstance(error, UnicodeDecodeError):
            return f"{self._lines.locate(begin + error.start)}: not UTF-8 text: {error.reason}"
        try:
            DECODER.decode(data.decode())
        except json.JSONDecodeError as again:
            place = begin + len(data.decode()[: again.pos].encode())
            return f"{self._lines.locate(place)}: not JSON: {again.msg}"
        except (ValueError, RecursionError):
            pass
        return f"{self._lines.locate(begin)}: {str(error).removeprefix(str(self.index.path)).partition(': ')[2]}"


def _name_files(paths: Sequence[Path]) -> list[str]:
    """The names of files; of those with equal names, with as many folders before them as tell them apart.

    ValueError for a file that is there twice.
    """
    whole = [PurePath(os.path.abspath(path)) for path in paths]
    twice = [str(path) for path, count in Counter(os.path.realpath(path) for path in paths).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice: give it once, with a weight")
    names = [path.name for path in whole]
    for parts in range(2, max(len(path.parts) for path in whole) + 1):
        counts = Counter(names)
        names = [
            "/".join(path.parts[-parts:]) if counts[name] > 1 else name for path, name in zip(whole, names, strict=True)
        ]
    return names


def read_conversations(
    sources: Sequence[Source], media: str | Path | None = None, *, boxes: Boxes = "text", answered: bool = True
) -> Conversations:
    """Find the items of all files, without parsing them.

    media: the folder in which relative paths of pictures and videos are looked for first; then beside the file that
    names them, then where the program runs.
    boxes: "original" makes `bbox_2d` and `point_2d` lists in answers boxes, in pixels of the last picture before them;
    "text" leaves them. `objects` are always read.
    answered: a conversation must end with an answer; with False it may end with a question.

    Raises ValueError, naming file, line and byte, for a file of which the items cannot be told from one another.
    """
    return Conversations(sources, media, boxes=boxes, answered=answered)
