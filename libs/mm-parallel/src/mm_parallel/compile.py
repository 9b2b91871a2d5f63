"""Compiling each layer by itself: what lies between matrix products and attention becomes few kernels.

    FSDP's hooks, recompute     as without; they call a layer's forward
    ── compiled ──────────────────────────────────────────────────────────
    norm, q, k, v, rope  │  core, as without  │  output, feed-forward, …

A layer keeps its module: only its `forward` is replaced on the instance. What a layer is handed to call (`core`, so all
that communicates over context ranks, and what packed samples, masks and kinds of attention need) runs outside of the
compiled code, as without. It begins and ends in matrix products, so no kernel that could be one becomes two.

All layers of a class share one compiled code. It is compiled once for the first sizes that come, and once more, for
all sizes, when others come; each again for what changes the code: without gradients, parameters that are frozen, a
size that is 0 or 1. So the number of codes does not grow with the number of layers or of shapes; where it still does,
above `MOST_CODES`, an error says so, where torch would go on without compiling.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mm_parallel.frozen import frozen_linears
from mm_parallel.plan import ParallelPlan

MOST_CODES = 24
"""For each piece of a class of layers."""


def compile_layers(model: nn.Module, plan: ParallelPlan, backend: str = "inductor") -> None:
    """Makes layers and their companions compile when they are first called. Loss and gradients are as without, up to
    rounding.

    Dropout draws as without. The first call of a layer takes seconds, and that of a new kind of shape.
    backend: of torch.compile; "aot_eager" runs the traced operations one by one, for tests.
    """
    options = {"fallback_random": True} if backend == "inductor" else None
    compiled: dict[type, Callable] = {}
    for _, ladder, own in plan.ladders(model):
        for unit in own.units_of(ladder).values():
            kind = type(unit)
            if kind not in compiled:
                compiled[kind] = torch.compile(kind.forward, backend=backend, options=options)
            unit.forward = Compiled(compiled[kind], unit)
            for frozen in frozen_linears(unit).values():  # the compiler would keep matrices that are made of codes
                frozen.forward = Outside(frozen.forward)


def check_compiler(device_type: str) -> str:
    """What compiles for such a device, by name. Raises ValueError where there is no compiler, no Triton, or where a
    variable of the environment tells torch not to compile.
    """
    for switch in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(switch) == "1":
            raise ValueError(
                f"compile, but {switch}=1 is in the environment, with which torch silently compiles nothing: unset it, "
                "or leave compile out"
            )
    if device_type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            return get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(
                "compile needs a C++ compiler for the CPU, and there is none: install g++ (or name one in the variable "
                "CXX), or leave compile out"
            ) from error
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError("compile needs Triton for CUDA, and it is not here: install triton, or leave compile out")
        if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
            raise ValueError(
                "compile needs a C compiler, with which Triton builds what starts its kernels, and there is none: "
                "install gcc (or name one in the variable CC), or leave compile out"
            )
        return "Triton"
    raise ValueError(f"compile works on CUDA and on the CPU, this is {device_type}: leave compile out")


def count_graphs() -> int:
    """How many graphs this process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Compiled:
    """Stands for a layer's forward. An object and no closure, so that a deep copy of the model calls its own layer."""

    def __init__(self, forward: Callable, unit: nn.Module) -> None:
        self.forward, self.unit = forward, unit

    def __call__(self, *args: Any, **named: Any) -> Any:
        _limit_codes()
        return self.forward(self.unit, *map(_hand, args), **{name: _hand(value) for name, value in named.items()})


def _limit_codes() -> None:
    """Makes a code too many an error, where torch would go on without compiling.

    Torch has these settings for each thread, and a backward on CUDA, which recomputes layers, is in another thread.
    """
    settings = torch._dynamo.config
    if not settings.fail_on_recompile_limit_hit:
        settings.fail_on_recompile_limit_hit = True
        settings.recompile_limit = MOST_CODES


class Outside:
    """What a layer is handed to call."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    @torch.compiler.disable
    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.function(*args, **named)


def _hand(value: Any) -> Any:
    """An argument as compiled code should get it."""
    if isinstance(value, Tensor):
        return _whole(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a stream
        return value._replace(**{name: _whole(x) for name, x in value._asdict().items() if isinstance(x, Tensor)})
    return Outside(value) if callable(value) else value


def _whole(x: Tensor) -> Tensor:
    """The same tensor, but a view of nothing: else there would be a code for each way in which it was cut out."""
    return _Whole.apply(x) if x.requires_grad and torch.is_grad_enabled() else x.detach()


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad
