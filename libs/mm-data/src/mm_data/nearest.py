"""What a path that is not there may have meant: asked for a hundred thousand files of one folder, in seconds."""

import os
from bisect import bisect_left
from itertools import takewhile
from pathlib import Path
from threading import Lock

AROUND = 2  # names to look at on each side of where one would stand
ALIKE = 0.6  # of the longer name, its beginning and its end together


class Neighbours:
    """Folders, each listed once, whenever its first path is asked for. Several threads may ask."""

    def __init__(self) -> None:
        self._listed: dict[Path, _Names] = {}
        self._lock = Lock()

    def describe(self, path: Path) -> str:
        """`, did you mean …?` with what is most like a path that is not there; empty where nothing is like it.

        What is not there may be the file, or a folder above it.
        """
        folder, rest = path.parent, [path.name]
        while not os.path.isdir(folder):
            if folder == folder.parent:
                return ""
            folder, rest = folder.parent, [folder.name, *rest]
        with self._lock:
            if folder not in self._listed:
                self._listed[folder] = _Names(folder)
        near = self._listed[folder].nearest(rest[0])
        if near is None:
            return ""
        return f", did you mean {near}?" if len(rest) == 1 else f", did you mean {near} in {folder}?"


class _Names:
    """The names in a folder, forwards and backwards in order: those most like another stand beside it in one of them.

    Capital and small letters count as the same.
    """

    def __init__(self, folder: Path):
        try:
            names = [name for name in os.listdir(folder) if name.isprintable()]
        except OSError:  # it is about a hint
            names = []
        self.forwards = sorted((name.casefold(), name) for name in names)
        self.backwards = sorted((name.casefold()[::-1], name) for name in names)

    def nearest(self, name: str) -> str | None:
        plain = name.casefold()
        found = [*_around(self.forwards, plain), *_around(self.backwards, plain[::-1])]
        near = max(found, key=lambda one: _likeness(plain, one.casefold()), default=None)
        if near is None or near == name:  # a link that leads nowhere is its own neighbour
            return None
        alike, begin = _likeness(plain, near.casefold())
        # Releases of one data set name a clip alike up to a `_`, and differ in what they say of it after that.
        return near if alike >= ALIKE or "_" in plain[:begin] else None


def _around(ordered: list[tuple[str, str]], name: str) -> list[str]:
    place = bisect_left(ordered, (name,))
    return [one for _, one in ordered[max(0, place - AROUND) : place + AROUND]]


def _likeness(one: str, other: str) -> tuple[float, int]:
    """The part of the longer name that both begin and end with, 0 to 1, and the length of that beginning."""
    begin = _shared(one, other)
    end = _shared(one[begin:][::-1], other[begin:][::-1])
    return (begin + end) / max(len(one), len(other), 1), begin


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
