"""Parameters of a pipeline rank: how many bytes of each it holds, gathers and reduces. Exact, for its fullest rank."""

from collections import defaultdict
from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from mm_parallel.config import ParallelConfig
from mm_parallel.estimate.traces import way_of
from mm_parallel.estimate.units import Units
from mm_parallel.frozen import frozen_linears
from mm_parallel.fsdp import group
from mm_parallel.waiting import padded


class Weight(NamedTuple):
    """One parameter, as this rank's tensor-parallel part of it."""

    name: str
    shape: tuple[int, ...]
    held: torch.dtype
    gathered: torch.dtype
    reduced: torch.dtype
    trained: bool
    group: str | None
    """Of FSDP; None: it is replicated."""
    unit: str = ""
    """Of a frozen matrix that is held apart: the layer or companion with which it comes from the host."""

    def local(self, ranks: int) -> tuple[int, ...]:
        """The shape of what one of `ranks` holds: FSDP pads the first dim to a multiple of them."""
        return (-(-self.shape[0] // ranks), *self.shape[1:]) if self.shape and self.group is not None else self.shape

    def bytes(self, ranks: int) -> int:
        """Of the same."""
        return prod(self.local(ranks)) * self.held.itemsize

    def whole(self, ranks: int) -> int:
        """Gathered."""
        return ranks * _part(self.shape, ranks) * self.gathered.itemsize

    def to_reduce(self, ranks: int) -> int:
        return ranks * _part(self.shape, ranks) * self.reduced.itemsize if self.trained else 0


def _part(shape: tuple[int, ...], ranks: int) -> int:
    return -(-shape[0] // ranks) * prod(shape[1:]) if shape else 1


class Weights:
    """Of a model that is cut as `layout` says, by who owns them: "first" or "last" stage, or a layer's name."""

    def __init__(self, units: Units, layout: ParallelConfig, reduce: str = "float32") -> None:
        self.units = units
        self.ranks = layout.dp_shard * layout.ring * layout.ulysses
        self.sharded = layout.dp_replicate * self.ranks > 1
        self.owned: dict[str, list[Weight]] = defaultdict(list)
        twin, plan = units.twin(way_of(layout)), units.plan.on(units.twin(way_of(layout)))
        held = {name: p.dtype for name, p in units.bones.named_parameters()}
        widest = torch.float64 if torch.float64 in held.values() else torch.float32
        narrow = torch.bfloat16 if reduce == "bfloat16" else widest
        groups = group(twin, plan)
        of: dict[nn.Parameter, str] = {}
        for name, module in groups.modules.items():
            for parameter in module.parameters():
                of.setdefault(parameter, name)
        for name, p in twin.named_parameters():
            own = None if p in groups.replicated or not self.sharded else of[p]
            in_fp32 = own in groups.in_fp32
            gathered = held[name] if in_fp32 or units.dtype is None else units.dtype
            reduced = widest if in_fp32 else narrow
            weight = Weight(name, tuple(p.shape), held[name], gathered, reduced, p.requires_grad, own)
            self.owned[self._owner(name)].append(weight)
        units_here = [p + unit for p, ladder, own in plan.ladders(twin) for unit in own.units_of(ladder)]
        for name, linear in frozen_linears(twin).items():
            unit = next(unit for unit in units_here if name.startswith(f"{unit}."))
            for part in linear.tensors:
                of_host = "" if part is linear.pairs else unit
                like = (name, tuple(part.shape), part.dtype, part.dtype, part.dtype, False, None, of_host)
                self.owned[self._owner(name)].append(Weight(*like))

    def _owner(self, name: str) -> str:
        for layer in set(self.units.kinds.values()):
            for unit in (layer, *self.units.companions.get(layer, ())):
                if name.startswith(f"{unit}."):
                    return layer
        parts = name.split(".")
        heads = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        return "last" if heads & set(self.units.plan.last) else "first"

    def of(self, owner: str) -> list[Weight]:
        """Of "first", "last", or any layer."""
        return self.owned[self.units.kinds.get(owner, owner)]

    def waiting(self, layers: Iterable[str]) -> list[tuple[int, int]]:
        """(bytes, bytes of the buffer that it needs) of what comes from the host at one time, of layers that wait."""
        found = []
        for layer in layers:
            sizes: dict[str, list[int]] = defaultdict(list)
            for weight in self.of(layer):
                if weight.unit:
                    sizes[weight.unit].append(weight.bytes(1))
            found += [(sum(own), sum(map(padded, own))) for own in sizes.values()]
        return found

    def groups(self, owner: str) -> dict[str, list[Weight]]:
        """The same, as FSDP gathers them; without what is replicated."""
        found: dict[str, list[Weight]] = defaultdict(list)
        for weight in self.of(owner):
            if weight.group is not None:
                found[weight.group].append(weight)
        return found
