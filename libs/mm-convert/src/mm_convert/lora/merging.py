"""Adapters added to the weights that they stand beside."""

from __future__ import annotations

from collections.abc import Mapping

from mm_convert.lora.adapter import Adapter, LowRank
from mm_convert.lora.names import join_first
from mm_convert.tensors.views import FP8, Computed, LazyTensor

_FLOATS = ("F16", "BF16", "F32", "F64")


def merge(tensors: Mapping[str, LazyTensor], adapter: Adapter) -> dict[str, LazyTensor]:
    """A base, by our names, with the adapter in it; every weight keeps its shape and dtype. Needs torch.

    Sums are in float32 (for a float64 weight in float64), rounded once. Rows are computed when they are asked for.
    Raises ValueError when the base lacks a module, or has it in another shape.
    """
    problems, unfit, factors = [], [], []
    for name, module in adapter.modules.items():
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            problems.append(f"{name}, which the base has not")
        elif weight.shape != module.shape:
            problems.append(f"{name} for {list(module.shape)}, which in the base is {list(weight.shape)}")
        elif odd := {module.a.dtype, module.b.dtype} - {*_FLOATS, *FP8}:
            factors.append(f"{name} in {odd.pop()}")
        elif weight.dtype not in _FLOATS:
            unfit.append(f"{name} in {weight.dtype}")
    for name, difference in adapter.differences.tensors.items():
        weight = tensors.get(name)
        if weight is None:
            problems.append(f"{name}, which the base has not")
        elif weight.shape != difference.shape:
            problems.append(f"{name} for {list(difference.shape)}, which in the base is {list(weight.shape)}")
        elif difference.dtype not in (*_FLOATS, *FP8):
            factors.append(f"{name} in {difference.dtype}")
        elif weight.dtype not in _FLOATS:
            unfit.append(f"{name} in {weight.dtype}")
    if problems:
        raise ValueError(f"this adapter is not for this base: it has {join_first(problems)}")
    if factors:
        raise ValueError(
            f"this adapter is quantised: it has {join_first(factors)}. Save it as floating point with the tool that "
            "trained it"
        )
    if unfit:
        raise ValueError(
            f"this base cannot take an adapter as it is: it has {join_first(unfit)}, where sums need one of "
            f"{', '.join(_FLOATS)}. Rounded to fp8, most of what the adapter changes would be lost: give --dtype "
            "bfloat16, for a merged model in that"
        )
    adapted = {f"{name}.weight": module for name, module in adapter.modules.items()}
    whole = adapter.differences.tensors
    touched = {*adapted, *whole}
    return {
        name: _merge_one(weight, adapted.get(name), whole.get(name)) if name in touched else weight
        for name, weight in tensors.items()
    }


def _merge_one(weight: LazyTensor, module: LowRank | None, difference: LazyTensor | None) -> LazyTensor:
    from mm_convert.tensors.torch import DTYPES, bytes_of, rows_of, torch

    dtype = torch.float64 if weight.dtype == "F64" else torch.float32

    def compute(start: int, stop: int) -> memoryview:
        w = rows_of(weight, start, stop).to(dtype)
        if module is not None:
            b = rows_of(module.b, start, stop).to(dtype).flatten(1)
            a = rows_of(module.a, 0, module.rank).to(dtype).flatten(1)
            w.flatten(1).addmm_(b, a, alpha=module.alpha / module.rank)
        if difference is not None:
            w += rows_of(difference, start, stop).to(dtype)
        return bytes_of(w.to(DTYPES[weight.dtype]))

    return Computed(weight.dtype, weight.shape, compute)
