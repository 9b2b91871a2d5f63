"""Where the items of a JSON array or of a JSONL file stand in it, found without parsing them, at seconds a gigabyte.

Of a JSON array the texts are told from what is outside of them by their quotes, and the items by the depth of the
brackets outside. Whether an item is JSON shows when it is parsed; between two of them one comma must stand, and nothing
else. The file is read in pieces and never held, also not as a memory map: that would end the program where a file
shrinks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from mm_data.files import JSON, MAX_LINE, MAX_TEXT, find_fault, open_file, shorten, skip_space

PIECE = 1 << 20  # bytes that are looked at together
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_SHORT = 64  # bytes of a line that may be blank
_MARKS = bytes(byte in b'"\\[]{}' for byte in range(256))
_STEP = np.zeros(256, np.int8)  # how the depth changes at a byte
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_IS_SPACE = np.zeros(256, bool)
_IS_SPACE[list(_SPACE)] = True


@dataclass(frozen=True)
class Index:
    """begins, ends: int64, of each item in bytes of the file. size: of the file when it was indexed."""

    path: Path
    size: int
    begins: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.begins)


def index_items(path: str | Path) -> Index:
    """The items of a JSON array, or the lines of a JSONL file that are not blank: which of them it is shows at its
    first character. ValueError, naming line and byte, where items cannot be told from one another, and for no items.
    """
    path = Path(path)
    if fault := find_fault(path):
        raise ValueError(fault)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        begin = _skip_space(file, len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
        file.seek(begin)
        first = file.read(1)
        if first == b"[":
            begins, ends = _index_array(path, file, begin, size)
        elif first == b"{":
            _refuse_one_object(path, file, begin, size)
            begins, ends = _index_lines(file, begin, size)
        else:
            what = f"begins with {shorten(first.decode('latin-1'))!r}" if first else "is empty"
            raise ValueError(f"{path} {what}: conversations are a JSON array of objects, or one object a line (JSONL)")
    if not len(begins):
        raise ValueError(f"{path} lists no conversations")
    return Index(path, size, begins, ends)


class Lines:
    """The lines of a file, for messages. Several threads may ask."""

    def __init__(self, path: Path):
        self._path = path
        self._before: list[int] = []  # how many lines end before each piece
        self._lock = Lock()

    def locate(self, byte: int) -> str:
        """`line 12 (byte 3,456)`. The file is read once, when it is asked first."""
        with open_file(self._path) as file, self._lock:
            if not self._before:
                counts = [piece.count(b"\n") for _, piece in _pieces(file, 0, os.fstat(file.fileno()).st_size)]
                self._before = list(accumulate(counts, initial=0))
            number = min(byte // PIECE, len(self._before) - 1)
            piece = os.pread(file.fileno(), byte - number * PIECE, number * PIECE)
        return f"line {self._before[number] + piece.count(10) + 1:,} (byte {byte:,})"


def _skip_space(file: BinaryIO, place: int) -> int:
    """Where the next byte stands that is no white space, or the end."""
    file.seek(place)
    while piece := file.read(1 << 16):
        if rest := piece.lstrip(_SPACE):
            return place + len(piece) - len(rest)
        place += len(piece)
    return place


def _pieces(file: BinaryIO, place: int, size: int) -> Iterator[tuple[int, bytes]]:
    file.seek(place)
    while place < size and (piece := file.read(min(PIECE, size - place))):
        yield place, piece
        place += len(piece)


def _refuse_one_object(path: Path, file: BinaryIO, begin: int, size: int) -> None:
    """ValueError for a file that is one object over several lines, or a data JSON. Of JSONL the first line is whole."""
    file.seek(begin)
    if size > MAX_LINE:
        return
    line = _parse(file.readline())
    file.seek(begin)
    whole = line or _parse(file.read())
    if whole is not None and "dataset_param" in whole:
        raise ValueError(f"{path} is MindSpeed-MM's data JSON, which names files of conversations, and is none of them")
    if line is None and whole is not None:
        raise ValueError(
            f"{path} is one object over several lines: conversations are a JSON array of objects, or one object a line"
        )


def _parse(data: bytes) -> dict | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _index_lines(file: BinaryIO, begin: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    breaks = [np.flatnonzero(np.frombuffer(piece, np.uint8) == 10) + at for at, piece in _pieces(file, begin, size)]
    ends = np.concatenate([*breaks, [size]]).astype(np.int64)
    begins = np.concatenate([[begin], ends[:-1] + 1]).astype(np.int64)
    kept = ends > begins
    for number in np.flatnonzero(kept & (ends - begins < _SHORT)):
        kept[number] = bool(os.pread(file.fileno(), int(ends[number] - begins[number]), int(begins[number])).strip())
    return begins[kept], ends[kept]


def _index_array(path: Path, file: BinaryIO, begin: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Items are what stands at depth 1 in brackets of its own."""
    begins, ends, owners, commas = [], [], [], []
    depth, quoted, escaped, begun = 1, False, False, 0
    closed = None
    for place, piece in _pieces(file, begin + 1, size):
        data = np.frombuffer(piece, np.uint8)
        marks, quoted, escaped = _find_brackets(data, piece, quoted, escaped)
        steps = _STEP[data[marks]]
        depths = depth + np.cumsum(steps, dtype=np.int64)
        stop = len(piece)
        if closed is None and len(closing := np.flatnonzero(depths == 0)):
            stop = int(marks[closing[0]])
            closed = place + stop
            if data[stop] != ord("]"):
                raise _fault(path, begin, f"a bracket of another kind ends it in {Lines(path).locate(closed)}")
            if _skip_space(file, closed + 1) < size:
                break
            file.seek(place + len(piece))
        first, last = marks[(steps > 0) & (depths == 2)], marks[(steps < 0) & (depths == 1)] + 1
        begins.append(first + place)
        ends.append(last + place)
        # What is outside of items: the first part of it before item number `begun`, the next before the one after it.
        after = int(depths[-1]) if len(depths) else depth
        starts = np.concatenate([[0], last]) if depth == 1 else last
        stops = np.concatenate([first, [stop]]) if after <= 1 else first
        text, owner = _gather(data, starts, stops)
        if len(odd := np.flatnonzero(~_IS_SPACE[text] & (text != ord(",")))):
            raise _between(
                path, begin, begun + int(owner[odd[0]]), text[odd[0] :][:20], place + int(starts[owner[odd[0]]])
            )
        owners.append(np.arange(begun, begun + len(starts)))
        commas.append(np.bincount(owner[text == ord(",")], minlength=len(starts)))
        begun += len(first)
        depth = after
    if closed is None:
        raise _fault(path, begin, "it ends inside of a text" if quoted else f"it ends inside of {depth} brackets")
    if _skip_space(file, closed + 1) < size:
        raise _fault(path, begin, f"something follows the end of the list in {Lines(path).locate(closed)}")
    found, last = np.concatenate(begins).astype(np.int64), np.concatenate(ends).astype(np.int64)
    counts = np.bincount(np.concatenate(owners), weights=np.concatenate(commas), minlength=begun + 1)
    if len(bad := np.flatnonzero(counts != _wanted(begun))):
        at, many = int(bad[0]), int(counts[bad[0]])
        seen = {0: "no comma is", 1: "a comma is"}.get(many, f"{many} commas are")
        before = f"item {at}" if at < begun else "the end"
        place = Lines(path).locate(int(last[at - 1]) if at else begin + 1)
        raise _fault(path, begin, f"{seen} between items, before {before}, after {place}")
    return found, last


def _wanted(items: int) -> np.ndarray:
    """Commas before each item, and before the end."""
    wanted = np.ones(items + 1)
    wanted[0] = wanted[-1] = 0
    return wanted


def _gather(data: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, the number of their part) of all parts from start to stop together."""
    lengths = stops - starts
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return data[np.arange(len(owner)) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)], owner


def _find_brackets(data: np.ndarray, piece: bytes, quoted: bool, escaped: bool) -> tuple[np.ndarray, bool, bool]:
    """Places of the brackets outside of texts.

    quoted: whether the piece begins inside of a text; escaped: whether its first byte does not count, after a
    backslash. Also returns these two of what follows the piece.
    """
    marks = np.flatnonzero(np.frombuffer(piece.translate(_MARKS), np.uint8))
    kinds = data[marks]
    if escaped and len(marks) and marks[0] == 0:
        marks, kinds = marks[1:], kinds[1:]
    # What follows a run of backslashes is escaped where their number is odd.
    slashes = marks[kinds == ord("\\")]
    starts = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
    lengths = np.diff(starts, append=len(slashes))
    behind = (slashes[starts] + lengths)[lengths % 2 == 1]
    quotes = kinds == ord('"')
    if len(marks):
        at = np.minimum(np.searchsorted(marks, behind), len(marks) - 1)
        quotes[at[marks[at] == behind]] = False
    inside = np.logical_xor.accumulate(quotes) ^ quoted
    escapes = bool(len(behind) and behind[-1] == len(piece))
    return marks[(_STEP[kinds] != 0) & ~inside], bool(inside[-1]) if len(inside) else quoted, escapes


def _between(path: Path, begin: int, item: int, text: np.ndarray, place: int) -> ValueError:
    return _fault(
        path,
        begin,
        f"{shorten(text.tobytes().decode('latin-1'))!r} stands before item {item}, after {Lines(path).locate(place)}: "
        "items are objects, with a comma between two of them",
    )


def _fault(path: Path, begin: int, seen: str) -> ValueError:
    """What to raise for a broken array that begins at a byte: where it breaks for a parser, or what was seen of it."""
    return ValueError(f"{path} is not a JSON array of objects: {_find_break(path, begin) or seen}")


def _find_break(path: Path, begin: int) -> str | None:
    """The first item that is no JSON, parsed one by one; None where all are, or where the file is too large."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_TEXT:
            return None
        data = file.read()
    number = place = 0
    try:
        text = data[begin:].decode()
        place = 1
        while not text.startswith("]", place := skip_space(text, place)):
            _, place = JSON.raw_decode(text, place)
            place = skip_space(text, place)
            if text.startswith(",", place):
                place += 1
            elif not text.startswith("]", place):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
            number += 1
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 text, {Lines(path).locate(begin + error.start)}: {error.reason}"
    except json.JSONDecodeError as error:
        return f"item {number}, {Lines(path).locate(begin + len(text[: error.pos].encode()))}: {error.msg}"
    except (ValueError, RecursionError) as error:
        return f"item {number}: {error}"
    return None
