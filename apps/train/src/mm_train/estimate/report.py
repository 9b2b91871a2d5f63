"""The estimate as a person reads it: every number in the column that says how it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple

from mm_parallel.estimate import RankMemory
from mm_train.estimate.estimate import Estimate

Known = Literal["counted", "modelled", "constant"]
"""counted: by running the code without values. modelled: by a formula. constant: of a device, from a table."""


class Row(NamedTuple):
    """A number, what it is, and how it is known."""

    name: str
    value: str
    known: Known
    note: str = ""


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row, a column for each way of knowing."""
    columns: tuple[Known, ...] = ("counted", "modelled", "constant")
    name = max(len(row.name) for row in rows)
    width = max(11, *(len(row.value) for row in rows))
    yield "  ".join([" " * name, *(f"{column:>{width}}" for column in columns)])
    for row in rows:
        cells = [f"{row.value if row.known == column else '':>{width}}" for column in columns]
        yield "  ".join([f"{row.name:{name}}", *cells, row.note]).rstrip()


def memory_rows(rank: RankMemory) -> Iterator[Row]:
    """What is on the device at the peak."""
    yield Row("parameters", gib(rank.parameters), "counted")
    yield Row("gradients", gib(rank.gradients), "counted")
    yield Row("moments", gib(rank.moments), "counted")
    if rank.average:
        yield Row("average", gib(rank.average), "counted")
    yield Row("saved activations", gib(rank.saved), "counted", f"of {rank.in_flight} micro-batches")
    yield Row("stream", gib(rank.stream), "counted")
    yield Row("logits and loss", gib(rank.head), "counted")
    yield Row("gathered weights", gib(rank.gathered), "modelled")
    yield Row("at work", gib(rank.transient), "modelled", rank.moment)


def gib(size: float) -> str:
    """12.34 GiB, or in MiB what is small."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 or not size else f"{size / 2**20:,.2f} MiB"


def to_json(found: Estimate) -> dict[str, Any]:
    """All numbers of an estimate, bytes, seconds and FLOPs; of layers only the sums."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name != "layers"}
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    return plain(found) | {"peak": found.peak}
