"""What a data set is made of: its sets, how often each is shown, and in which shapes. To be read, and to be kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_convert import replace_file
from mm_data import Portion, Sample

FILE = "sets.json"
SHOWN = 4  # shapes of a set in a table, the most frequent


def describe_sets(
    portions: Sequence[Portion], shapes: Sequence[Sequence[int]], left_out: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Every set as JSON: its samples, how often each is shown in an epoch, its part of the epoch, and its shapes.

    shapes: of every sample. left_out: by the name of the set, how many samples it has besides; None where nobody knows.
    """
    epoch = sum(portion.places for portion in portions)
    described, first = [], 0
    for portion in portions:
        own = Counter("x".join(map(str, shape)) for shape in shapes[first : first + portion.samples])
        first += portion.samples
        described.append(
            {
                "set": portion.name,
                "samples": portion.samples,
                "times": float(portion.times),
                "share": float(portion.places / epoch),
                "shapes": dict(own.most_common()),
                "left_out": None if left_out is None else left_out.get(portion.name, 0),
            }
        )
    for name, count in (left_out or {}).items():
        if count and name not in {portion.name for portion in portions}:
            empty = {"samples": 0, "times": 0.0, "share": 0.0, "shapes": {}, "left_out": count}
            described.append({"set": name, **empty})
    return described


def count_sets(left_out: Iterable[tuple[Sample, Any]]) -> dict[str, int]:
    """By the name of the set, how many of these samples it has."""
    return Counter(sample.set.name if sample.set else "" for sample, _ in left_out)


def tabulate(described: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    """The same as lines of a table. what: the shapes are of this. None for one set of one shape."""
    if len(described) == 1 and not described[0]["set"] and len(described[0]["shapes"]) == 1:
        return []
    knows = described[0]["left_out"] is not None
    rows = [("set", "samples", *(["left out"] if knows else []), "each", "of an epoch", what)]
    for one in described:
        counts = [f"{shape}: {count:,}" for shape, count in one["shapes"].items()]
        more = [f"and {len(counts) - SHOWN} more"] if len(counts) > SHOWN else []
        rows.append(
            (
                one["set"] or "all",
                f"{one['samples']:,}",
                *([f"{one['left_out']:,}"] if knows else []),
                f"x{one['times']:.3g}",
                f"{one['share']:.1%}",
                ", ".join([*counts[:SHOWN], *more]) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        middle = (f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        return "  ".join((f"{row[0]:<{widths[0]}}", *middle, row[-1]))

    return [line(row) for row in rows]


def write_sets(folder: Path, described: Sequence[Mapping[str, Any]]) -> None:
    """Into a file of the folder."""
    replace_file(folder / FILE, json.dumps(list(described), indent=2) + "\n")
