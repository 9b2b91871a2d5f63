"""One writer at a time: a lock on an output, which the kernel takes back when its process ends, however it ends."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def lock_output(output: str | Path, file: str | Path | None = None) -> Iterator[bool]:
    """Keep an output for this process alone while the block runs.

    Args:
        output: what is written, for the message; a folder that exists where `file` is not given.
        file: what is locked, in a folder that exists; `.lock` in the output if not given. It says who has the lock, and
            is gone afterwards. One that a killed process has left is taken over.

    Gives whether the lock is held. Where the file system has no locks (some network file systems), it is False, and one
    line on stderr says so: then nothing tells what a dead process has left from what a living one is writing.
    Raises ValueError, with process, host and time, when another process has the lock, on this host or, where the
    file system passes locks on (NFS, Lustre with `-o flock`), on another.
    """
    file = Path(file or Path(output) / ".lock")
    descriptor = _take(file, output)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            file.unlink(missing_ok=True)  # before the lock goes, or it could be the next one's
            os.close(descriptor)


def _take(file: Path, output: str | Path) -> int | None:
    """A descriptor that holds the lock; None where there are no locks."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(file, descriptor):
                who = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now().astimezone():%F %T %z}"
                try:
                    os.truncate(descriptor, 0)
                    os.write(descriptor, who.encode())
                except OSError as error:  # the disk is full
                    file.unlink(missing_ok=True)
                    raise OSError(error.errno, error.strerror, str(file)) from error
                return descriptor
            os.close(descriptor)  # who had it has removed it since we opened it
        except BlockingIOError:
            who = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ValueError(
                f"{output} is being written by {who}: wait until it has ended, or name another output"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            file.unlink(missing_ok=True)
            sys.stderr.write(
                f"note: {output} cannot be locked ({error.strerror}): see to it that nothing else writes there\n"
            )
            return None


def _is_there(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
