"""Which process of how many this is, as its launcher said in the environment; read without torch."""

import os
from collections.abc import Mapping
from typing import NamedTuple

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, and processes need to find each other."""


class Launch(NamedTuple):
    rank: int = 0
    world: int = 1
    local: int | None = None
    """Rank on this host, where the launcher says it."""
    joins: bool = False
    """Whether there is a process group to join."""

    @property
    def ranks(self) -> tuple[int, int] | None:
        """(rank, world) of a process that has others to join, or None."""
        return (self.rank, self.world) if self.joins else None


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """What the environment says of this process.

    A launcher sets all of `NEEDED`. What a shell, a pod or a batch system has left behind of them makes no process
    group: without RANK and WORLD_SIZE, or where they say 0 and 1, this is a single process.

    Raises ValueError for what is no number, for a rank outside the world, and for one of several processes that cannot
    find the others: it names what is set and what is missing.
    """
    said = {name: environment[name].strip() for name in NEEDED if environment.get(name, "").strip()}
    rank, world = _number(said, "RANK", 0), _number(said, "WORLD_SIZE", 1)
    if len(said) < len(NEEDED):
        if (rank, world) == (0, 1):
            return Launch()
        there = ", ".join(f"{name}={value}" for name, value in said.items())
        missing = ", ".join(name for name in NEEDED if name not in said)
        raise ValueError(
            f"the environment says {there}, but not {missing}: torchrun sets all of them. Start with torchrun, or "
            "unset RANK and WORLD_SIZE for a single process"
        )
    if (port := _number(said, "MASTER_PORT", 0)) > 65535:
        raise ValueError(f"the environment says MASTER_PORT={port}: ports are 0 to 65535")
    if not 0 <= rank < world:
        raise ValueError(f"the environment says RANK={rank} and WORLD_SIZE={world}: ranks are 0 to {world - 1}")
    local = _number(environment, "LOCAL_RANK", 0) if environment.get("LOCAL_RANK", "").strip() else None
    return Launch(rank, world, local, joins=True)


def _number(said: Mapping[str, str], name: str, unsaid: int) -> int:
    text = said.get(name, str(unsaid)).strip()
    if not text.isascii() or not text.isdigit() or (name == "WORLD_SIZE" and int(text) < 1):
        raise ValueError(f"the environment says {name}={text!r}; it takes a whole number (at least {unsaid})")
    return int(text)
