"""Which conversations can be used, from file names and headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mm_data.conversations.conversation import Conversation, Media, Unusable
from mm_data.conversations.ledger import Ledger
from mm_data.conversations.reader import Conversations
from mm_data.files import find_fault
from mm_data.images import read_size
from mm_data.nearest import Neighbours

_GROUP = 1024  # conversations between two words of progress


@dataclass(frozen=True)
class Survey:
    """usable: the indices that can be used, in order. sizes: height and width of every picture, upright as EXIF says,
    by its path (where headers were read). kinds: how many of the usable have images, videos, or only text.
    """

    usable: np.ndarray  # int64
    sizes: dict[str, tuple[int, int]]
    kinds: dict[str, int]


def find_missing(
    conversations: Conversations,
    ledger: Ledger,
    *,
    indices: Sequence[int] | None = None,
    headers: bool = True,
    threads: int = 8,
    say: Callable[[int, int], None] | None = None,
) -> Survey:
    """Parse these items (by default all) and look for their media: by the names in each folder, listed once, and with
    `headers` also into the beginning of every picture, once each. What cannot be used goes into the ledger.

    What is not there is named with what is most like it in its folder. Videos are only looked for: what they hold shows
    when they are read. say: called now and then with (looked at, all).
    """
    indices = range(len(conversations)) if indices is None else indices
    search = _Search(conversations, headers)
    usable: list[int] = []
    kinds = {"images": 0, "videos": 0, "only text": 0}
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(indices), _GROUP):
            group = indices[begin : begin + _GROUP]
            read = list(_read(conversations, group, ledger))
            if headers:
                search.look(pool, [one for _, found in read for one in found.media])
            for index, found in read:
                try:
                    for one in found.media:
                        search.check(one)
                except Unusable as error:
                    ledger.add(found.id, error)
                    continue
                usable.append(index)
                for kind in {f"{one.kind}s" for one in found.media} or {"only text"}:
                    kinds[kind] += 1
            if say is not None:
                say(begin + len(group), len(indices))
    return Survey(np.array(usable, np.int64), search.sizes, kinds)


def _read(conversations: Conversations, group: Sequence[int], ledger: Ledger) -> Iterator[tuple[int, Conversation]]:
    for index in group:
        try:
            yield index, conversations[index]
        except Unusable as error:
            ledger.add(conversations.ids[index], error)


class _Search:
    def __init__(self, conversations: Conversations, headers: bool):
        self.folders = conversations.folders
        self.headers = headers
        self.neighbours = Neighbours()
        self.sizes: dict[str, tuple[int, int]] = {}
        self.faults: dict[tuple[str, str], Unusable] = {}  # by kind and path: a video is no broken picture

    def look(self, pool: ThreadPoolExecutor, media: Sequence[Media]) -> None:
        """Into the headers of pictures that were not seen before."""
        paths = [one.path for one in media if one.kind == "image" and not self._is_known(one.path)]
        paths = [path for path in dict.fromkeys(paths) if path.startswith("data:") or self.folders.has(path)]
        for path, found in zip(paths, pool.map(_read_size, paths), strict=True):
            if isinstance(found, Unusable):
                self.faults["image", path] = found
            else:
                self.sizes[path] = found

    def _is_known(self, path: str) -> bool:
        return path in self.sizes or ("image", path) in self.faults

    def check(self, medium: Media) -> None:
        path = medium.path
        if path in self.sizes:
            return
        key = medium.kind, path
        if key not in self.faults:
            if path.startswith("data:") or self.folders.has(path) or (fault := find_fault(path)) is None:
                return
            self.faults[key] = Unusable("missing_media", fault + self.neighbours.describe(Path(path)))
        raise self.faults[key].with_traceback(None)


def _read_size(path: str) -> tuple[int, int] | Unusable:
    try:
        return read_size(path)
    except (ValueError, OSError) as error:
        return Unusable("unreadable_media", str(error))
