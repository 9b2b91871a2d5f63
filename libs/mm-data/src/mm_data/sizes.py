"""What conversations take, looked up before the first step or when they come: 17 bytes of memory for each."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mm_data.conversations import Conversations, Ledger, Unusable, find_missing
from mm_data.files import write_atomic
from mm_data.lengths import Fitted, Limits, fit
from mm_data.processing import Processing, Size

VERSION = 1  # of what is found, and of how it is kept
UNKNOWN, REFUSED = -1, -2  # in place of a number of tokens
_ASKED_AGAIN = 1024  # conversations of a kept file of sizes, whose media must still be there
_CHUNK = 64  # conversations that a thread looks at before it takes others

Exchange = Callable[[Any], Sequence[Any]]
"""Given what one process has, what all have, in order: `all_gather_object`."""


def alone(own: Any) -> list[Any]:
    """The `Exchange` of one process."""
    return [own]


class Sizes:
    """By the number of the conversation. What is found once is kept, so a size is the same whenever it is asked for."""

    def __init__(self, conversations: Conversations, processing: Processing, limits: Limits):
        self.conversations, self.processing, self.limits = conversations, processing, limits
        count = len(conversations)
        self.tokens = np.full(count, UNKNOWN, np.int32)
        self.patches = np.zeros(count, np.int32)
        self.squares = np.zeros(count, np.int64)
        self.changed = np.zeros(count, bool)  # turns were dropped, or pictures shrunk

    def __getitem__(self, index: int) -> Size:
        assert self.tokens[index] >= 0, index
        return Size(int(self.tokens[index]), int(self.patches[index]), squares=int(self.squares[index]))

    @property
    def usable(self) -> np.ndarray:
        """The numbers of those that can be used, or of which that is not yet known."""
        return np.flatnonzero(self.tokens != REFUSED)

    def fit(self, index: int) -> Fitted:
        """Raises Unusable."""
        return fit(self.conversations[index], self.processing, self.limits)

    def look(
        self, indices: Sequence[int], threads: int, say: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[int, Unusable]]:
        """Find the sizes of these conversations. Gives those that cannot be used, in order, each with the reason.

        say: called with how many are done, of how many.
        """

        def look(chunk: Sequence[int]) -> list[tuple[int, Unusable]]:
            refused = []
            for index in chunk:
                try:
                    fitted = self.fit(index)
                except Unusable as error:
                    self.tokens[index], self.changed[index] = REFUSED, False
                    refused.append((index, Unusable(error.reason, error.text)))  # without the frames it came through
                    continue
                self.patches[index], self.squares[index] = fitted.size.patches, fitted.size.squares
                self.changed[index] = fitted.changed
                self.tokens[index] = fitted.size.tokens
            return refused

        many = max(1, min(_CHUNK, -(-len(indices) // threads)))
        chunks = [indices[first : first + many] for first in range(0, len(indices), many)]
        done = 0
        with ThreadPoolExecutor(threads, thread_name_prefix="mm_data sizes") as pool:
            for chunk, refused in zip(chunks, pool.map(look, chunks), strict=True):
                yield from refused
                done += len(chunk)
                if say:
                    say(done, len(indices))

    def survey(
        self,
        *,
        file: Path | None = None,
        part: tuple[int, int] = (0, 1),
        exchange: Exchange = alone,
        threads: int = 8,
        say: Callable[[int, int], None] | None = None,
    ) -> dict[int, Unusable]:
        """Find the sizes of all conversations, and those that cannot be used.

        file: where sizes are kept. They are taken from there if data, processing and limits are still the same, and
        media are where they were (of 1,024 conversations that is asked; where one lacks some, all are looked at again);
        those that could not be used are looked at again, as somebody may have mended them.
        part, exchange: of how many processes each looks at its share. All then know the same, and what one of them
        raises is raised by all.
        """
        key = self._identify()
        kept = exchange(file is not None and self._read(file, key) and self._are_there())
        if not all(kept):
            self.tokens[:] = UNKNOWN
        todo = np.flatnonzero(self.tokens == UNKNOWN)
        number, parts = part
        own = todo[len(todo) * number // parts : len(todo) * (number + 1) // parts]
        found: Any
        try:
            refused = self._find_names(dict(self.look(own.tolist(), threads, say)))
            found = [column[own] for column in self._columns().values()], refused
        except Exception as error:
            found = error
        all_refused: dict[int, Unusable] = {}
        for of_part, (columns, refused) in enumerate(map(_raise, exchange(found))):
            its = todo[len(todo) * of_part // parts : len(todo) * (of_part + 1) // parts]
            for column, values in zip(self._columns().values(), columns, strict=True):
                column[its] = values
            all_refused |= refused
        if file is not None and number == 0 and len(todo):
            self._write(file, key)
        return all_refused

    def _are_there(self) -> bool:
        """Whether the media of what was found once are still there; of many conversations, of some."""
        usable = np.flatnonzero(self.tokens >= 0)
        some = usable[:: max(1, len(usable) // _ASKED_AGAIN)].tolist()
        ledger = Ledger()
        find_missing(self.conversations, ledger, indices=some, headers=False)
        return not len(ledger)

    def _find_names(self, refused: dict[int, Unusable]) -> dict[int, Unusable]:
        """The same; what is not there is named with what is most like it in its folder."""
        missing = {
            self.conversations.ids[index]: index for index, error in refused.items() if error.reason == "missing_media"
        }
        if missing:
            ledger = Ledger()
            find_missing(self.conversations, ledger, indices=list(missing.values()), headers=False)
            refused = refused | {missing[entry.id]: Unusable(entry.reason, entry.text) for entry in ledger.entries}
        return refused

    def _columns(self) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens, "patches": self.patches, "squares": self.squares, "changed": self.changed}

    def _identify(self) -> str:
        parts = [VERSION, self.conversations.identity, self.processing.identity, asdict(self.limits)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _read(self, file: Path, key: str) -> bool:
        """Whether the file had the sizes. One that is of something else, or damaged, will be written anew."""
        try:
            with np.load(file, allow_pickle=False) as kept:
                if str(kept["key"]) != key:
                    return False
                columns = {name: kept[name] for name in self._columns()}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False
        for name, column in self._columns().items():
            column[:] = columns[name]
        self.tokens[self.tokens == REFUSED] = UNKNOWN
        return True

    def _write(self, file: Path, key: str) -> None:
        data = io.BytesIO()
        np.savez_compressed(data, key=np.array(key), **self._columns())
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, data.getvalue())


def _raise(found: Any) -> Any:
    if isinstance(found, Exception):
        raise found
    return found
