"""How a command of this package ends: exit codes, and one line instead of a traceback for what is not a bug."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mm_convert.cli.terminal import escaped_output, one_line


def run(work: Callable[[], object]) -> None:
    """Exit code 0: done; 2: it was asked for what cannot be; 1: it failed on the way; 130: it was interrupted."""
    with escaped_output():
        try:
            work()
        except ValueError as error:
            _leave(f"error: {error}", 2)
        except (OSError, FloatingPointError) as error:
            _leave(f"error: {error}", 1)
        except KeyboardInterrupt as stop:
            _leave("" if os.environ.get("RANK", "0") != "0" else str(stop) or "stopped", 130)  # all ranks stop alike


def prepare_output(path: Path) -> None:
    """Make the directory and try to write there: better an error now than after hours."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written: {error.strerror}") from error


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


def _leave(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    if message:
        sys.stderr.write(f"{f'[rank {rank}] ' if rank != '0' else ''}{one_line(message)}\n")
    sys.exit(code)
