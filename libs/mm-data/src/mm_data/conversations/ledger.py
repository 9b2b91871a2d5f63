"""Every conversation that is not used, with its reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from mm_data.conversations.conversation import Unusable
from mm_data.files import shorten, write_atomic

MAX_SHOWN = 2000  # characters of a reason


class Entry(NamedTuple):
    id: str
    reason: str
    text: str


class Ledger:
    """The conversations that cannot be used, each once, by the order in which they came. Several threads may add."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._lock = Lock()

    def add(self, id: str, error: Unusable) -> bool:
        """Whether this conversation is new here: of one that is shown in every epoch, the first reason is kept."""
        with self._lock:
            if id in self._entries:
                return False
            self._entries[id] = Entry(id, error.reason, shorten(error.text, MAX_SHOWN))
            return True

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: str) -> bool:
        return id in self._entries

    @property
    def entries(self) -> list[Entry]:
        with self._lock:
            return list(self._entries.values())

    @property
    def counts(self) -> dict[str, int]:
        """By reason, most frequent first."""
        counts = Counter(entry.reason for entry in self.entries)
        return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))

    def __str__(self) -> str:
        """A line for each reason, with how often it is there and one example; empty where nothing was refused."""
        first = {entry.reason: entry for entry in reversed(self.entries)}
        return "\n".join(
            f"  {reason}: {count:,}, e.g. {shorten(first[reason].id)}: {shorten(first[reason].text, 500)}"
            for reason, count in self.counts.items()
        )

    def write(self, path: str | Path) -> None:
        """`failures.jsonl`: one object {"id", "reason", "text"} a line, by id."""
        lines = (json.dumps(entry._asdict(), ensure_ascii=False) for entry in sorted(self.entries))
        write_atomic(Path(path), "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
