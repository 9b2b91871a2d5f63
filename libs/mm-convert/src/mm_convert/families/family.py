"""What a family has to say of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mm_convert.rules import Table

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A family of models: its tensors, and its config.json in every dialect. The first dialect of the table is ours.

    `from_sizes(sizes, groups, layers)` gives the fields of our configuration that the shapes say.
    `read_config(json)` gives our fields from a published config.json of any dialect, only those that stand in it.
    `write_config[dialect](config)` gives the published config.json for our fields.
    `complete(config)` adds what follows from the other fields.
    """

    name: str
    table: Table
    from_sizes: Callable[[Mapping[str, int], set[str], int], Config]
    read_config: Callable[[Mapping[str, Any]], Config]
    write_config: Mapping[str, Callable[[Config], Config]]
    complete: Callable[[Config], Config]
