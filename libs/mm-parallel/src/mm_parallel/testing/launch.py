"""Ranks as torchrun would start them, but that nobody ends when one of them fails."""

import inspect
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_parallel.testing.ranks import _find, preload


@dataclass
class End:
    """How a rank ended. code: None if it did not; said: what it wrote on stderr."""

    code: int | None
    said: str


def launch(world: int, fn: Callable[..., Any], *args: Any, within: float = 30) -> list[End]:
    """Calls `fn(rank, *args)` in `world` new processes, which are to join by themselves: how each ended, by rank.

    `fn` is a top-level function of an importable module or of a test file; arguments are pickled. Each rank computes on
    one thread. Nobody is ended when another fails. What still runs after `within` seconds is killed, and what is
    stopped when the others have ended.
    """
    context = multiprocessing.get_context("forkserver")
    function = (fn.__module__, inspect.getfile(fn), fn.__qualname__)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        preload(context, Path(folder))
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        ranks = []
        for rank in range(world):
            call = (folder, rank, world, port, function, pickle.dumps(args))
            ranks.append(context.Process(target=_run, args=call))
            ranks[-1].start()
        deadline = time.monotonic() + within
        try:
            while any(map(_runs, ranks)) and time.monotonic() < deadline:
                time.sleep(0.02)
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [End(code, Path(folder, str(rank)).read_text(encoding="utf-8")) for rank, code in enumerate(codes)]


def _runs(process: Any) -> bool:
    """Whether it neither has ended nor is stopped."""
    if process.exitcode is not None:
        return False
    try:
        return Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "T"
    except OSError:
        return True  # it has just ended, or this is no Linux


def _run(folder: str, rank: int, world: int, port: int, function: tuple, args: bytes) -> None:
    os.dup2(os.open(f"{folder}/{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    _find(*function)(rank, *pickle.loads(args))
