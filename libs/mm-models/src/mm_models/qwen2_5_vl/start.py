"""What a Qwen2.5-VL begins with: one rule for each parameter name, as its makers' configurations say.

A parameter depends on (seed, name) alone, so every rank can draw its own part of a model that fits on none of them.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from mm_models.initial import generator
from mm_models.qwen2_5_vl.config import Qwen25VLConfig

ZERO: tuple[str, ...] = ()
"""Patterns of the projections that begin at zero: none."""
GROWN = ""
"""Nothing of it grows on other weights."""
STD = 0.02  # `initializer_range` of every published config.json


def initial(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The starting value of one parameter: float32, on the CPU. Matrices N(0, 0.02), norms one, biases zero."""
    weight = torch.empty(tuple(shape), device="cpu")
    if name.endswith(".bias"):
        return weight.zero_()
    if weight.ndim == 1:  # the weight of a norm
        return weight.fill_(1)
    return weight.normal_(0, STD, generator=generator(seed, name))


def missing(names: Collection[str], there: Collection[str]) -> set[str]:
    """Of a model's parameters, those that can grow from the ones that are there: none."""
    return set()


def grow(config: Qwen25VLConfig, base: Callable[[str], Tensor], name: str, shape: Sequence[int]) -> Tensor:
    """Nothing grows, so nobody asks."""
    raise AssertionError(f"{name}: nothing of a Qwen2.5-VL grows on other weights")
