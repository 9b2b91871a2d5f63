"""Writing files so that a reader sees the old one or the new one, and never half of either."""

import contextlib
import hashlib
import os
import uuid
from pathlib import Path
from typing import NamedTuple

TEMPORARY = ".tmp-"


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


class Content(NamedTuple):
    """The identity of a file's bytes, and what tells without reading that they are still the same."""

    stamp: tuple[str, int, int]
    sha256: str


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Absolute path, size in bytes, time of modification in ns."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def fingerprint(path: Path) -> Content:
    """Read a file and hash it."""
    stamp = file_stamp(path)
    with open(path, "rb") as file:
        return Content(stamp, hashlib.file_digest(file, "sha256").hexdigest())
