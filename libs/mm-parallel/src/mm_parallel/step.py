"""Forward and backward of the micro-batches of one optimizer step, the same for a model and for a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.mesh import data_rank

if TYPE_CHECKING:
    from mm_parallel.pipeline import Pipeline


def forward_backward(
    run: nn.Module | Pipeline,
    count: int,
    inputs: Callable[[int], Mapping[str, Any]],
    losses: Callable[[Tensor, int], Tensor],
    total: float,
    mesh: DeviceMesh | None = None,
    outlines: Callable[[int], Mapping[str, Any]] | None = None,
) -> list[Tensor]:
    """Adds the gradient of `count` micro-batches to the gradients that are there, by the rule in `mm_parallel.grads`.

    Args:
        count: the same on all ranks, or they wait for each other for ever.
        inputs: number of a micro-batch -> what the model is called with, by name. Asked for when it is needed.
        losses: (output, number) -> losses, each times its weight, of any shape; their sum is what counts.
        total: the weight of the whole step, over all ranks and micro-batches; the same on all ranks.
        mesh: says how many ranks have samples of their own; None for one rank.
        outlines: for a pipeline whose micro-batches differ, see `Pipeline.step`. Not asked without one.

    Returns the losses, detached; of a pipeline only on ranks of its last stage, elsewhere []. Raises ValueError for a
    total that is not above 0.
    """
    if not total > 0:
        raise ValueError(f"the losses of this step weigh {total} together, so nothing can be learned from it")
    share = total / data_rank(mesh)[1]
    if not isinstance(run, nn.Module):
        return run.step(count, inputs, losses, share, outlines)
    found = []
    for number in range(count):
        found.append(losses(run(**inputs(number)), number))
        (found[-1].sum() / share).backward()
        found[-1] = found[-1].detach()
    return found
