"""Opening and reading what others wrote: regular files only, JSON and TOML of bounded size and depth.

Whatever lies at a path, reading ends: a named pipe would be waited for, a device never ends, and a small text can ask
for gigabytes once it is parsed.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

MAX_TEXT = 32 * 2**20  # bytes of a JSON, TOML or text file: the index of 200,000 tensors has 20 MB
MAX_DEPTH = 64  # tables and lists in one another
_MAX_PARTS = 2_000_000  # values, lists and tables of a JSON text: each takes some 100 bytes once it is parsed
_QUOTED = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
# A dotted TOML key of many parts, whose time to be read grows with their square. A part may be a string.
_TOML_STRING = re.compile(r"""\"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'[^'\n]*'""")
_LONG_KEY = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{MAX_DEPTH}}}")
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class TooDeep(ValueError):
    """Lists and tables in one another, more of them than any file needs."""

    def __init__(self) -> None:
        super().__init__(f"its lists and tables are nested more than {MAX_DEPTH} deep")


def refuse_special(path: str | Path) -> None:
    """Raises ValueError for what is there and is neither a regular file nor a directory, OSError for what is not."""
    mode = os.stat(path).st_mode
    if not stat.S_ISDIR(mode):
        _refuse_irregular(path, mode)


def _refuse_irregular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ValueError(f"{path} is {kind}, not a regular file: only regular files are read")


def open_file(path: str | Path) -> BinaryIO:
    """A regular file, open for reading bytes, without a buffer.

    Raises ValueError for a directory, a named pipe, a socket or a device, without waiting for it; OSError as `open`.
    """
    _refuse_irregular(path, os.stat(path).st_mode)  # opening one already can do something: a pipe's writer goes on
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        _refuse_irregular(path, os.fstat(descriptor).st_mode)  # it may have been exchanged since
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, limit: int = MAX_TEXT, what: str = "file of its kind") -> bytes:
    """All of a regular file. Raises ValueError where it has more than `limit` bytes; else as `open_file`."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else read_exactly(file, size) + (file.read(1) or b"")
    if size > limit or len(data) > size:
        raise ValueError(f"{path} has {max(size, len(data)):,} bytes, more than any {what} (at most {limit:,})")
    return data


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """So many bytes, fewer only at the end of the file; the system gives at most 2 GB at once."""
    data = bytearray()
    while len(data) < count and (block := file.read(min(count - len(data), 2**30))):
        data += block
    return bytes(data)


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises ValueError for another encoding."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, and for one that is too large or too deep."""
    raw = read_bytes(path)
    try:
        return {**parse_json(raw)}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error


def parse_json(raw: bytes | str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON text, with or without a byte order mark. Raises ValueError for what is none, too large or too deep.

    Args:
        pairs: makes a table of the pairs of an object; dict where it is None.
    """
    data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    if _count_parts(data) > _MAX_PARTS and _count_parts(_QUOTED.sub(b"", data)) > _MAX_PARTS:
        raise ValueError(f"it holds more than {_MAX_PARTS:,} values")
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs)
    except RecursionError as error:
        raise TooDeep from error
    refuse_deep(value)
    return value


def _count_parts(data: bytes) -> int:
    return sum(data.count(mark) for mark in (b",", b"[", b"{"))


def refuse_deep(value: Any) -> None:
    """Raises TooDeep for more than `MAX_DEPTH` lists and tables in one another."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inside = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in inside if isinstance(inner, (dict, list))]
    if level:
        raise TooDeep


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother, self.maxstring, self.maxlong = 2, 80, 80, 40


def brief(value: Any) -> str:
    """A value for a message, cut short: what a file holds can be of any length and depth."""
    return _Brief().repr(value)


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file. Raises ValueError for anything else, naming it."""
    text = read_text(path)
    try:
        return parse_toml(text)
    except ValueError as error:  # also a number of 5,000 digits
        raise ValueError(f"{path} is not TOML: {error}") from error


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML text. Raises ValueError for what is none: TOMLDecodeError, or TooDeep."""
    if _LONG_KEY.search(_TOML_STRING.sub("x", text)):
        raise TooDeep
    try:
        tables = tomllib.loads(text)
    except RecursionError as error:
        raise TooDeep from error
    refuse_deep(tables)
    return tables
