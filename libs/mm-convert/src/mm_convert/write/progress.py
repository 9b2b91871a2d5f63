"""A bar with bytes and rate on a terminal, one line at the end elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Call it with the bytes just written; use it as a context to finish the line."""

    def __init__(self, total: int, what: str, stream: TextIO | None = None) -> None:
        self.total, self.what, self.done = total, what, 0
        self.stream = stream or sys.stderr
        self.started = self.shown = time.monotonic()
        self.width = 0

    def __call__(self, nbytes: int) -> None:
        self.done += nbytes
        now = time.monotonic()
        if self.stream.isatty() and now - self.shown > 0.1:
            self.shown = now
            self._write("")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._write("\n")

    def _write(self, end: str) -> None:
        line = self._line()
        start = "\r" if self.stream.isatty() else ""
        self.stream.write(f"{start}{line:<{self.width}}{end}")  # over what is left of a longer one
        self.stream.flush()
        self.width = len(line) if start else 0

    def _line(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-6)
        rate = self.done / seconds
        share = self.done / self.total if self.total else 1.0
        filled = round(20 * share)
        left = f", {(self.total - self.done) / rate:.0f} s left" if 0 < self.done < self.total else ""
        bar = "█" * filled + "·" * (20 - filled)
        amount = f"{readable_bytes(self.done)} of {readable_bytes(self.total)}"
        return f"{self.what} {bar} {share:4.0%} {amount}, {readable_bytes(rate)}/s, {seconds:.1f} s{left}"


def readable_bytes(n: float) -> str:
    """1234567 -> 1.23 MB"""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if n >= 10**power:
            return f"{n / 10**power:.2f} {unit}"
    return f"{n:.0f} B"
