"""How a model is split over pipeline stages and tensor-parallel ranks: pure arithmetic on names and shapes.

Layers are given as MindSpeed-MM's tools take them: `[7, 8, 8, 7]`, one number per pipeline rank, or with virtual stages
`[[4, 4], [4, 3]]`, one list per virtual stage: rank p holds as its model v the layers of place v*pp + p of the list
read in one go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from mm_convert.families.family import Config, Cuts, Ladder
from mm_convert.tensors.views import LazyTensor, columns, hstack, rows, vstack

Layers = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Split:
    """`layers[ladder]`: layers of each stage, as one list per virtual stage. `tp`: tensor-parallel ranks."""

    layers: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    tp: int = 1

    @classmethod
    def of(cls, layers: Mapping[str, Layers], tp: int = 1) -> Split:
        """From lists as people write them; an empty list means one stage."""
        if tp < 1:
            raise ValueError(f"tp_size is {tp}; it must be at least 1")
        nested = {name: _nest(name, said) for name, said in layers.items() if len(said)}
        shapes = {name: [len(v) for v in lists] for name, lists in nested.items()}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            said = " and ".join(f"{name} {[list(v) for v in lists]}" for name, lists in nested.items())
            raise ValueError(f"{said} have different numbers of stages; every ladder needs one entry per stage")
        return cls(nested, tp)

    @property
    def pp(self) -> int:
        return len(next(iter(self.layers.values()))[0]) if self.layers else 1

    @property
    def vpp(self) -> int:
        return len(next(iter(self.layers.values()))) if self.layers else 1

    @property
    def stages(self) -> int:
        return self.pp * self.vpp

    def flat(self, ladder: str) -> list[int]:
        """Layers of every stage, in the order of the model."""
        return [count for virtual in self.layers[ladder] for count in virtual]


def _nest(name: str, said: Layers) -> tuple[tuple[int, ...], ...]:
    lists = [isinstance(virtual, (list, tuple)) for virtual in said]
    nested = [list(v) for v in said] if all(lists) else [list(said)]  # type: ignore[arg-type]
    if any(type(count) is not int for virtual in nested for count in virtual):
        raise ValueError(f"{name} {list(said)}: expected are whole numbers, or lists of them")
    if len({len(virtual) for virtual in nested}) != 1 or not nested[0]:
        raise ValueError(f"{name} {list(said)}: every virtual stage needs as many numbers as there are pipeline ranks")
    if any(count < 0 for virtual in nested for count in virtual):
        raise ValueError(f"{name} {list(said)}: a number of layers cannot be negative")
    return tuple(tuple(virtual) for virtual in nested)


def check(split: Split, cuts: Cuts, counts: Mapping[str, int], config: Config) -> Split:
    """The split with every ladder in it. `counts`: layers of each letter of the table.

    Raises ValueError for sums, empty stages and divisions that are not right, with the numbers.
    """
    ladders = [ladder for ladder in cuts.ladders if not ladder.follows]
    if unknown := set(split.layers) - {ladder.name for ladder in ladders}:
        raise ValueError(f"there is no ladder {sorted(unknown)[0]}; there are {', '.join(x.name for x in ladders)}")
    if split.layers and (missing := [ladder.name for ladder in ladders if ladder.name not in split.layers]):
        raise ValueError(f"the layers of {missing[0]} must be given too, one number per stage")
    layers = dict(split.layers) or {ladder.name: ((counts[ladder.letter],),) for ladder in ladders}
    split = Split(layers, split.tp)
    for ladder in ladders:
        flat = split.flat(ladder.name)
        if sum(flat) != counts[ladder.letter]:
            raise ValueError(
                f"pp_layers {flat} of {ladder.name} are {sum(flat)} layers, the model has {counts[ladder.letter]}"
            )
    totals = [sum(split.flat(ladder.name)[stage] for ladder in ladders) for stage in range(split.stages)]
    if 0 in totals:
        lists = ", ".join(f"{ladder.name} {split.flat(ladder.name)}" for ladder in ladders)
        raise ValueError(f"stage {totals.index(0)} has no layer ({lists}): every stage needs at least one")
    for what, key in cuts.divides.items() if split.tp > 1 else ():
        if key not in config:
            raise ValueError(f"tp_size {split.tp}: the number of {what} is unknown; a config.json could say it")
        if config[key] % split.tp:
            fitting = [n for n in range(1, config[key] + 1) if config[key] % n == 0]
            some = ", ".join(map(str, fitting[:8])) + (", …" if len(fitting) > 8 else "")
            raise ValueError(
                f"{config[key]} {what} cannot be split over tp_size {split.tp}: tp_size must divide them ({some})"
            )
    return split


class Places:
    """Where each tensor lives: stage (in the order of the model) and its name there, layer numbers starting at 0."""

    def __init__(self, split: Split, cuts: Cuts, config: Config) -> None:
        self.cuts = cuts
        leader = cuts.ladders[0]
        self.counts: dict[str, list[int]] = {}
        for ladder in cuts.ladders:
            if not ladder.follows:
                self.counts[ladder.name] = split.flat(ladder.name)
                continue
            stage_of = [stage for stage, count in enumerate(split.flat(leader.name)) for _ in range(count)]
            stages = [stage_of[layer] for layer in config.get(ladder.follows, ())]
            self.counts[ladder.name] = [stages.count(stage) for stage in range(split.stages)]

    def __call__(self, name: str) -> tuple[int, str]:
        for ladder in self.cuts.ladders:
            counts = self.counts[ladder.name]
            if name.startswith(ladder.layer):
                number, _, rest = name.removeprefix(ladder.layer).partition(".")
                ends = list(accumulate(counts))
                stage = next(stage for stage, end in enumerate(ends) if int(number) < end)
                local = int(number) - (ends[stage] - counts[stage])
                return stage, f"{ladder.layer}{local}.{rest}"
        for ladder in self.cuts.ladders:
            occupied = [stage for stage, count in enumerate(self.counts[ladder.name]) if count]
            if ladder.last and name.startswith(ladder.last):
                return occupied[-1], name
        ladder = next(ladder for ladder in self.cuts.ladders if ladder.first and name.startswith(ladder.first))
        return next(stage for stage, count in enumerate(self.counts[ladder.name]) if count), name


# --- tensor parallelism


def slice_for(name: str, tensor: LazyTensor, cuts: Cuts, rank: int, tp: int) -> LazyTensor:
    """What tensor-parallel rank `rank` of `tp` holds of a tensor."""
    kind = _kind(name, cuts) if tp > 1 else None
    if kind is None:
        return tensor
    side = tensor.shape[1] if kind == "columns" else tensor.height
    parts = 2 * tp if kind == "halves" else tp
    if side % parts:
        raise ValueError(f"{name} has {side} {'columns' if kind == 'columns' else 'rows'}, not divisible by {parts}")
    if kind == "columns":
        return columns(tensor, rank * side // tp, (rank + 1) * side // tp)
    if kind == "rows":
        return rows(tensor, rank * side // tp, (rank + 1) * side // tp)
    half, own = side // 2, side // parts
    return vstack([rows(tensor, top + rank * own, top + (rank + 1) * own) for top in (0, half)])


def join(name: str, slices: Sequence[LazyTensor], cuts: Cuts) -> LazyTensor:
    """The reverse: the whole tensor from what the ranks hold, in their order."""
    kind = _kind(name, cuts) if len(slices) > 1 else None
    if kind is None:
        return slices[0]
    if kind == "columns":
        return hstack(slices)
    if kind == "rows":
        return vstack(slices)
    return vstack([rows(s, h * s.height // 2, (h + 1) * s.height // 2) for h in (0, 1) for s in slices])


def _kind(name: str, cuts: Cuts) -> str | None:
    for kind in ("halves", "columns", "rows"):
        if any(fnmatchcase(name, pattern) for pattern in getattr(cuts, kind)):
            return kind
    return None


# --- reading stages back


def join_stages(stages: Sequence[Mapping[str, Any]], cuts: Cuts) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """All tensors under global names, from the stages in the order of the model; and each ladder's layers per stage.

    Raises ValueError for a tensor that is on two stages. The repeated tied tensor stays, for the caller to judge.
    """
    counts: dict[str, list[int]] = {}
    for ladder in cuts.ladders:
        numbers = [{_number(name, ladder) for name in stage} - {-1} for stage in stages]
        counts[ladder.name] = [max(found, default=-1) + 1 for found in numbers]
    result: dict[str, Any] = {}
    for stage, contents in enumerate(stages):
        for name, tensor in contents.items():
            whole = name
            for ladder in cuts.ladders:
                if (number := _number(name, ladder)) >= 0:
                    rest = name.removeprefix(ladder.layer).partition(".")[2]
                    whole = f"{ladder.layer}{number + sum(counts[ladder.name][:stage])}.{rest}"
            if whole in result:
                raise ValueError(f"{name} is on stage {stage} and on an earlier one: which is right cannot be known")
            result[whole] = tensor
    return result, counts


def _number(name: str, ladder: Ladder) -> int:
    number = name.removeprefix(ladder.layer).partition(".")[0]
    return int(number) if name.startswith(ladder.layer) and number.isdecimal() else -1
