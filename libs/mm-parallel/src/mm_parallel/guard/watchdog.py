"""The thread that ends a process when another rank fails, and says why."""

import faulthandler
import math
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from mm_parallel.guard.diagnosis import comes_from_another, position, who_hangs
from mm_parallel.guard.heartbeat import Board, Neighbour, open_board

_STORE_GONE = "the process that hosts the store (rank 0, or torchrun on its host) is gone"


@dataclass(frozen=True)
class _Phase:
    number: int  # of phases that this rank has begun
    name: str
    deadline: float
    since: float
    done: bool = False


class Watchdog:
    """Around a training loop: if one rank fails, all end within seconds, with exit code 1, and say why.

    `mm_parallel.guard.join` enters one before there is a process group, so that it covers the start, too.

        with Watchdog(deadline=600) as watch:
            watch.at("loading", deadline=math.inf)
            for step in range(steps):
                watch.at(f"step {step}")

    What the others print, of a rank that

    - raises: `rank 3 failed: ValueError: …`;
    - is killed, or whose host is: `rank 3 is gone or stopped`, with the phase and the line in which it last was;
    - makes no progress: `rank 3 hangs`, with phase and line, or who has ended while others still wait for it;
    - hosts the store (rank 0, or torchrun): that it is gone.

    and where they were themselves, when one is killed or hangs with their Python stacks. A rank that raises ends as it
    would; but an error that looks like a lost connection has its cause elsewhere, so it is held back until that is
    known.

    deadline: seconds that a phase may take; `at` may give its own, longer one (inf: any). While one rank is in a longer
        phase, the others wait for it.
    interval: seconds between heartbeats, and in which a failure is noticed.
    silence: seconds without heartbeat after which a rank counts as gone: longer than any call that keeps Python's lock.
        It is also what a failed rank has left for ending by itself.
    store: of the ranks, if it is not torch's default one.
    ranks: (this rank, all of them), where there is no process group yet.

    Leaving the block waits for all ranks to leave it. Every rank enters as many of them, in the same order. Without a
    process group, or alone in one, it does nothing. The load on the store is five small messages per rank and interval.
    Raises ValueError for a deadline or a silence that is not longer than two intervals.
    """

    def __init__(
        self,
        store: dist.Store | None = None,
        ranks: tuple[int, int] | None = None,
        *,
        deadline: float = 600,
        interval: float = 2,
        silence: float = 30,
    ) -> None:
        if not deadline > 2 * interval or not silence > 2 * interval:
            raise ValueError(
                f"deadline={deadline} and silence={silence} seconds must be longer than two heartbeats of {interval} s"
            )
        self._given, self._ranks = store, ranks
        self._deadline, self._interval, self._silence = deadline, interval, silence
        self._phase = _Phase(0, "the beginning", deadline, time.monotonic())
        self._thread: threading.Thread | None = None
        self._wake, self._ended, self._ending = threading.Event(), threading.Event(), threading.Lock()
        self._failed = False
        self._error = ""  # of this rank, while its cause is looked for
        self._marked = False  # whether the store knows that we are in a long phase
        self._held = 0.0  # when we last saw another rank in a long phase
        self._suspicion: tuple[float, float, dict[int, dict[str, Any]]] | None = None  # when, how long, heartbeats then

    def at(self, phase: str, deadline: float | None = None) -> None:
        """This rank begins a phase. Costs nothing to speak of."""
        deadline = self._deadline if deadline is None else deadline
        changes = (deadline > self._deadline) != (self._phase.deadline > self._deadline)
        self._phase = _Phase(self._phase.number + 1, phase, deadline, time.monotonic())
        if changes:  # others must know at once whether they may wait for us
            self._wake.set()

    def __enter__(self) -> "Watchdog":
        if self._ranks is None and dist.is_initialized():
            self._ranks = dist.get_rank(), dist.get_world_size()
        if self._ranks is None or self._ranks[1] == 1:
            return self
        self._rank = self._ranks[0]
        self._main = threading.get_ident()
        store = self._given or dist.distributed_c10d._get_default_store()  # torch has no public name for it
        self._board = open_board(store, *self._ranks, "watchdog")
        self._neighbour = Neighbour(self._board, self._silence)
        self._phase = replace(self._phase, since=time.monotonic())
        self._board.beat(self._phase.number, self._phase.name, False, False)
        # a connection of its own: the main thread may be waiting on the other one
        self._thread = threading.Thread(target=self._watch, args=(self._board.clone(),), name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if self._thread is None:
            return
        try:
            if error is None or (isinstance(error, SystemExit) and not error.code):
                self._finish()
            else:
                self._fail(error)
        except dist.DistError:
            # a rank that failed ends by its own error, and one that is done by itself, whatever became of the store
            if not self._failed and not self._phase.done:
                self._end(None, _STORE_GONE, stacks=False)

    def _finish(self) -> None:
        assert self._thread is not None
        self._phase = _Phase(self._phase.number, "the end", math.inf, time.monotonic(), done=True)
        self._board.finish()
        self._ended.set()
        self._wake.set()
        self._thread.join()
        self._thread = None
        self._board.leave(self._silence)

    def _fail(self, error: BaseException) -> None:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt):
            self._failed = True
            self._board.tell(f"rank {self._rank} was interrupted", code=130)
            return self._board.leave(self._silence)
        if comes_from_another(error):
            self._error = said
            self.at(self._phase.name, math.inf)  # so that nobody takes us for one that hangs
            time.sleep(self._silence + 3 * self._interval)  # the thread ends the process as soon as the cause is known
        self._failed = True
        self._board.tell(f"rank {self._rank} failed: {said}")
        self._board.leave(self._silence)

    def _watch(self, board: Board) -> None:
        try:
            while not self._ended.is_set():
                # if even this thread is stuck (a lost host, Python's lock never given back), C ends the process
                faulthandler.dump_traceback_later(2 * self._silence + self._interval, exit=True, file=sys.__stderr__)
                if self._failed:
                    self._end_late()
                self._look(board)
                self._wake.wait(self._interval)
                self._wake.clear()
        except dist.DistError:
            if self._phase.done:  # the host waited for us a while, and has ended
                return
            if self._failed:  # the others heard of it, and are gone
                self._end_late()
            self._end(None, _STORE_GONE, stacks=False)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end_late(self) -> None:
        """Ends this rank, which failed, if it does not end by itself."""
        time.sleep(self._silence)
        self._end(None, f"rank {self._rank} failed, but has not ended", stacks=True)

    def _look(self, board: Board) -> None:
        if (told := board.read_cause()) is not None and not self._failed:
            self._end(board, **told)
        phase = self._phase
        long = phase.deadline > self._deadline and not phase.done
        if long != self._marked:
            board.mark_long(long)
            self._marked = long
        line, waits = position(sys._current_frames().get(self._main))
        board.beat(phase.number, f"{phase.name}, {line}", waits, phase.done)
        if gone := self._neighbour.listen(board):
            board.tell(gone, stacks=True)
        if self._suspicion is not None:
            self._name_who_hangs(board)
        elif not phase.done:
            self._check_progress(board, phase)

    def _check_progress(self, board: Board, phase: _Phase) -> None:
        now = time.monotonic()
        waited = now - max(phase.since, self._held)
        if waited <= phase.deadline:
            return
        if phase.deadline <= self._deadline and board.any_long():
            self._held = now  # another rank may take its time; ours starts again when it is done
        elif board.ask_to_report():  # one rank reads all the others' heartbeats, and once more a little later
            self._suspicion = now, waited, board.read_beats()

    def _name_who_hangs(self, board: Board) -> None:
        since, waited, earlier = self._suspicion
        late = 5 * self._interval
        if time.monotonic() - since > late:
            board.tell(who_hangs(earlier, board.read_beats(), board.world, waited, late), stacks=True)

    def _end(self, board: Board | None, cause: str, stacks: bool, code: int = 1) -> None:
        self._ending.acquire()  # never given back: one message, from whoever comes first
        got = f", where it got {self._error}" if self._error else ""
        sys.stderr.write(f"[rank {self._rank}] {cause}; this rank was in {self._phase.name}{got}\n")
        sys.stderr.flush()
        if stacks:
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        try:
            if board is not None:
                board.leave(self._silence)
        except dist.DistError:
            pass  # the message is out, and that is all we wanted
        sys.stdout.flush()
        os._exit(code)  # a collective in the main thread cannot be interrupted
