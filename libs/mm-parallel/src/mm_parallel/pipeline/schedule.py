"""torch's pipeline schedules, for one shape of input and one number of micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

from mm_parallel.pipeline.chunk import Chunk, Inputs
from mm_parallel.pipeline.outline import Outline, tensors_of
from mm_parallel.pipeline.stage import TorchStage


def check_count(count: int, ranks: int, virtual: int, zero_bubble: bool) -> None:
    """Raises ValueError for a number of micro-batches that the schedule cannot do."""
    if virtual == 1 and not zero_bubble:
        return
    if not _fits(count, ranks):
        less = next(n for n in range(count - 1, 0, -1) if _fits(n, ranks))
        more = next(n for n in range(count + 1, count + ranks + 1) if _fits(n, ranks))
        raise ValueError(
            f"{count} micro-batches cannot go in {count // ranks} equal rounds of at least {ranks} (pipeline ranks) "
            f"through virtual stages or without bubble: use {less} or {more}, or any multiple of {ranks}"
        )


def _fits(count: int, ranks: int) -> bool:
    return count % max(1, count // ranks) == 0


class Schedule:
    """Steps of `count` micro-batches of one shape."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        outline: Outline,
        count: int,
        zero_bubble: bool,
        reshard: bool,
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:
        self.chunks, self.count, self.zero_bubble, self.reshard = chunks, count, zero_bubble, reshard
        self.losses: Callable[[Tensor, int], Tensor] | None = None  # this and the share are set for every step
        self.share = 1.0
        self.found: list[Tensor] = []
        self.is_first, self.is_last = chunks[0].stage.is_first, chunks[-1].stage.is_last
        # torch is told all shapes, or it would run the first step twice to find out. It cuts what it is given into
        # micro-batches; ours are made elsewhere, so it is given their numbers.
        numbers = torch.empty(1, dtype=torch.int64, device="meta")
        stages = []
        for chunk in chunks:
            entry, index = outline.entries[chunk.stage.index], chunk.stage.index
            following = outline.output if chunk.stage.is_last else tensors_of(outline.entries[index + 1])
            entering = numbers if entry is None else tensors_of(entry)
            stages.append(_Numbered(chunk, index, chunk.stage.count, device, entering, following, group=group))
        self.torch = _make(stages, count, zero_bubble, self._loss)

    def step(
        self, inputs: Inputs, facts: Sequence[Any], losses: Callable[[Tensor, int], Tensor], share: float
    ) -> list[Tensor]:
        """Forward and backward of all micro-batches; the losses, detached, on the rank of the last stage."""
        self.losses, self.share, self.found = losses, share, []
        for chunk in self.chunks:
            chunk.inputs, chunk.facts = inputs, facts
        numbers = torch.arange(self.count)
        target: dict[str, Any] = {"target": numbers} if self.is_last else {}
        try:
            with _keep_gathered(self.chunks[0].model, self.reshard) if self.zero_bubble else nullcontext():
                self.torch.step(*([numbers] if self.is_first else []), **target, return_outputs=False)
            return self.found
        except RuntimeError as error:  # torch's, around whatever went wrong in a stage: that is what matters
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None
        finally:  # what the two hold, say a batch
            self.losses, self.found = None, []
            for chunk in self.chunks:
                chunk.inputs, chunk.facts = None, ()

    def _loss(self, output: Tensor, number: Tensor) -> Tensor:
        losses = self.losses(output, int(number))
        self.found.append(losses.detach().clone())
        return losses.sum() / self.share


class _Numbered(TorchStage):
    """Tells its chunk which micro-batch comes, as torch tells the stage alone."""

    def forward_one_chunk(self, number: int, *args: Any, **named: Any) -> Any:
        self.submod.number = number
        return super().forward_one_chunk(number, *args, **named)


def _make(stages: list[_Numbered], count: int, zero_bubble: bool, loss: Callable) -> Any:
    if zero_bubble:
        return ScheduleInterleavedZeroBubble(stages, count, loss, scale_grads=False)
    if len(stages) > 1:
        return ScheduleInterleaved1F1B(stages, count, loss, scale_grads=False)
    few = count < stages[0].num_stages  # 1F1B refuses these, and would do the same
    return (ScheduleGPipe if few else Schedule1F1B)(stages[0], count, loss, scale_grads=False)


@contextmanager
def _keep_gathered(model: nn.Module, reshard: bool) -> Iterator[None]:
    """With the weights of FSDP whole, and gradients reduced once at the end.

    The half of a backward that makes the weights' gradients runs no hooks of FSDP, and must find whole weights.
    reshard: what FSDP was told of forwards, see `MemoryConfig`.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def keep(gathered: bool) -> None:
        model.set_requires_gradient_sync(not gathered)
        model.set_reshard_after_backward(not gathered)
        for part in parts:
            part.set_reshard_after_forward(reshard and not gathered, recurse=False)

    model(_Nothing())  # FSDP finds its root in the first forward
    keep(True)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        keep(False)
    nothing = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)
    model(_Nothing(), nothing).backward()  # after any backward through the root, FSDP reduces what is left to reduce


class _Nothing:
    """In place of a chunk."""

    def run(self, *tensors: Tensor) -> Tensor | None:
        return tensors[0] * 1 if tensors else None
