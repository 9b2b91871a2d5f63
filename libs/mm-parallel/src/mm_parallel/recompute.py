"""Forgetting a rung's activations in the forward and computing them again in the backward."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from mm_parallel.config import MemoryConfig
from mm_parallel.plan import ParallelPlan


def recompute(model: nn.Module, plan: ParallelPlan, memory: MemoryConfig) -> None:
    """Recomputes all rungs ("full"), the first n (an int), or none. Gradients stay the same, bit for bit.

    A rung keeps its module and thereby its parameter names: only its `forward` is replaced on the instance. Raises
    ValueError for another word or for a number of rungs that the model does not have.
    """
    rungs = memory.recompute
    ladder = list(plan.rungs_of(model).values())
    if rungs == "none":
        return
    if rungs == "full":
        rungs = len(ladder)
    if not isinstance(rungs, int) or not 0 <= rungs <= len(ladder):
        raise ValueError(f'recompute={rungs!r}: give "none", "full", or how many of the {len(ladder)} rungs (0 … n)')
    for rung in ladder[:rungs]:
        rung.forward = partial(checkpoint, rung.forward, use_reentrant=False)
