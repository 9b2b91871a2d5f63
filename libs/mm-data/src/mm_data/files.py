"""Writing files so that a reader sees the old one or the new one, and never half of either."""

import contextlib
import hashlib
import os
import stat
import uuid
from pathlib import Path
from typing import BinaryIO, NamedTuple

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


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. ValueError, naming it, unless it is a regular one that can be read.

    A FIFO or a device is refused at once: who opens or reads one may wait for ever.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # looked at before it is opened: opening a device may do something
            raise ValueError(f"{path} is {_kind(os.stat(path).st_mode)}, not a regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror}") from error
    file = os.fdopen(descriptor, "rb")
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):  # exchanged in between
        file.close()
        raise ValueError(f"{path} is {_kind(mode)}, not a regular file")
    return file


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


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
