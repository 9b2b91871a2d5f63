"""One run of every kind of unit on the meta device: what it keeps, what it needs while it runs, which kernels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.plan import ParallelPlan


@dataclass(frozen=True)
class UnitTrace:
    """One micro-batch through one unit (the stem, a layer with its companions, the head with the loss), on the fullest
    rank of its stage. All bytes are counted, by storage; parameters are in none of them.
    """

    saved: int
    """Bytes that live from the forward to the backward: what autograd and recompute hold, not what the stem made for
    all layers.
    """
    host: int
    """Of what the unit keeps, bytes that offload puts on the host; not in `saved`."""
    output: int
    """Bytes of what it hands on to the next unit."""
    forward: int
    """Most bytes that the forward makes and that live at one time, the saved ones and the output among them."""
    backward: int
    """Most bytes that the backward makes and that live at one time, recomputed ones and gradients of parameters among
    them, the saved ones not.
    """
    forward_kernels: tuple[Any, ...] = ()
    """`mm_parallel.estimate.kernels.Kernel` of one forward."""
    backward_kernels: tuple[Any, ...] = ()
    """Of one backward, with what recompute runs again."""


class Units:
    """The kinds of units of a model, each run once for every way of cutting that is asked for; kept.

    model: whole, on the meta device, with adapters and `requires_grad`; it is not changed.
    dtype: of the computation; None: as parameters are.
    example: arguments of the model for one micro-batch of one data rank; tensors on the meta device, facts as they are.
    losses: output -> losses of any shape, as the training has them. None: half of the squares of the output in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ParallelPlan,
        dtype: torch.dtype | None,
        example: Mapping[str, Any],
        losses: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.plan, self.dtype, self.example, self.losses = model, plan, dtype, example, losses

    def trace(self, layout: ParallelConfig, memory: MemoryConfig) -> dict[str, UnitTrace]:
        """By name: "stem", every layer's module name (with its companions), "head", and those of inner ladders with
        their prefix ("visual.stem", "visual.blocks.0", …, "visual.head"). `layout`: resolved; its stages do not matter.
        """
        raise NotImplementedError
