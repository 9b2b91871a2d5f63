"""Files that take their places together: a process may be killed at any moment, and the next one finishes or forgets.

    .NAME.partial-XXXX/new/…         what is being written
    .NAME.partial-XXXX/moving.json   all of it is written: these take their places, in this order
    .NAME.partial-XXXX/old/…         what stood in a place, where two names cannot be exchanged

Without `moving.json` nothing has happened yet, and the folder is thrown away. With it, what has not moved yet can be
moved by anybody, as often as necessary. Callers hold the lock of the output (`lock`), so that no living process is
disturbed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mm_convert.files import read_json

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_MOVING = "moving.json"


@contextmanager
def write_hidden(into: Path, name: str, moves: Sequence[str], stale: str = "") -> Iterator[Path]:
    """A hidden folder in `into` to write `moves` into, which then take their places in `into`, in this order.

    A file replaces what is there; a folder is exchanged for what is there, in one step where the system can. `stale` is
    the name of a file that must not be seen beside a new one: it goes before anything moves.
    """
    hidden = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=into))
    try:
        (hidden / "new").mkdir()
        yield hidden / "new"
        replace_file(hidden / _MOVING, json.dumps({"moves": list(moves)}))
        if stale:
            (into / stale).unlink(missing_ok=True)
        for move in moves:
            _move(hidden, into / move)
    finally:
        _finish(hidden, into)  # also when interrupted: what stood in a place may be in there


def recover(into: Path, name: str) -> set[str]:
    """Finish what killed processes had begun to move, and throw away what else they left; the names that moved."""
    left = [path for path in into.iterdir() if path.name.startswith(_prefix(name))]
    finished = [_finish(hidden, into) for hidden in left if hidden.is_dir() and not hidden.is_symlink()]
    return {move for moves in finished for move in moves}


def replace_file(path: Path, text: str) -> None:
    """Write a small file in UTF-8: after a kill or a power cut it has the old text or the new one."""
    part = path.with_name(f".{path.name}.partial")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _prefix(name: str) -> str:
    return f".{name}.partial-"


def _move(hidden: Path, place: Path) -> None:
    new = hidden / "new" / place.name
    if _is_full(place):
        if exchange(new, place):
            return
        (hidden / "old").mkdir()
        place.rename(hidden / "old" / place.name)
    new.replace(place)  # onto nothing, a file, or an empty folder


def _finish(hidden: Path, into: Path) -> list[str]:
    """Move what has not moved yet, if anything was to move, and remove the folder."""
    journal = hidden / _MOVING
    said = read_json(journal).get("moves", []) if journal.is_file() else []
    # A folder that was handed on may hold anything.
    moves = [move for move in said if isinstance(move, str) and Path(move).name == move]
    for move in moves:
        new, place = hidden / "new" / move, into / move
        # A full folder in the place is the new one already, or the old one, whole: either may stay.
        if new.exists() and not _is_full(place):
            new.replace(place)
    journal.unlink(missing_ok=True)  # first, or what is half removed could be moved
    shutil.rmtree(hidden, ignore_errors=True)
    return moves


def _is_full(place: Path) -> bool:
    return place.is_dir() and any(place.iterdir())


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step (`renameat2`, Linux); False where the kernel or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    sys.audit("os.rename", a, b, -1, -1)  # as `os.rename` does: whoever watches changes of files sees this one
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))
