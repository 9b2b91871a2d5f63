"""Bytes on each pipeline rank in a step of training, and when most of them are there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.estimate.units import Units, UnitTrace
from mm_parallel.plan import ParallelPlan


@dataclass(frozen=True)
class UnitMemory:
    """One unit of a pipeline rank: stem, layer (with its companions) or head. Bytes of one micro-batch."""

    name: str
    word: str
    """What it recomputes: none, full or but_attention."""
    weights: int
    """Bytes of its parameters when gathered, as this rank's tensor-parallel part of them."""
    trace: UnitTrace


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank, the fullest of those that share its stages.

    Parameters to average are exact; saved, stream, head and host are counted; gathered and transient are modelled of
    what is counted. With `offload_params` the first three are on the host.
    """

    rank: int
    """Pipeline rank; 0 without a pipeline."""
    parameters: int
    gradients: int
    moments: int
    average: int
    """Of an EMA."""
    gathered: int
    """Weights that FSDP has whole at the peak, their gradients before they are reduced, and buffers of both."""
    saved: int
    """Activations of all layers and micro-batches that wait for their backward, when these are most."""
    stream: int
    """What the stem makes for all layers, of the same micro-batches; what a pipeline sends and receives."""
    head: int
    """Logits and loss: most bytes that head, loss and their backward make."""
    transient: int
    """At the peak, what a unit needs while it runs, or the optimizer."""
    host: int
    """On the host: what offload puts there, and `offload_params`."""
    peak: int
    """Most bytes on the device at one time."""
    moment: str
    """When that is, in words: "backward of blocks.39"."""
    in_flight: int
    """Micro-batches that wait for their backward at one time."""
    layers: tuple[UnitMemory, ...]


def estimate_memory(
    model: nn.Module,
    plan: ParallelPlan,
    layout: ParallelConfig,
    memory: MemoryConfig,
    dtype: torch.dtype | None,
    example: Mapping[str, Any],
    *,
    micro_batches: int = 1,
    average: bool = False,
    optimizer: Literal["fused", "foreach"] = "fused",
    losses: Callable[[Tensor], Tensor] | None = None,
    units: Units | None = None,
) -> tuple[RankMemory, ...]:
    """Bytes of a step of training on each pipeline rank. No process group, no values, no device.

    model: whole, on the meta device, with adapters and `requires_grad`; it is not changed. layout: resolved.
    dtype: of the computation. example, losses: see `Units`. micro_batches: of one data rank in a step. average: whether
    there is an EMA of what is trained. units: the same model's, from another call: what it has run is not run again.

    Raises ValueError for what `parallelize` and `Pipeline` would refuse.
    """
    raise NotImplementedError
