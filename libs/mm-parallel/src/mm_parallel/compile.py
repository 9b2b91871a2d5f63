"""Compiling each layer by itself: what is between matrix products and attention becomes few kernels.

A layer keeps its module: only its `forward` is replaced on the instance, below FSDP's hooks and below recompute. All
layers of a class share one compiled code.
"""

from functools import partial

import torch
from torch import nn

from mm_parallel.plan import ParallelPlan


def compile_layers(model: nn.Module, plan: ParallelPlan, backend: str = "inductor") -> None:
    """Makes layers and their companions compile at their first call. Names of parameters stay."""
    compiled = {}
    for _, ladder, own in plan.ladders(model):
        for unit in own.units_of(ladder).values():
            kind = type(unit)
            if kind not in compiled:
                compiled[kind] = torch.compile(kind.forward, backend=backend)
            unit.forward = partial(compiled[kind], unit)
