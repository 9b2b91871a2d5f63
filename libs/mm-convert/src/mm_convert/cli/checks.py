"""Named checks of a command: a program raises what the first one finds, or all are run and told as a table.

✓ weights   1,095 tensors in 6 files, 26.6 GiB
✗ data      --data.features fetures is not a directory, did you mean features? …
- samples   not here: no --sample.prompts
"""

from __future__ import annotations

import io
import shutil
import socket
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from typing import Any, Generic, Literal, NamedTuple, TextIO, TypeVar

from mm_convert.cli.terminal import explain, one_line

T = TypeVar("T")

When = Literal["at once", "with torch", "when asked"]
State = Literal["holds", "fails", "not here"]
_MARKS: dict[State, str] = {"holds": "✓", "fails": "✗", "not here": "-"}
_PLAIN: dict[State, str] = {"holds": "ok", "fails": "NO", "not here": "--"}
_COLOURS: dict[State, int] = {"holds": 32, "fails": 31, "not here": 2}  # green, red, dim


class NotHere(str):
    """What a check says that had nothing to look at: why."""

    __slots__ = ()


class Check(NamedTuple, Generic[T]):
    """One thing that must hold."""

    name: str
    when: When
    """at once: looks at flags, paths and small files. with torch: also opens data and headers; takes seconds. when
    asked: reads more than a program must before it begins; all of them together still take well below a minute.
    """
    run: Callable[[T], str | None]
    """(what is asked for) -> what was found, in a few words; lines behind the first are notes. `NotHere` where there is
    nothing to look at. Raises ValueError with the numbers, the reason and the way out.
    """
    after: tuple[str, ...] = ()
    """Checks without which this one cannot look: where one of them fails, it is left out."""


class Finding(NamedTuple):
    """What a check found."""

    name: str
    state: State
    text: str = ""
    notes: tuple[str, ...] = ()
    """What a person should know of it, though it holds."""


def find(checks: Iterable[Check[T]], subject: T) -> Iterator[Finding]:
    """Run all of them, also behind one that fails. Warnings, and what is said on stderr meanwhile, become notes."""
    failed: set[str] = set()
    known: set[str] = set()  # notes, of which each is told once
    for check in checks:
        if before := [name for name in check.after if name in failed]:
            failed.add(check.name)
            yield Finding(check.name, "not here", f"{before[0]} must hold first")
            continue
        said: Any = ""
        heard = io.StringIO()
        with warnings.catch_warnings(record=True) as warned, redirect_stderr(heard):
            warnings.simplefilter("always", UserWarning)
            try:
                said, state = check.run(subject) or "", "holds"
            except (ValueError, OSError) as error:
                said, state = explain(error).replace("\n", " "), "fails"
                failed.add(check.name)
        text, *more = said.split("\n")
        told = [str(one.message) for one in warned if issubclass(one.category, UserWarning)]
        notes = dict.fromkeys(note for note in [*more, *told, *heard.getvalue().splitlines()] if note not in known)
        known |= notes.keys()
        state = "not here" if isinstance(said, NotHere) else state
        yield Finding(check.name, state, text, tuple(note for note in notes if note))


class Together(NamedTuple):
    """The ranks of one program, of which each looks at all."""

    rank: int
    gather: Callable[[Any], Sequence[Any]]
    """What one of them has -> what all have, in order."""
    name: Callable[[list[int]], str]
    """Numbers of ranks -> what they are called."""
    compare: Callable[[], str]
    """Raises ValueError where they see other things; called by all."""


RANKS = "ranks"
"""What is found by `Together.compare`."""


def report(checks: Sequence[Check[T]], subject: T, stream: TextIO, together: Together | None = None) -> int:
    """Tell what all of the checks find, and whether all ranks see the same. Returns the exit code: 2 where one fails.

    together: where there are several ranks; then all of them call it, and the first one tells.
    """
    table = _Table(stream, [*(check.name for check in checks), RANKS])
    if together is None:
        for finding in find(checks, subject):
            table.add(finding)
        table.add(Finding(RANKS, "not here", "one process; under torchrun all compare what they see"))
        return table.end()
    own = list(find(checks, subject))
    found = _merge(together.gather((socket.gethostname(), own)), together.name)
    found += find([Check(RANKS, "when asked", lambda _: together.compare())], subject)
    if together.rank:
        return 2 if any(finding.state == "fails" for finding in found) else 0
    for finding in found:
        table.add(finding)
    return table.end()


def _merge(everyone: Sequence[tuple[str, Sequence[Finding]]], name: Callable[[list[int]], str]) -> list[Finding]:
    """What the ranks of one program found, each check once: as the first one says, or those that fail, with their
    ranks and hosts.

    everyone: by rank, its host and its findings, of the same checks. name: numbers of ranks -> what they are called.
    """
    merged = []
    for first, *others in zip(*(findings for _, findings in everyone), strict=True):
        failing: dict[str, list[int]] = {}
        for rank, finding in enumerate((first, *others)):
            if finding.state == "fails":
                failing.setdefault(finding.text, []).append(rank)
        if failing and any((one.state, one.text) != (first.state, first.text) for one in others):
            hosts = {text: dict.fromkeys(everyone[rank][0] for rank in ranks) for text, ranks in failing.items()}
            told = [f"on {name(ranks)} ({', '.join(hosts[text])}): {text}" for text, ranks in failing.items()]
            first = Finding(first.name, "fails", "; ".join(told), first.notes)
        merged.append(first)
    return merged


class _Table:
    """Writes findings as they come, in columns; in colours on a terminal."""

    def __init__(self, stream: TextIO, names: Iterable[str]) -> None:
        self.stream, self.width = stream, max(map(len, names), default=0)
        try:
            "".join(_MARKS.values()).encode(stream.encoding or "utf-8")
            self.marks = _MARKS
        except UnicodeError:
            self.marks = _PLAIN
        self.counts: Counter[State] = Counter()

    def add(self, finding: Finding) -> None:
        self.counts[finding.state] += 1
        text = f"not here: {finding.text}" if finding.state == "not here" else finding.text
        head, *rest = self._wrap(text)
        self._paint(_COLOURS[finding.state])
        self.stream.write(self.marks[finding.state])
        self._paint(0)
        self.stream.write(f" {finding.name:{self.width}}  {head}".rstrip() + "\n")
        for line in [*rest, *(line for note in finding.notes for line in self._wrap(f"note: {note}", "      "))]:
            self.stream.write(f"{' ' * self._indent}{line}\n")
        self.stream.flush()

    def end(self) -> int:
        """Writes how many held. Returns the exit code: 2 where one fails."""
        held, failing, absent = (self.counts[state] for state in ("holds", "fails", "not here"))
        said = [f"{held} of {held + failing} checks hold", f"{failing} fail" if failing > 1 else "1 fails"]
        counted = ", ".join([said[0], *([said[1]] if failing else []), *([f"{absent} not here"] if absent else [])])
        self.stream.write(f"{counted}\n")
        self.stream.flush()
        return 2 if failing else 0

    @property
    def _indent(self) -> int:
        return len(self.marks["holds"]) + self.width + 3

    def _wrap(self, text: str, deeper: str = "") -> Sequence[str]:
        columns = shutil.get_terminal_size((120, 24)).columns
        room = max(40, min(columns, 120) - self._indent)
        whole = {"break_long_words": False, "break_on_hyphens": False}  # a path can be copied
        return textwrap.wrap(one_line(text), room, subsequent_indent=deeper, **whole) or [""]

    def _paint(self, code: int) -> None:
        if self.stream.isatty() and (paint := getattr(self.stream, "paint", None)):
            paint(code)
