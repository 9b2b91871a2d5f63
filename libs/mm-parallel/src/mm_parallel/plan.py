"""What a model family says about itself, as data, so that `parallelize` can cut it without knowing it."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import Tensor, nn


class Ladder(Protocol):
    """A network that is climbed: `head(layer(n-1, … layer(0, stem(…))))`.

    The stream is a NamedTuple of tensors that travel up. Stem and head are methods, not submodules, so that parameter
    names stay the published ones; `layers` are the rungs' modules in the order in which they are climbed.
    """

    @property
    def layers(self) -> Sequence[nn.Module]: ...
    def stem(self, *batch: Any) -> Any: ...
    def layer(self, i: int, stream: Any) -> Any: ...
    def head(self, stream: Any) -> Tensor: ...


@dataclass(frozen=True)
class ParallelPlan:
    """How a model may be cut.

    rungs: patterns of module names, one dot-separated part at a time: `blocks.*` is `blocks.0`, `blocks.1`, … and not
        `blocks.0.norm`. One rung is the unit of sharding and of recompute.
    fp32: patterns of parameter names that stay in fp32 when the rest computes in a lower dtype (*islands*). Here `*`
        crosses dots: `*.modulation`.

    A pattern that matches nothing is an error, because a misspelt island would silently be rounded.
    """

    rungs: tuple[str, ...]
    fp32: tuple[str, ...] = ()

    def rungs_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """The rungs by name, in the order of `model.named_modules()`. Raises ValueError for a pattern without match."""
        modules = dict(model.named_modules())
        found = _matching(self.rungs, list(modules), _match_parts, "rungs", "module")
        return {name: modules[name] for name in found}

    def islands_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The fp32 parameters by name. Raises ValueError for a pattern without match."""
        parameters = dict(model.named_parameters())
        found = _matching(self.fp32, list(parameters), fnmatchcase, "fp32", "parameter")
        return {name: parameters[name] for name in found}


def _match_parts(name: str, pattern: str) -> bool:
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def _matching(patterns: Sequence[str], names: list[str], match: Any, field: str, kind: str) -> list[str]:
    for pattern in patterns:
        if not any(match(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"plan.{field}: no {kind} is named like {pattern!r}; there are {', '.join(near)}, …")
    return [name for name in names if any(match(name, pattern) for pattern in patterns)]
