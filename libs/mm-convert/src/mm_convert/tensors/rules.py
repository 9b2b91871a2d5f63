"""Tables of names and shapes: one row per tensor, one column per dialect, read in every direction.

A row says what a tensor is called in each dialect and how its sides follow from the sizes of the model:

    Row({"original": "blocks.{i}.ffn.0.weight", "diffusers": "blocks.{i}.ffn.net.0.proj.weight"}, "ffn_dim dim")

`{i}` is a layer number; a model with a second ladder (VACE's control blocks, Qwen's vision) numbers that one `{j}`.
A name that ends in `#part` says that the tensor is a part of a larger one in that dialect (see `fusion`). A side is a
number, a size, or a product of them (`6*dim`). The sizes themselves are found by solving the rows from top to bottom,
so that a checkpoint without config.json still says how large it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

LETTERS = ("i", "j")
GGUF = "gguf"  # the dialect of llama.cpp's files, which are read and not written


@dataclass(frozen=True)
class Row:
    """One tensor of a family."""

    names: Mapping[str, str]  # dialect -> name, with {i} or {j} for the layer number
    shape: str  # sides, separated by spaces
    group: str = ""  # rows of a named group are present together or not at all

    @property
    def name(self) -> str:
        """In our names."""
        return next(iter(self.names.values()))

    @property
    def letter(self) -> str:
        """Of the ladder that this row belongs to; "" outside of the layers."""
        return letter_of(self.name)


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
            assert all(letter_of(row.names[dialect]) == row.letter for row in self.rows), "a row changes ladders"

    @property
    def dialects(self) -> tuple[str, ...]:
        return tuple(self.rows[0].names)

    @cached_property
    def patterns(self) -> dict[str, Patterns]:
        """For each dialect, what finds the row of a name."""
        return {d: Patterns([*(r.names[d] for r in self.rows), *self.ignored.get(d, ())]) for d in self.dialects}

    @property
    def letters(self) -> list[str]:
        """The ladders that this family has."""
        return sorted({row.letter for row in self.rows} - {""})

    def names(self, dialect: str, layers: Mapping[str, int], groups: Iterable[str]) -> dict[str, Row]:
        """Every name of a model with so many layers of each letter and these optional groups."""
        groups = {"", *groups}
        return {
            row.names[dialect].format(**{row.letter: number}) if row.letter else row.names[dialect]: row
            for row in self.rows
            if row.group in groups
            for number in (range(layers[row.letter]) if row.letter else (0,))
        }

    def shapes(
        self, dialect: str, sizes: Mapping[str, int], layers: Mapping[str, int], groups: Iterable[str] = ()
    ) -> dict[str, tuple[int, ...]]:
        """Every name and shape of a model of these sizes."""

        def length(side: str) -> int:
            return prod(int(factor) if factor.isdecimal() else sizes[factor] for factor in side.split("*"))

        rows = self.names(dialect, layers, groups)
        return {name: tuple(length(side) for side in row.shape.split()) for name, row in rows.items()}


def letter_of(pattern: str) -> str:
    """Of the layer number in a pattern; "" if it has none."""
    return next((letter for letter in LETTERS if f"{{{letter}}}" in pattern), "")


class Patterns:
    """Finds which of some names with {i} or {j} a name is made from."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.known = set(patterns)
        self.prefixes = {
            pattern.partition(f"{{{letter}}}")[0]: letter for pattern in self.known if (letter := letter_of(pattern))
        }

    def __contains__(self, pattern: str) -> bool:
        return pattern in self.known

    def find(self, name: str) -> tuple[str, int]:
        """`blocks.7.norm3.weight` -> (`blocks.{i}.norm3.weight`, 7); a name without layer number is its own, at -1."""
        if name in self.known:
            return name, -1
        for prefix, letter in self.prefixes.items():
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and dot and number.isdecimal() and str(int(number)) == number:
                return f"{prefix}{{{letter}}}.{rest}", int(number)
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
