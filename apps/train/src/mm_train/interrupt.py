"""Ctrl-C, SIGTERM, a closed terminal: the first ends a run cleanly after its step, the second acts at once."""

from __future__ import annotations

import signal


def ending_signals() -> list[signal.Signals]:
    """What asks a program to end. Under nohup a closed terminal does not."""
    asked = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    return [s for s in asked if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


class Interrupt:
    """Notes the first signal while it is entered; `stop` is set when any rank has got one, see `hear`."""

    def __init__(self) -> None:
        self.signal, self.stop = 0, False

    def __enter__(self) -> Interrupt:
        self.before = {s: signal.signal(s, self._on) for s in ending_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on(self, number: int, _frame: object) -> None:
        self.signal = number
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def hear(self, signals: float) -> None:
        """What all ranks together have got: if any was interrupted, all stop after the same step."""
        self.stop = self.stop or signals > 0
