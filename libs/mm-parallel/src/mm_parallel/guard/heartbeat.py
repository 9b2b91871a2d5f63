"""What ranks tell each other while they work, through the store of the process group."""

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Board:
    """Where each rank writes what it does, and the first that finds a failure writes its cause.

    Every method may raise torch's DistError: then the process that hosts the store is gone.
    """

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store, self.rank, self.world = store, rank, world
        self._beats = 0

    def come(self, word: str) -> None:
        """This rank is there: with its host, or with the reason why it cannot stay."""
        self._store.set(f"here/{self.rank}", word)
        self._store.add("here", 1)

    def read_word(self, rank: int) -> str | None:
        """With what a rank came; None if it has not."""
        return self._store.get(f"here/{rank}").decode() if self._store.check([f"here/{rank}"]) else None

    def all_came(self) -> bool:
        return self._store.add("here", 0) >= self.world

    def read_missing(self) -> list[int]:
        """The ranks that have not come."""
        return [rank for rank in range(self.world) if self.read_word(rank) is None]

    def clone(self) -> "Board":
        """The same by a connection of its own, for another thread."""
        return Board(self._store.clone(), self.rank, self.world)

    def tell(self, cause: str, stacks: bool = False, code: int = 1) -> None:
        """All ranks are to end because of this; the first one counts. stacks: they print where they were. code: that
        they exit with.
        """
        self._store.compare_set("cause", "", json.dumps({"cause": cause, "stacks": stacks, "code": code}))

    def read_cause(self) -> dict[str, Any] | None:
        """What was told: the arguments of `tell`."""
        return json.loads(self._store.get("cause")) if self._store.check(["cause"]) else None

    def beat(self, number: int, at: str, waits: bool, done: bool) -> None:
        """This rank lives, has begun so many phases, is there, waits in a collective, is done."""
        self._beats += 1  # that it changes shows life; times of two hosts cannot be compared
        beat = {"beats": self._beats, "number": number, "at": at, "waits": waits, "done": done}
        self._store.set(f"beat/{self.rank}", json.dumps(beat))

    def read_beat(self, rank: int) -> dict[str, Any] | None:
        """The last of a rank; None if it has not begun."""
        key = f"beat/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def read_beats(self) -> dict[int, dict[str, Any]]:
        """The last of every rank that has begun."""
        beats = {rank: self.read_beat(rank) for rank in range(self.world)}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def mark_long(self, long: bool) -> None:
        """This rank begins, or ends, a phase in which the others wait for it."""
        self._store.add("long", 1 if long else -1)

    def any_long(self) -> bool:
        return self._store.add("long", 0) > 0

    def ask_to_report(self) -> bool:
        """Whether this rank is the one that may say who hangs."""
        return self._store.add("reports", 1) == 1

    def finish(self) -> None:
        """Waits until every rank is done. If one never is, the watchdog ends the process."""
        if self._store.add("done", 1) == self.world:
            self._store.set("all done", "")
        self._store.wait(["all done"], timedelta(days=365))

    def give_up(self, cause: str) -> None:
        """All ranks are to end because some have not come."""
        self._store.set("given up", "")
        self.tell(cause)

    def leave(self, patience: float) -> None:
        """The last word of a rank. Rank 0, which may host the store, waits some seconds for all others to have left."""
        self._store.add("left", 1)
        if self.rank != 0:
            return  # from now on the host may be gone: a question would be answered by a page of warnings of torch's
        until = time.monotonic() + patience
        expected = self._store.add("here", 0) if self._store.check(["given up"]) else self.world
        while self._store.add("left", 0) < expected and time.monotonic() < until:
            time.sleep(0.02)


def open_board(store: dist.Store, rank: int, world: int, name: str) -> Board:
    """A board of their own for ranks that come to this place for the nth time."""
    turn = store.add(f"{name}/{rank}", 1)
    return Board(dist.PrefixStore(f"{name}/{turn}", store), rank, world)


class Neighbour:
    """The rank that this one listens to: every rank is heard by one. When it is done, the one after it."""

    def __init__(self, board: Board, silence: float) -> None:
        self._rank, self._world, self._silence = board.rank, board.world, silence
        self._next = (self._rank + 1) % self._world
        self._beat: dict[str, Any] | None = None
        self._heard_at = time.monotonic()

    def listen(self, board: Board) -> str:
        """What is wrong with it, if anything."""
        if self._next == self._rank:
            return ""  # all others are done
        beat, now = board.read_beat(self._next), time.monotonic()
        if beat is None:
            return ""  # it has not begun
        if beat != self._beat:
            self._beat, self._heard_at = beat, now
        if beat["done"]:
            self._next = (self._next + 1) % self._world
            self._heard_at = now
        elif now - self._heard_at > self._silence:
            gone = f"rank {self._next} is gone or stopped: no heartbeat for {self._silence:g} s"
            return f"{gone}; it was last heard in {beat['at']}"
        return ""
