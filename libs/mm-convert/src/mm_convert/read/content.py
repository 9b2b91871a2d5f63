"""What a set of tensor names and shapes is: family, dialect, our names, configuration; or why it is none of ours."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mm_convert.families import FAMILIES, Family
from mm_convert.families.family import Config
from mm_convert.read.kinds import describe_names
from mm_convert.tensors.rules import Patterns, Row, Sizes
from mm_convert.tensors.views import LazyTensor

_FEW = 4  # where a family knows not even one name in so many, the tensors are another model's
_SHOWN = 5  # problems of a kind that an error names; the rest is counted

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Content:
    """What a set of tensors was found to be."""

    family: Family
    dialect: str
    names: dict[str, str]  # name as found -> our name
    ignored: dict[str, str]  # name as found -> why it is dropped
    config: Config  # the fields that the shapes say
    layers: dict[str, int]  # of each ladder, by its letter in the table
    groups: set[str]

    def translate(self, dialect: str) -> dict[str, str]:
        """Our name -> name in this dialect."""
        table = self.family.table
        ours, theirs = (table.names(d, self.layers, self.groups) for d in (table.dialects[0], dialect))
        return dict(zip(ours, theirs, strict=True))


def identify(shapes: Shapes, where: str) -> Content:
    """Recognise a checkpoint by its names and shapes.

    Raises ValueError, naming up to five of each: unknown names with their nearest match, missing names, and
    shapes that do not fit together. `where` stands in the message.
    """
    family, dialect = recognise(shapes, where)
    table, patterns = family.table, family.table.patterns[dialect]
    rows = {row.names[dialect]: row for row in table.rows}
    dropped = table.ignored.get(dialect, {})

    found: dict[str, tuple[Row, int]] = {}
    ignored: dict[str, str] = {}
    unknown: list[str] = []
    for name in shapes:
        pattern, layer = patterns.find(name)
        if pattern in rows:
            found[name] = (rows[pattern], layer)
        elif pattern in dropped:
            ignored[name] = dropped[pattern]
        else:
            unknown.append(name)

    problems: list[str] = []
    layers: dict[str, int] = {}
    for letter in table.letters:
        of_ladder = {name: layer for name, (row, layer) in found.items() if row.letter == letter}
        # What comes after a gap is unknown: a hostile number must not make a long list of missing names.
        layers[letter] = _first_gap(set(of_ladder.values()))
        behind = sorted(name for name, layer in of_ladder.items() if layer >= layers[letter])
        problems += _describe(f"layer {layers[letter]} is missing, yet there is", behind)
    groups = {row.group for row, _ in found.values()} - {""}
    expected = table.names(dialect, layers, groups)
    missing = [name for name in expected if name not in found]
    missing += [
        n.format(i=0, j=0) for n, row in rows.items() if row.letter and not layers[row.letter] and not row.group
    ]
    candidates = missing or list(expected)
    problems = _describe("unknown", [_add_nearest(n, candidates) for n in unknown[:_SHOWN]], len(unknown)) + problems
    problems += _describe("missing", missing)
    sizes, misshapen = _solve(expected, shapes)
    problems += _describe("does not fit", misshapen)
    if problems:
        raise ValueError(f"{where} is not a whole {family.name} checkpoint ({dialect} names): " + "; ".join(problems))

    ours = table.dialects[0]
    names = {name: row.names[ours].format(i=layer, j=layer) for name, (row, layer) in found.items()}
    config = family.from_sizes(sizes.values, groups, layers)
    return Content(family, dialect, names, ignored, config, layers, groups)


def fingerprint(shapes: Shapes) -> str:
    """The md5 by which DiffSynth knows a checkpoint: of all `name` and `name:d0_d1_…`, sorted, joined by commas."""
    words = [word for name, shape in shapes.items() for word in (name, f"{name}:{'_'.join(map(str, shape))}")]
    return hashlib.md5(",".join(sorted(words)).encode(), usedforsecurity=False).hexdigest()


def recognise(names: Iterable[str], where: str) -> tuple[Family, str]:
    """The family and the dialect that know most of these names; a fused tensor goes by its own name or by its parts'.

    Raises ValueError, saying what they are, when no family knows more than a few of them.
    """
    names = list(names)
    scores = _scores(names)
    (family, dialect), score = max(scores.items(), key=lambda item: item[1])
    if _FEW * score < len(names) or not score:
        some = ", ".join(sorted(names)[:_SHOWN]) or "no tensors"
        known = ", ".join(family.name for family in FAMILIES)
        what = f"; by its names it is {describe_names(names)}" if names else ""
        raise ValueError(f"{where} belongs to no known family ({known}); it holds {some}{what}")
    return next(f for f in FAMILIES if f.name == family), dialect


def known_names(names: Iterable[str]) -> int:
    """How many of these names the family that knows most of them knows."""
    return max(_scores(list(names)).values())


def _scores(names: Sequence[str]) -> dict[tuple[str, str], int]:
    scores = {}
    for family in FAMILIES:
        for dialect in family.table.dialects:
            fused = [fusion.name for fusion in family.fusions.get(dialect, ())]
            patterns = Patterns([*family.table.patterns[dialect].known, *fused])
            scores[family.name, dialect] = sum(patterns.find(name)[0] in patterns for name in names)
    return scores


def cut_fused(
    tensors: Mapping[str, LazyTensor], family: Family, dialect: str, said: Config, where: str
) -> dict[str, LazyTensor]:
    """The tensors with every fused one of this dialect replaced by its parts, called `name#part`."""
    fusions = {fusion.name: fusion for fusion in family.fusions.get(dialect, ())}
    if not fusions:
        return dict(tensors)
    try:
        counts = family.heads({name: tensor.shape for name, tensor in tensors.items()}, said) if family.heads else {}
    except KeyError as error:
        raise ValueError(f"{where} is not a whole {family.name} checkpoint: {error.args[0]} is missing") from error
    patterns, result = Patterns(fusions), {}
    for name, tensor in tensors.items():
        pattern, layer = patterns.find(name)
        if pattern not in fusions:
            result[name] = tensor
            continue
        parts = zip(fusions[pattern].names, fusions[pattern].cut(tensor, counts), strict=True)
        result |= {part.format(i=layer, j=layer): cut for part, cut in parts}
    return result


def join_fused(
    tensors: Mapping[str, LazyTensor], family: Family, dialect: str, config: Config
) -> dict[str, LazyTensor]:
    """The reverse: from parts called `name#part` to the tensors that this dialect has."""
    result = {name: tensor for name, tensor in tensors.items() if "#" not in name}
    patterns = {name: fusion for fusion in family.fusions.get(dialect, ()) for name in fusion.names}
    finder = Patterns(patterns)
    for name in tensors:
        if "#" in name and (whole := name.partition("#")[0]) not in result:
            pattern, layer = finder.find(name)
            parts = [tensors[part.format(i=layer, j=layer)] for part in patterns[pattern].names]
            result[whole] = patterns[pattern].join(parts, config)
    return result


def _first_gap(numbers: set[int]) -> int:
    return next(i for i in range(len(numbers) + 1) if i not in numbers)


def _solve(expected: Mapping[str, Row], shapes: Shapes) -> tuple[Sizes, list[str]]:
    sizes = Sizes()
    errors = [sizes.solve(name, row, shapes[name]) for name, row in expected.items() if name in shapes]
    return sizes, [error for error in errors if error]


def _add_nearest(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0)
    return f"{name} (nearest: {near[0]})" if near else name


def _describe(what: str, names: list[str], count: int | None = None) -> list[str]:
    count = len(names) if count is None else count
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"] if names else []
