"""Which conversations can be used, from file names and headers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mm_data.conversations.ledger import Ledger
from mm_data.conversations.reader import Conversations


@dataclass(frozen=True)
class Survey:
    """usable: the indices that can be used, in order. sizes: height and width of every picture, upright, by its path
    (where headers were read).
    """

    usable: np.ndarray  # int64
    sizes: dict[str, tuple[int, int]]


def find_missing(
    conversations: Conversations,
    ledger: Ledger,
    *,
    headers: bool = True,
    threads: int = 8,
    say: Callable[[int, int], None] | None = None,
) -> Survey:
    """Parse every item and look for its media: by the names in each folder, listed once, and with `headers` also into
    the beginning of every picture. What cannot be used goes into the ledger.

    say: called now and then with (looked at, all).
    """
    raise NotImplementedError
