"""Forward and backward of the micro-batches of one optimizer step, the same for a model and for a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from mm_parallel.pipeline import Pipeline


def forward_backward(
    run: nn.Module | Pipeline,
    count: int,
    inputs: Callable[[int], Mapping[str, Any]],
    loss: Callable[[Tensor, int], Tensor],
) -> list[Tensor]:
    """Adds the gradient of the mean loss over `count` micro-batches to the gradients that are there.

    Args:
        count: the same on all ranks, or they wait for each other for ever.
        inputs: number of a micro-batch -> what the model is called with, by name. Asked for when it is needed.
        loss: (output, number) -> losses, of any shape; their mean is what counts.

    Returns the losses, detached; of a pipeline only on ranks of its last stage, elsewhere [].
    """
    if not isinstance(run, nn.Module):
        return run.step(count, inputs, loss)
    losses = []
    for number in range(count):
        losses.append(loss(run(**inputs(number)), number))
        (losses[-1].mean() / count).backward()
        losses[-1] = losses[-1].detach()
    return losses
