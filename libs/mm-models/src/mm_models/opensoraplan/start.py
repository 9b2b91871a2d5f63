"""What an Open-Sora-Plan begins with: one rule for each parameter name, as its authors published.

A parameter depends on (seed, name) alone, so every rank can draw its own part of a model that fits on none of them.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from mm_models.initial import generator
from mm_models.opensoraplan.config import OpenSoraPlanConfig

ZERO: tuple[str, ...] = ()
"""Patterns of the projections that begin at zero: none, all modulation begins small and no layer silent."""
GROWN = ""
"""Nothing of it grows on other weights."""


def initial(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The starting value of one parameter: float32, on the CPU.

    As the makers' class leaves it: linears and the patch embedding are torch's own, uniform in ±1/√(inputs); modulation
    tables N(0, 1)/√dim. Biases are zero, where torch's own are drawn in the same range.
    """
    random = generator(seed, name)
    weight = torch.empty(tuple(shape), device="cpu")
    if name.endswith(".bias"):
        return weight.zero_()
    if name.endswith("scale_shift_table"):
        return weight.normal_(0, weight.shape[-1] ** -0.5, generator=random)
    most = weight[0].numel() ** -0.5
    return weight.uniform_(-most, most, generator=random)


def missing(names: Collection[str], there: Collection[str]) -> set[str]:
    """Of a model's parameters, those that can grow from the ones that are there: none."""
    return set()


def grow(config: OpenSoraPlanConfig, base: Callable[[str], Tensor], name: str, shape: Sequence[int]) -> Tensor:
    """Nothing grows, so nobody asks."""
    raise AssertionError(f"{name}: nothing of an Open-Sora-Plan grows on other weights")
