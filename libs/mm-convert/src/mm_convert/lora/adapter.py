"""An adapter: for each module a pair of factors and their strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm_convert.families import Family
from mm_convert.lora.names import Names, listed, read_names
from mm_convert.lora.strength import find_alphas
from mm_convert.tensors.rules import Row, Sizes
from mm_convert.tensors.views import LazyTensor


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight: alpha/rank · B A."""

    a: LazyTensor  # rank x in; behind that the kernel, of a convolution
    b: LazyTensor  # out x rank; behind that ones, of a convolution
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.b.shape[0], *self.a.shape[1:])


@dataclass(frozen=True)
class Adapter:
    family: Family
    format: str  # as found: "peft", "diffusers", "comfyui", "kohya", "diffsynth", "mindspeed"
    dialect: str  # of its names, as found
    modules: dict[str, LowRank]  # by our names, without `.weight`
    base: str = ""  # the model it is for, where the file says so
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int | None:
        """Of all modules; None where they differ."""
        return _only({module.rank for module in self.modules.values()})

    @property
    def alpha(self) -> float | None:
        """Of all modules; None where they differ."""
        return _only({module.alpha for module in self.modules.values()})


def _only(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else None


def read_lora(
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    adapter_config: Mapping[str, Any] | None,
    where: str,
    alpha: float | None = None,
    rank: int | None = None,
) -> Adapter:
    """Recognise an adapter, in whatever format.

    Args:
        tensors: by their names in the file.
        metadata: the free text of its header.
        adapter_config: of peft, if it lies beside the file.
        where: the file, for messages.
        alpha: needed where the file does not say it and no loader takes it for the rank: for MindSpeed-MM's.
        rank: only compared with the factors.

    Raises ValueError, naming up to five modules, when this is not plain LoRA, belongs to no known family, is not whole,
    does not fit together, or says two things of its rank or alpha.
    """
    names = read_names(tensors, where)
    factors = {module: (tensors[parts["A"]], tensors[parts["B"]]) for module, parts in names.parts.items()}
    _check_shapes(names, factors, where)
    alphas, notes = find_alphas(names, tensors, metadata, adapter_config, where, rank, alpha)
    base = metadata.get("base") or (adapter_config or {}).get("base_model_name_or_path") or ""
    modules = {names.modules[m][0]: LowRank(a, b, alphas[m]) for m, (a, b) in factors.items()}
    return Adapter(names.family, names.format, names.dialect, modules, str(base), tuple(notes))


def _check_shapes(names: Names, factors: Mapping[str, tuple[LazyTensor, LazyTensor]], where: str) -> None:
    problems, sizes = [], Sizes()
    for module, (a, b) in factors.items():
        shapes = f"{module} has A {list(a.shape)} and B {list(b.shape)}"
        if len(a.shape) < 2 or len(b.shape) != len(a.shape) or any(side != 1 for side in b.shape[2:]):
            problems.append(f"{shapes}; expected are [rank, in] and [out, rank]")
        elif a.shape[0] != b.shape[1] or not a.shape[0]:
            problems.append(f"{shapes}, of rank {a.shape[0]} and {b.shape[1]}")
        elif problem := sizes.solve(module, _solvable(names.modules[module][1]), (b.shape[0], *a.shape[1:])):
            problems.append(problem)
    if problems:
        raise ValueError(f"{where} does not fit together: {listed(problems)}")


def _solvable(row: Row) -> Row:
    """A row where a product of several sizes counts as one: an adapter has too few tensors to tell them apart."""

    def has_several(side: str) -> bool:
        return sum(not factor.isdecimal() for factor in side.split("*")) > 1

    sides = [side.replace("*", "·") if has_several(side) else side for side in row.shape.split()]
    return Row(row.names, " ".join(sides), row.group)
