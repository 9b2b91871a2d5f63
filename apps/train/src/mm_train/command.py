"""How a command of this package ends: exit codes, and one line instead of a traceback for what is not a bug."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

from mm_convert import lock_output
from mm_convert.cli.terminal import explain, one_line
from mm_parallel.absence import absence_told

T = TypeVar("T")


def run(read: Callable[[], T], work: Callable[[T], object]) -> None:
    """A program of one rank or several: `read` says what is asked for, without torch, and `work` does it.

    Where one rank cannot read it, the others end, too. Exit code 0: done; 2: it was asked for what cannot be; 1: it
    failed on the way; 130: it was interrupted.
    """

    def refuse() -> T:
        try:
            return read()
        except OSError as error:  # e.g. of a name that is too long: nothing has begun
            raise ValueError(explain(error)) from error

    with absence_told():
        asked = run_alone(refuse)
    run_alone(lambda: work(asked))


def run_alone(work: Callable[[], T]) -> T:
    """The same for a program of one process."""
    try:
        return work()
    except ValueError as error:
        _leave(f"error: {error}", 2)
    except (OSError, FloatingPointError) as error:
        _leave(f"error: {explain(error)}", 1)
    except KeyboardInterrupt as stop:
        _leave("" if os.environ.get("RANK", "0") != "0" else str(stop) or "stopped", 130)  # all ranks stop alike


def prepare_output(path: Path) -> None:
    """Make the directory and try to write there: better an error now than after hours."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, prefix=".tmp-"):
            pass
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written: {error.strerror}") from error


@contextmanager
def claim_output(path: Path) -> Iterator[None]:
    """Keep the directory for this run while the block runs, and remove what killed runs have left in it.

    Raises ValueError on every rank when another run has it (see `mm_convert.lock_output`), or when the ranks see
    different directories. Where the block raises it, a directory that was made for it, and is still empty, goes again.
    """
    from mm_train.ranks import broadcast

    new = [folder for folder in (path, *path.absolute().parents) if not folder.exists()]
    try:
        prepare_output(path)
        with ExitStack() as held:

            def claim() -> None:
                held.enter_context(lock_output(path))
                _sweep(path)

            broadcast(claim)
            check_shared(path)
            yield
    except ValueError:  # refused before anything was written
        _remove_empty(new)
        raise


def _remove_empty(folders: Sequence[Path]) -> None:
    """Of these, from the inside out, those that nothing lies in."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _sweep(path: Path) -> None:
    """Remove what a killed run was writing."""
    for leftover in [*path.glob(".shared-*"), *path.glob(".tmp-*"), *path.glob("samples/*/.tmp-*")]:
        leftover.unlink(missing_ok=True)
    for unfinished in path.glob("checkpoints/.step-*"):
        shutil.rmtree(unfinished)


def check_shared(path: Path) -> None:
    """Raise ValueError unless all ranks see the same directory: checkpoints are written by all into one."""
    from mm_train.ranks import all_gather, broadcast

    token = broadcast(lambda: tempfile.mkstemp(prefix=".shared-", dir=path)[1])
    blind = all_gather([] if Path(token).exists() else [os.environ.get("RANK", "0")])
    broadcast(lambda: os.remove(token))
    if blind:
        raise ValueError(
            f"--output {path} is not the same directory on ranks {', '.join(blind)}: use a shared file system"
        )


def _leave(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    if message:
        sys.stderr.write(f"{f'[rank {rank}] ' if rank != '0' else ''}{one_line(message)}\n")
    sys.exit(code)
