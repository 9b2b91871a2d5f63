"""Reading what others wrote, and writing so that a reader sees the old file or the new one, never half of either.

Whatever lies at a path, reading ends: only regular files are opened, for a named pipe would be waited for and a device
may never end. Texts are UTF-8, with or without a byte order mark, and bounded.
"""

import contextlib
import hashlib
import json
import os
import re
import reprlib
import stat
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

TEMPORARY = ".tmp-"
MAX_TEXT = 1 << 30  # bytes of a text that is read as a whole
MAX_LINE = 16 << 20  # bytes of a line, where a file is read by lines
_BLOCK = 4096  # bytes that are read at each place, to tell two files apart
MAX_DEPTH = 64  # lists and objects of JSON in one another
JSON = json.JSONDecoder()

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def find_fault(path: str | Path) -> str | None:
    """Why a path cannot be opened as a file, e.g. `a.mp4 is a folder`; None where the file system sees no reason."""
    shown = shorten(str(path), 200)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return f"{shown} is not there"
    except OSError as error:
        return f"{shown} cannot be opened: {error.strerror}"
    except ValueError as error:  # of Python, before the system is asked
        if isinstance(error, UnicodeEncodeError) and not re.search("[\ud800-\udfff]", str(path)):
            return f"{shown} has no name in {error.encoding}, the encoding of the locale: set PYTHONUTF8=1"
        return f"{shown} is no path: it holds a NUL, or half a character"
    return None if stat.S_ISREG(mode) else f"{shown} is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file"


def open_file(path: str | Path) -> BinaryIO:
    """A regular file, open for reading bytes.

    Raises ValueError for a folder, a named pipe, a socket or a device, without waiting for it; OSError as `open`.
    """
    _refuse_irregular(path, os.stat(path).st_mode)  # merely opening a pipe lets its writer go on
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _refuse_irregular(path, os.fstat(descriptor).st_mode)  # it may have been exchanged since
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_irregular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ValueError(f"{path} is {kind}, not a file: only regular files are read")


def read_text(path: str | Path) -> str:
    """A text of at most `MAX_TEXT` bytes. Raises ValueError for a longer one and another encoding; as `open_file`."""
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_TEXT:
            raise ValueError(
                f"{path} has {size:,} bytes, more than {MAX_TEXT:,}: split it, or write .jsonl, which is read by lines"
            )
        return _decode(path, file.read(), 0).removeprefix("\ufeff")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line, without its end; the file is not held in memory.

    Lines are those of an editor: str.splitlines would also cut at U+2028 and U+0085, which captions may hold. Raises
    ValueError for a line of more than `MAX_LINE` bytes, and for another encoding; else as `open_file`.
    """
    with open_file(path) as file:
        number = begin = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise ValueError(f"{path}, line {number}: it has more than {MAX_LINE:,} bytes: no sample needs so many")
            text = _decode(path, line, begin)
            yield number, (text.removeprefix("\ufeff") if number == 1 else text).removesuffix("\n").removesuffix("\r")
            begin += len(line)


def _decode(path: str | Path, data: bytes, begin: int) -> str:
    """`begin`: where the bytes stand in the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {begin + error.start}): save it as UTF-8"
        ) from error


def parse_json(text: str, path: str | Path, line: int = 1, decoder: json.JSONDecoder = JSON) -> Any:
    """The value of a JSON text, which begins at this line of `path`. Raises ValueError, naming file and line."""
    value, end = parse_json_at(text, skip_space(text, 0), path, line, decoder)
    if (rest := skip_space(text, end)) < len(text):
        raise json_error(path, json.JSONDecodeError("Extra data", text, rest), line)
    return value


def parse_json_at(
    text: str, place: int, path: str | Path, line: int = 1, decoder: json.JSONDecoder = JSON
) -> tuple[Any, int]:
    """(value, end) of the JSON value at `place`. Raises ValueError as `parse_json`."""
    try:
        value, end = decoder.raw_decode(text, place)
        if text.count("[", place, end) + text.count("{", place, end) > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
    except json.JSONDecodeError as error:
        raise json_error(path, error, line) from error
    except RecursionError as error:
        line += text.count("\n", 0, place)
        raise ValueError(f"{path}, line {line}: lists and objects nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:  # of the decoder's own rules
        raise ValueError(f"{path}, line {line + text.count(chr(10), 0, place)}: {error}") from error
    return value, end


def json_error(path: str | Path, error: json.JSONDecodeError, line: int) -> ValueError:
    """What to raise; `line`: where the text begins in the file."""
    return ValueError(f"{path}, line {line + error.lineno - 1}: not JSON: {error.msg}")


def skip_space(text: str, place: int) -> int:
    """Where the next character of JSON stands, from `place` on."""
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def shorten(text: str, length: int = 80) -> str:
    """The text for a message: in one line, of at most so many characters, without what steers a terminal."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:length])
    return safe if len(text) <= length else f"{safe}... ({len(text):,} characters)"


def escape(text: str) -> str:
    """The text as lines of a terminal, without what steers one: `\\x1b`, `\\u202e`. Line breaks and spaces stay."""
    return "".join(c if c.isprintable() or c == "\n" or _is_space(c) else _spell(c) for c in text)


def _is_space(character: str) -> bool:
    return unicodedata.category(character) == "Zs"


def _spell(character: str) -> str:
    return character.encode("unicode_escape").decode()


def show(value: Any) -> str:
    """A value of JSON for a message: as repr, but short, however long, deep or odd it is."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxdict = 6
_SHORT.maxlevel = 4


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` by way of a temporary file beside it.

    The file is complete and on disk, or not there, also after kill -9. Raises OSError, naming the file and its size,
    where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror} while writing {len(data):,} bytes", str(path)) from error
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name itself must survive a power cut
    finally:
        os.close(directory)


def identify_file(path: str | Path, places: int = 4096) -> str:
    """Size of a file and a hash of what stands at so many places of it, evenly spaced; of all, where it is smaller.

    Raises as `open_file`.
    """
    digest = hashlib.sha256()
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= places * _BLOCK:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for place in range(places):
                file.seek((size - _BLOCK) * place // max(1, places - 1))
                digest.update(file.read(_BLOCK))
    return f"{size:,} bytes, {digest.hexdigest()[:16]}"


class Content(NamedTuple):
    """The identity of a file's bytes, and what tells without reading all of them that they are still the same."""

    stamp: tuple[str, str]
    sha256: str


def file_stamp(path: Path) -> tuple[str, str]:
    """Absolute path, and what a part of the file says of the whole. Raises as `open_file`.

    No time: `cp -p` keeps it where the bytes are others, and the copies of two hosts have two.
    """
    return str(path.resolve()), identify_file(path, 16)


def fingerprint(path: Path) -> Content:
    """Read a file and hash it. Raises as `open_file`."""
    stamp = file_stamp(path)
    with open_file(path) as file:
        return Content(stamp, hashlib.file_digest(file, "sha256").hexdigest())
