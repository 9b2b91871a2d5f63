"""Errors instead of hangs: ranks that were told different things say so, and no rank waits for one that is gone.

`agree` compares before the work starts. `Watchdog` stands beside it: a collective cannot be interrupted, so a thread
ends its process, with a message, as soon as the store of the process group tells that another rank failed.
"""

import faulthandler
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mm_parallel.diagnosis import comes_from_another, position, ranks_of, who_hangs


def agree(what: Mapping[str, object] | str, label: str, group: dist.ProcessGroup | None = None) -> None:
    """Raises ValueError on every rank of `group` (None: all) unless `what` is the same on all of them.

    what: values by name, or a text. They are compared by their `repr`, which must not depend on the process (no sets,
        no addresses). The message names the first keys that differ, the ranks, and the values.

    All ranks call it. Costs one small collective; nothing is sent but a hash as long as all agree.
    """
    if not dist.is_initialized():
        return
    lines = dict(enumerate(what.splitlines(), 1)) if isinstance(what, str) else what
    mine = {f"line {key}" if isinstance(what, str) else key: repr(value) for key, value in lines.items()}
    if len(set(_gather(hashlib.sha256(json.dumps(mine).encode()).hexdigest(), group))) == 1:
        return
    all_of_them = _gather(mine, group)
    numbers = dist.get_process_group_ranks(group) if group is not None else range(dist.get_world_size())
    different = []
    for key in dict.fromkeys(key for one in all_of_them for key in one):
        holders: dict[str, list[int]] = {}
        for number, one in zip(numbers, all_of_them, strict=True):
            holders.setdefault(one.get(key, "missing"), []).append(number)
        if len(holders) > 1:
            values = ", ".join(f"{_shorten(value)} on {ranks_of(who)}" for value, who in holders.items())
            different.append(f"{key} is {values}")
    more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
    raise ValueError(f"{label} differs between ranks: {'; '.join(different[:5]) or 'in its order'}{more}")


def _gather(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group)
    return everyone


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


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
    store: of the process group, if it is not torch's default one.

    Leaving the block waits for all ranks to leave it. Every rank enters as many of them, in the same order. Without a
    process group, or alone in one, it does nothing. The load on the store is five small messages per rank and interval.
    Raises ValueError for a deadline or a silence that is not longer than two intervals.
    """

    def __init__(
        self,
        store: dist.Store | None = None,
        *,
        deadline: float = 600,
        interval: float = 2,
        silence: float = 30,
    ) -> None:
        if not deadline > 2 * interval or not silence > 2 * interval:
            raise ValueError(
                f"deadline={deadline} and silence={silence} seconds must be longer than two heartbeats of {interval} s"
            )
        self._given, self._deadline, self._interval, self._silence = store, deadline, interval, silence
        self._phase = _Phase(0, "the beginning", deadline, time.monotonic())
        self._thread: threading.Thread | None = None
        self._wake, self._ended, self._ending = threading.Event(), threading.Event(), threading.Lock()
        self._failed = False
        self._error = ""  # of this rank, while its cause is looked for
        self._marked = False  # whether the store knows that we are in a long phase
        self._held = 0.0  # when we last saw another rank in a long phase

    def at(self, phase: str, deadline: float | None = None) -> None:
        """This rank begins a phase. Costs nothing to speak of."""
        deadline = self._deadline if deadline is None else deadline
        changes = (deadline > self._deadline) != (self._phase.deadline > self._deadline)
        self._phase = _Phase(self._phase.number + 1, phase, deadline, time.monotonic())
        if changes:  # others must know at once whether they may wait for us
            self._wake.set()

    def __enter__(self) -> "Watchdog":
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._main = threading.get_ident()
        store = self._given or dist.distributed_c10d._get_default_store()  # torch has no public name for it
        turn = store.add(f"watchdog/{self._rank}", 1)
        self._store = dist.PrefixStore(f"watchdog/{turn}", store)
        self._next = (self._rank + 1) % self._world  # whom we listen to: all are heard, by one each
        self._heard, self._heard_at = b"", time.monotonic()
        self._phase = _Phase(0, self._phase.name, self._deadline, time.monotonic())
        # a connection of its own: the main thread may be waiting on the other one
        self._thread = threading.Thread(target=self._watch, args=(self._store.clone(),), name="watchdog", daemon=True)
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
            self._end(None, _STORE_GONE, stacks=False)

    def _finish(self) -> None:
        assert self._thread is not None
        self._phase = _Phase(self._phase.number, "the end", math.inf, time.monotonic(), done=True)
        if self._store.add("done", 1) == self._world:
            self._store.set("all done", "")
        self._store.wait(["all done"], timedelta(days=365))  # if they never come, the thread ends the process
        self._ended.set()
        self._wake.set()
        self._thread.join()
        self._thread = None
        self._leave(self._store)

    def _fail(self, error: BaseException) -> None:
        said = f"{type(error).__name__}: {error}"
        if comes_from_another(error):
            self._error = said
            self.at(self._phase.name, math.inf)  # so that nobody takes us for one that hangs
            time.sleep(self._silence + 3 * self._interval)  # the thread ends the process as soon as the cause is known
        self._failed = True
        self._tell(self._store, f"rank {self._rank} failed: {said}", stacks=False)
        self._leave(self._store)

    def _watch(self, store: dist.Store) -> None:
        try:
            while not self._ended.is_set():
                # if even this thread is stuck (a lost host, Python's lock never given back), C ends the process
                faulthandler.dump_traceback_later(2 * self._silence + self._interval, exit=True, file=sys.__stderr__)
                if self._failed:
                    time.sleep(self._silence)
                    self._end(None, f"rank {self._rank} failed, but has not ended", stacks=True)
                self._look(store)
                self._wake.wait(self._interval)
                self._wake.clear()
        except dist.DistError:
            if self._failed:  # then others are gone, too, and the process is about to end
                time.sleep(self._silence)
            self._end(None, _STORE_GONE, stacks=False)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _look(self, store: dist.Store) -> None:
        if store.check(["cause"]) and not self._failed:
            self._end(store, **json.loads(store.get("cause")))
        phase = self._phase
        long = phase.deadline > self._deadline and not phase.done
        if long != self._marked:
            store.add("long", 1 if long else -1)
            self._marked = long
        line, waits = position(sys._current_frames().get(self._main))
        beat = {"time": time.time(), "number": phase.number, "at": f"{phase.name}, {line}", "waits": waits}
        store.set(f"beat/{self._rank}", json.dumps(beat | {"done": phase.done}))
        self._listen(store)
        if not phase.done:
            self._check_progress(store, phase)

    def _listen(self, store: dist.Store) -> None:
        key, now = f"beat/{self._next}", time.monotonic()
        if self._next == self._rank or not store.check([key]):
            return  # all others are done, or it has not begun
        heard = store.get(key)
        if heard != self._heard:
            self._heard, self._heard_at = heard, now
        beat = json.loads(heard)
        if beat["done"]:
            self._next = (self._next + 1) % self._world
            self._heard_at = now
        elif now - self._heard_at > self._silence:
            gone = f"rank {self._next} is gone or stopped: no heartbeat for {self._silence:g} s"
            self._tell(store, f"{gone}; it was last heard in {beat['at']}", stacks=True)

    def _check_progress(self, store: dist.Store, phase: _Phase) -> None:
        now = time.monotonic()
        waited = now - max(phase.since, self._held)
        if waited <= phase.deadline:
            return
        if phase.deadline <= self._deadline and store.add("long", 0) > 0:
            self._held = now  # another rank may take its time; ours starts again when it is done
        elif store.add("reports", 1) == 1:  # one rank reads all the others' heartbeats, once
            keys = {rank: f"beat/{rank}" for rank in range(self._world)}
            beats = {rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}
            self._tell(store, who_hangs(beats, self._world, waited, 5 * self._interval), stacks=True)

    def _tell(self, store: dist.Store, cause: str, stacks: bool) -> None:
        store.compare_set("cause", "", json.dumps({"cause": cause, "stacks": stacks}))  # the first one counts

    def _leave(self, store: dist.Store) -> None:
        """Rank 0, which may host the store, goes last."""
        store.add("left", 1)
        until = time.monotonic() + self._silence
        while self._rank == 0 and store.add("left", 0) < self._world and time.monotonic() < until:
            time.sleep(0.02)

    def _end(self, store: dist.Store | None, cause: str, stacks: bool) -> None:
        self._ending.acquire()  # never given back: one message, from whoever comes first
        got = f", where it got {self._error}" if self._error else ""
        err = sys.__stderr__ or sys.stderr
        err.write(f"[rank {self._rank}] {cause}; this rank was in {self._phase.name}{got}\n")
        err.flush()
        if stacks:
            faulthandler.dump_traceback(err)
        try:
            if store is not None:
                self._leave(store)
        except dist.DistError:
            pass  # the message is out, and that is all we wanted
        sys.stdout.flush()
        os._exit(1)  # a collective in the main thread cannot be interrupted
