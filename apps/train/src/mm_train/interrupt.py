"""Ctrl-C, SIGTERM, a closed terminal: the first ends a run cleanly after its step, the second acts at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time

SAME = 5.0
"""Seconds in which further signals are the first one again: a terminal or a batch system sends it to every process, and
torchrun, which got it too, sends it to its ranks once more."""


def ending_signals() -> list[signal.Signals]:
    """What asks a program to end. Under nohup a closed terminal does not."""
    asked = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    return [s for s in asked if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


class Interrupt:
    """Notes the first signal while it is entered; `stop` is set when any rank has got one, see `hear`."""

    def __init__(self) -> None:
        self.signal, self.stop = 0, False
        self.since = 0.0

    def __enter__(self) -> Interrupt:
        self.before = {s: signal.signal(s, self._on) for s in ending_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on(self, number: int, _frame: object) -> None:
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            self._tell()
        elif time.monotonic() - self.since > SAME:
            self.__exit__()
            signal.raise_signal(number)

    def _tell(self) -> None:
        """Rank 0 says that it has heard; by a bare write, as a print may be under way."""
        if os.environ.get("RANK", "0") == "0":
            limit = ""
            if "TORCHELASTIC_RUN_ID" in os.environ:
                seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
                limit = f"; torchrun kills it after {seconds} s, if --shutdown_timeout says nothing else"
            with contextlib.suppress(OSError):  # nobody may be reading
                os.write(2, f"\nstopping after this step{limit}; again after {SAME:.0f} s: at once\n".encode())

    def hear(self, signals: float) -> None:
        """What all ranks together have got: if any was interrupted, all stop after the same step."""
        self.stop = self.stop or signals > 0
