"""Tables of names and shapes: one row per tensor, one column per dialect, read in every direction.

A row says what a tensor is called in each dialect and how its sides follow from the sizes of the model:

    Row({"original": "blocks.{i}.ffn.0.weight", "diffusers": "blocks.{i}.ffn.net.0.proj.weight"}, "ffn_dim dim")

`{i}` is a layer number. A side is a number, a size, or a product of them (`6*dim`). The sizes themselves are found by
solving the rows from top to bottom, so that a checkpoint without config.json still says how large it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    names: Mapping[str, str]  # dialect -> name, with {i} for the layer number
    shape: str  # sides, separated by spaces
    group: str = ""  # rows of a named group are present together or not at all


@dataclass(frozen=True)
class Table:
    """All tensors of a family of models. `ignored[dialect][name]` is the reason why a published tensor is dropped."""

    rows: Sequence[Row]
    ignored: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for dialect in self.dialects:
            names = [row.names[dialect] for row in self.rows]
            assert len(set(names)) == len(names), f"two rows of {dialect} have one name"
            assert not set(names) & set(self.ignored.get(dialect, ())), "an ignored tensor has a row"

    @property
    def dialects(self) -> tuple[str, ...]:
        return tuple(self.rows[0].names)

    def names(self, dialect: str, layers: int, groups: Iterable[str]) -> dict[str, Row]:
        """Every name of a model with so many layers and these optional groups."""
        groups = {"", *groups}
        return {
            row.names[dialect].format(i=i): row
            for row in self.rows
            if row.group in groups
            for i in (range(layers) if "{i}" in row.names[dialect] else (0,))
        }


def template(name: str, patterns: Iterable[str]) -> tuple[str, int]:
    """`blocks.7.norm3.weight` -> (`blocks.{i}.norm3.weight`, 7); a name without layer number is its own, at -1."""
    for prefix in {pattern.partition("{i}")[0] for pattern in patterns if "{i}" in pattern}:
        number, dot, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and dot and number.isdecimal() and str(int(number)) == number:
            return f"{prefix}{{i}}.{rest}", int(number)
    return name, -1


@dataclass
class Sizes:
    """The sizes found so far, and the tensor each was read from."""

    values: dict[str, int] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def solve(self, name: str, row: Row, shape: Sequence[int]) -> str | None:
        """Learn from one tensor, or say how its shape contradicts what is known."""
        sides = row.shape.split()
        if len(sides) != len(shape):
            return f"{name} has shape {list(shape)}, expected {len(sides)} sides ({', '.join(sides)})"
        for side, length in zip(sides, shape, strict=True):
            factors = side.split("*")
            unknown = [f for f in factors if not f.isdecimal() and f not in self.values]
            known = 1
            for factor in factors:
                if factor not in unknown:
                    known *= int(factor) if factor.isdecimal() else self.values[factor]
            if len(unknown) == 1 and known and length % known == 0:
                self.values[unknown[0]], self.origin[unknown[0]] = length // known, name
            elif unknown or known != length:
                because = [f"{f} = {self.values[f]} from {self.origin[f]}" for f in factors if f in self.origin]
                reason = f" ({'; '.join(because)})" if because else ""
                return f"{name} has shape {list(shape)}, expected {side} = {known} where it has {length}{reason}"
        return None
