"""The numbers of one metrics.jsonl, read as it grows, and as few of them as a screen can show."""

from __future__ import annotations

import json
import math
import time
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BLOCK = 2**20
"""Bytes that are read at a time."""


class Curve(NamedTuple):
    """A metric over the steps."""

    steps: list[int]
    values: list[float | None]
    """None where it was not finite."""
    smooth: list[float | None]
    """The same steps; empty without smoothing."""


class Curves:
    """All metrics of a run, each with the steps at which it was measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.metrics: dict[str, tuple[array, array]] = {}
        """By name, steps and values; NaN where a value was not finite."""
        self.lines = self.last = 0
        self.total = self._at = 0
        self._file: tuple[int, int] | None = None
        self._head = b""
        self.broken = ""
        """What is wrong with the first line that cannot be read."""
        self.unread = 0
        """Lines that cannot be read."""

    @property
    def share(self) -> float:
        """How much of the file is read."""
        return self._at / self.total if self.total else 1.0

    def read(self, until: float = math.inf) -> None:
        """What was added since the last time; all, where the file is another one. A last line without end is left.

        until: of `time.monotonic`; the rest is for the next time. OSError for a file that cannot be read.
        """
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._forget()
            return
        with open(self.path, "rb") as file:
            # A run that goes on writes the file anew, without the steps that it repeats.
            if self._file != (status.st_dev, status.st_ino) or status.st_size < self._at or self._changed(file):
                self._forget()
                self._file, self._head = (status.st_dev, status.st_ino), file.read(256)
            if len(self._head) < 256:
                file.seek(0)
                self._head = file.read(256)
            self.total = status.st_size
            file.seek(self._at)
            while block := file.read(BLOCK):
                end = block.rfind(b"\n") + 1
                if not end:
                    if len(block) < BLOCK:
                        break
                    end = len(block)  # of no line of ours
                for line in block[:end].splitlines():
                    self._add(line)
                self._at += end
                file.seek(self._at)
                if time.monotonic() > until:
                    break

    def _changed(self, file: Any) -> bool:
        file.seek(0)
        return file.read(len(self._head)) != self._head

    def _add(self, line: bytes) -> None:
        self.lines += 1
        try:
            row = json.loads(line)
            step = row["step"]
            if type(step) is not int:
                raise ValueError(f"step {step!r:.40} is no whole number")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.unread += 1
            self.broken = self.broken or f"line {self.lines}: {type(error).__name__}: {str(error)[:120]}"
            return
        self.last = max(self.last, step)
        for name, value in row.items():
            if name != "step" and (value is None or type(value) in (int, float)):
                steps, values = self.metrics.setdefault(name, (array("q"), array("d")))
                steps.append(step)
                values.append(math.nan if value is None else value)

    def curve(self, name: str, points: int, smooth: float = 0.0, first: int = 0, last: int | None = None) -> Curve:
        """At most about `points` of the metric from step `first` to `last`: of many, the least and the largest of each
        part, so that no peak is lost.

        smooth: share of what was before in a moving mean, in [0, 1), over all steps from the first.
        """
        if name not in self.metrics:
            return Curve([], [], [])
        steps, values = (np.array(column) for column in self.metrics[name])
        mean = _smooth(values, smooth) if smooth else None
        inside = (steps >= first) & (steps <= (last if last is not None else math.inf))
        chosen = np.flatnonzero(inside)
        if len(chosen) > points:
            chosen = _extremes(values, chosen, max(1, points // 2))
        return Curve(steps[chosen].tolist(), _plain(values[chosen]), [] if mean is None else _plain(mean[chosen]))


def _smooth(values: np.ndarray, share: float) -> np.ndarray:
    """A moving mean, without the pull of its beginning; values that are not finite are passed over."""
    mean, weight, found = 0.0, 0.0, []
    for value in values.tolist():
        if value == value:
            mean = share * mean + (1 - share) * value
            weight = share * weight + (1 - share)
        found.append(mean / weight if weight else math.nan)
    return np.array(found)


def _extremes(values: np.ndarray, chosen: np.ndarray, parts: int) -> np.ndarray:
    """Of each part of the places, those of its least and its largest value, in order."""
    size = -(-len(chosen) // parts)
    places = np.pad(chosen, (0, -len(chosen) % size), mode="edge").reshape(-1, size)
    those = values[places]
    least = np.where(np.isnan(those), np.inf, those).argmin(1)
    largest = np.where(np.isnan(those), -np.inf, those).argmax(1)
    rows = np.arange(len(places))
    return np.unique(np.concatenate([places[rows, least], places[rows, largest]]))


def _plain(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
