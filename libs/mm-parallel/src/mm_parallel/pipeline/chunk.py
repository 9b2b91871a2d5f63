"""What one stage computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import BoundArguments
from typing import Any

from torch import Tensor, nn

from mm_parallel.pipeline.outline import Outline, check, fill, tensors_of, track

Inputs = Callable[[int], BoundArguments]
"""Number of a micro-batch -> what the model is called with."""


@dataclass(frozen=True)
class Stage:
    """Which part of the model it is: `layers` of it, the stem before the first, the head after the last."""

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


class Chunk(nn.Module):
    """One stage, for one shape of what travels. The first is called with a micro-batch's number, others with tensors.

    The model is called, not a part of it: so FSDP's hooks on the root run, whatever stage it is (see `call`). It is no
    submodule of the chunk: preparing a schedule, torch drops the gradients of every FSDP module that it finds in a
    stage, also those of steps before, in another shape.

    tracked: for a schedule that splits the backward. It finds a stage's weights by their way to the stage's inputs, so
    the first stage (which is not split) hands on what is frozen as though it were not.
    """

    def __init__(self, stage: Stage, model: nn.Module, outline: Outline, tracked: bool) -> None:
        super().__init__()
        self.stage, self.outline, self.tracked = stage, outline, tracked
        self.__dict__["model"] = model
        # These are set for every step,
        self.inputs: Inputs | None = None
        self.facts: Sequence[Any] = ()  # what the stem makes of each micro-batch, see `begin`
        self.number = 0  # and this before every call: which micro-batch it is

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not self.stage.is_first:
            return self.model(self, *map(_receive, tensors))
        batch = self.inputs(self.number)
        return self.model(self, *batch.args, **batch.kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The part of the model's forward that is this stage's."""
        model, stage, facts = self.model, self.stage, self.facts[self.number]
        stream = model.stem(*args, **kwargs) if stage.is_first else fill(facts, args)
        for i in stage.layers:
            stream = model.layer(i, stream)
        if stage.is_last:
            return model.head(stream)
        following = self.outline.entries[stage.index + 1]
        if stage.is_first and self.tracked:
            stream = track(stream, following)
        check(stage.index, stream, following, facts)
        return tuple(_prepare_to_send(tensor, self.tracked) for tensor in tensors_of(stream))


def call(chunk: Chunk, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    """Takes the place of the model's forward."""
    return chunk.run(*args, **kwargs)


def _receive(tensor: Tensor) -> Tensor:
    """Its gradient will be sent, and only what is contiguous can be."""
    if tensor.requires_grad:
        tensor = tensor.view_as(tensor)  # a hook on the receive buffer itself would stay there
        tensor.register_hook(Tensor.contiguous)
    return tensor


def _prepare_to_send(tensor: Tensor, detached: bool) -> Tensor:
    """Contiguous, as only that can be sent. detached: torch will detach it in place, which a view does not allow."""
    tensor = tensor.contiguous()
    return tensor.clone() if detached and tensor._base is not None else tensor
