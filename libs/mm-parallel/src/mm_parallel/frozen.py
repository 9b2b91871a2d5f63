"""Matrices that are not trained: held in 8 or 4 bits, in the host's memory, or both.

    y = x Wᵀ + b        W is made of codes and scales (`mm_parallel.quantise`), used, and dropped;
    dx = dy W           in the backward it is made again. Autograd keeps neither, and W gets no gradient

They are the linears inside of layers and companions whose weight requires no gradient. Norms, modulation, biases,
embeddings and head stay as they are, and adapters beside a linear as well. A rank holds all of these matrices, as
FSDP does not know them: what it shards is the rest.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mm_parallel.config import Base, MemoryConfig
from mm_parallel.plan import ParallelPlan
from mm_parallel.quantise import check_device, find_pairs, pack, unpack
from mm_parallel.waiting import HostLayers


class FrozenLinear(nn.Linear):
    """A linear in the dtype of its input, whose matrix is not trained. It has no parameter but its bias.

    The matrix is in no state dict, and does not move with the module while it waits on the host.
    """

    def __init__(self, linear: nn.Linear, base: Base, host: HostLayers | None = None, unit: int = 0) -> None:
        """host, unit: where the matrix waits, and with which layer it comes."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = linear.weight.detach().new_empty(0)  # no parameter: peft asks it for a device and a dtype
        self.train(linear.training)
        self.base: Base = base
        self.outline = torch.empty_like(linear.weight, device="meta", requires_grad=False)
        """The matrix without values: its shape and dtype."""
        self.pairs = find_pairs() if base == "nf4" else None
        self.host, self.unit = host, unit
        self.packed = pack(base, linear.weight.detach())
        """Codes and scales. Empty where they wait on the host."""
        if host is not None:
            self.slots, self.packed = host.put(unit, self.packed), ()

    def fill(self, matrix: Tensor, device: torch.device) -> None:
        """Gives it other values, of any floating dtype; codes are made on the device. One matrix at a time is there."""
        check_device(self.base, device)
        packed = pack(self.base, matrix.to(device).to(self.outline.dtype))
        self.pairs = None if self.pairs is None else find_pairs().to(device)
        if self.host is None:
            self.packed = packed
        else:
            self.host.replace(self.unit, self.slots, packed)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds but its bias."""
        return self.held if self.pairs is None else (*self.held, self.pairs)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Codes and scales where they are, on the device or on the host."""
        return self.packed if self.host is None else self.host.held(self.unit, self.slots)

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(part.float()).all()) for part in self.held[-1:])

    def read(self, dtype: torch.dtype, device: torch.device, again: bool = False) -> Tensor:
        """The matrix. What is returned is overwritten two layers later. again: see `HostLayers.fetch`."""
        packed = self.packed if self.host is None else self.host.fetch(self.unit, device, again)[self.slots]
        return unpack(self.base, packed, self.outline.shape, dtype, self.pairs)

    def forward(self, x: Tensor) -> Tensor:
        return _Multiply.apply(x, self.bias, self, not torch.is_grad_enabled())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base={self.base}{', on the host' if self.host else ''}"

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenLinear":
        super()._apply(fn, recurse)
        self.packed, self.weight = tuple(_move(x, fn) for x in self.packed), _move(self.weight, fn)
        self.pairs = None if self.pairs is None else _move(self.pairs, fn)
        return self


def _move(x: Tensor, fn: Any) -> Tensor:
    """As a module's tensors move; a change of dtype is not for codes."""
    moved = fn(x)
    return moved if moved.dtype == x.dtype else x.to(moved.device)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, linear: FrozenLinear, again: bool) -> Tensor:
        ctx.linear, ctx.bias_dtype = linear, None if bias is None else bias.dtype
        return F.linear(x, linear.read(x.dtype, x.device, again), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_x = grad @ ctx.linear.read(grad.dtype, grad.device) if ctx.needs_input_grad[0] else None
        of_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, None, None


def hold_frozen(model: nn.Module, plan: ParallelPlan, memory: MemoryConfig) -> None:
    """Replaces the frozen linears of layers, where `memory.base` or `memory.host_layers` say how they are held.

    Of a model on the meta device they are filled by `load_parameters`; of another they are packed at once.
    """
    if memory.holds_frozen:
        hold(model, plan, memory.base, memory.host_layers)


def hold(model: nn.Module, plan: ParallelPlan, base: Base, host_layers: int = 0) -> None:
    """The same, whatever they say."""
    host = HostLayers()
    for _, ladder, own in plan.ladders(model):
        numbers, waiting = own.units_in_order(ladder), find_waiting(ladder, own, host_layers)
        in_fp32 = set(own.fp32_parameters(ladder).values())
        for name, unit in own.units_of(ladder).items():
            linears = dict(_find_linears(unit, in_fp32))
            on_host = bool(linears) and numbers[name] in waiting
            number = host.add() if on_host else 0
            for path, linear in linears.items():
                parent, _, child = path.rpartition(".")
                frozen = FrozenLinear(linear, base, host if on_host else None, number)
                setattr(unit.get_submodule(parent), child, frozen)


def find_waiting(ladder: nn.Module, plan: ParallelPlan, host_layers: int) -> set[int]:
    """Numbers of the layers of this part of a ladder whose matrices wait on the host."""
    numbers = plan.units_in_order(ladder)
    here = list(dict.fromkeys(numbers[name] for name in plan.units_of(ladder)))
    return {here[i] for i in spread(host_layers, len(here))}


def find_frozen(model: nn.Module, plan: ParallelPlan) -> dict[str, nn.Linear]:
    """The linears by name that `hold_frozen` would replace."""
    found = {}
    for prefix, ladder, own in plan.ladders(model):
        in_fp32 = set(own.fp32_parameters(ladder).values())
        for name, unit in own.units_of(ladder).items():
            found |= {f"{prefix}{name}.{path}": linear for path, linear in _find_linears(unit, in_fp32)}
    return found


def spread(count: int, layers: int) -> list[int]:
    """So many of the layers (all, if there are fewer), as far from each other as can be."""
    count = min(count, layers)
    return [(2 * i + 1) * layers // (2 * count) for i in range(count)]


def check_frozen(model: nn.Module, plan: ParallelPlan, memory: MemoryConfig, tp: int) -> None:
    """Raise ValueError for what cannot be held so. model: whole; tp: ranks of tensor parallelism."""
    if not memory.holds_frozen:
        return
    asked = {"base": memory.base, "host_layers": memory.host_layers}
    said = " and ".join(f"{name}={value!r}" for name, value in asked.items() if value not in ("dtype", 0))
    if tp > 1:
        raise ValueError(
            f"{said} with tp={tp}: a matrix is cut by rows or by columns over tensor-parallel ranks, and codes with "
            "their scales are not. Use tp=1; dp_shard, cp and pp_layers go together with it"
        )
    layers = len(set(plan.units_in_order(model).values()))
    if memory.host_layers > layers:
        raise ValueError(f"host_layers={memory.host_layers}: the model has {layers} layers, so it can be 0 … {layers}")
    if not find_frozen(model, plan):
        raise ValueError(
            f"{said} is for matrices that are not trained, and in the layers of this model all are: train adapters "
            "(LoRA) or a part of the model, or leave it out"
        )


def frozen_linears(model: nn.Module) -> dict[str, FrozenLinear]:
    """By the name that their weight would have."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


def count_frozen(model: nn.Module) -> int:
    """Bytes of what is held apart, wherever it is."""
    return sum(x.nbytes for linear in frozen_linears(model).values() for x in linear.tensors)


def _find_linears(unit: nn.Module, in_fp32: set[nn.Parameter]) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in unit.named_modules():
        if not path or ".lora_" in path or not isinstance(module, nn.Linear) or isinstance(module, FrozenLinear):
            continue
        if not module.weight.requires_grad and module.weight not in in_fp32:
            yield path, module
