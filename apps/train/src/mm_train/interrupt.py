"""Ctrl-C and SIGTERM: the first ends a run cleanly after its step, the second acts at once."""

from __future__ import annotations

import signal


class Interrupt:
    """Notes the first signal while it is entered; `stop` is set when any rank has got one, see `hear`."""

    def __init__(self) -> None:
        self.signal, self.stop = 0, False

    def __enter__(self) -> Interrupt:
        self.before = {s: signal.signal(s, self._on) for s in (signal.SIGINT, signal.SIGTERM)}
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
