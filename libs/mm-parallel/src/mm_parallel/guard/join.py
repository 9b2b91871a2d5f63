"""How ranks come together: who does not come is named, and who cannot come says why.

    a roll call on the store ─► a watchdog ─► the process group

torch would wait for a rank that never comes as long as for a collective: hours.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from mm_parallel.device import init_distributed
from mm_parallel.guard.diagnosis import ranks_of
from mm_parallel.guard.heartbeat import Board, open_board
from mm_parallel.guard.watchdog import Watchdog
from mm_parallel.launch import read_launch

_BETWEEN = 0.1  # seconds between two looks at who has come
_ABSENT = 60  # seconds for which a rank that cannot come stays, if it hosts the store


@contextmanager
def join(
    *,
    deadline: float = 600,
    start: float = 300,
    interval: float = 2,
    silence: float = 30,
    timeout: timedelta = timedelta(hours=6),
) -> Iterator[Watchdog]:
    """Joins the process group that torchrun describes in the environment, under a watchdog from the first moment on.

        with join(deadline=600) as guard:
            guard.at("step 1")

    Without torchrun, alone, or where there is a process group already, it is a mere `Watchdog`.

    start: seconds in which all ranks must have come, and in which the process group must stand.
    timeout: of the group's collectives; the watchdog ends the process long before. Others: see `Watchdog`.

    Raises ConnectionError that names the ranks that did not come, or the reason that one of them gave; ValueError where
    the environment does not say where to meet, and as `init_distributed`.
    """
    times = {"deadline": deadline, "interval": interval, "silence": silence}
    ranks = None if dist.is_initialized() else read_launch().ranks
    if ranks is None:
        with Watchdog(**times) as guard:
            yield guard
        return
    store = connect(*ranks, start)
    if ranks[1] > 1:
        call_roll(store, *ranks, start, silence)
    guard = Watchdog(store, ranks, **times)
    guard.at("joining the process group", start)  # before its thread looks for the first time
    with guard:
        init_distributed(timeout, store)
        guard.at("the beginning")
        yield guard


def connect(rank: int, world: int, start: float) -> dist.Store:
    """The store at MASTER_ADDR, which torchrun or rank 0 hosts. Raises ConnectionError if it is not there in time."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = rank == 0 and not of_torchrun
    try:
        if not hosts:
            _wait_for_host(host, port, start)
        store = dist.TCPStore(
            host, port, None, hosts, timedelta(seconds=start), wait_for_workers=False, multi_tenant=not of_torchrun
        )
    except (OSError, RuntimeError) as error:  # torch's own errors are of both kinds
        why = str(error).splitlines()[0]
        who = "torchrun" if of_torchrun else "rank 0"
        raise ConnectionError(
            f"rank {rank} of {world} cannot {'host' if hosts else 'reach'} the store at {host}:{port} (MASTER_ADDR, "
            f"MASTER_PORT; {who} hosts it) within {start:g} s: {why}"
        ) from error
    return dist.PrefixStore(f"start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_host(host: str, port: int, patience: float) -> None:
    """Waits until somebody listens there. OSError if nobody does in time. (Torch fills the screen while it waits.)"""
    until = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, until - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(_BETWEEN)


def call_roll(store: dist.Store, rank: int, world: int, start: float, patience: float) -> None:
    """Waits until all ranks are there. Raises ConnectionError for those that are not, and for one that cannot come."""
    board = open_board(store, rank, world, "roll")
    try:
        board.come(socket.gethostname())
        began = time.monotonic()
        said = rank > 0
        while not board.all_came():
            if board.read_cause() is not None:
                break
            waited = time.monotonic() - began
            if waited > start:
                board.give_up(_missing(board, f"did not come within {start:g} s"))
            elif waited > 15 and not said:
                said = True
                print(_missing(board, f"not there yet, waiting up to {start:g} s"), file=sys.stderr, flush=True)
            time.sleep(_BETWEEN)
        if told := board.read_cause():
            board.leave(patience)
            raise ConnectionError(told["cause"])
    except dist.DistError as error:
        raise ConnectionError(f"the process that hosts the store is gone: {str(error).splitlines()[0]}") from error


def _missing(board: Board, what: str) -> str:
    missing = board.read_missing()
    there = sorted(set(range(board.world)) - set(missing))
    return f"{ranks_of(missing)} of {board.world} {what} ({ranks_of(there)} came)"


def tell_absence(reason: str, patience: float) -> str | None:
    """Tells the ranks that wait for this one in `join` that it will not come.

    Returns what rank 0 says within `patience` seconds: its host, the reason why it cannot come either, or nothing; None
    if the store cannot be reached in that time. Rank 0, which may host the store, stays until all have heard it, a
    minute at most.
    """
    try:
        ranks = read_launch().ranks
        if ranks is None or ranks[1] == 1:
            return None
        until = time.monotonic() + patience
        board = open_board(connect(*ranks, patience), *ranks, "roll")
        board.tell(f"rank {ranks[0]} failed before it joined the others: {reason}")
        board.come(reason)
        while (word := board.read_word(0)) is None and time.monotonic() < until:
            time.sleep(_BETWEEN)
        board.leave(_ABSENT)
    except (ValueError, ConnectionError, dist.DistError):
        return None
    return word or ""
