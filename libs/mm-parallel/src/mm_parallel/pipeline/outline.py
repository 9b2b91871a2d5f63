"""What crosses from stage to stage, known beforehand: shapes, dtypes, what requires a gradient, static facts."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import BoundArguments
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel import context
from mm_parallel.mesh import parameter_mesh, size
from mm_parallel.plan import Ladder, ParallelPlan

Model = TypeVar("Model", bound=nn.Module)
Stream = TypeVar("Stream", bound=NamedTuple)


@dataclass(frozen=True)
class Outline(Generic[Stream]):
    """One shape of input on its way through the pipeline. All tensors are meta.

    entries: the stream that enters each stage; None for the first, which makes its own.
    output: what the head returns.
    """

    entries: tuple[Stream | None, ...]
    output: Tensor


def skeleton(
    model: Model,
    plan: ParallelPlan,
    mesh: DeviceMesh,
    dtype: torch.dtype | None,
    trained: bool,
) -> Model:
    """A copy of the whole model on the meta device, to be asked for shapes, dtypes and what requires a gradient.

    It takes no memory. It splits and gathers tokens as the model will, and has its weights in the dtype in which the
    model will read them; attention stays the model's own, because it has the same shapes and needs no other rank. It is
    given no mask, as that is of the whole sequence.
    trained: every weight is trained, whatever is frozen in the model.
    """
    twins = {}  # deepcopy takes what is here for copies that it has made
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        twins[id(parameter)] = nn.Parameter(meta, requires_grad=trained or parameter.requires_grad)
    for buffer in model.buffers():
        twins[id(buffer)] = torch.empty_like(buffer, device="meta")
    bones = copy.deepcopy(model, twins)
    if dtype is not None and parameter_mesh(mesh).size() > 1:
        in_fp32 = {p for _, ladder, own in plan.ladders(bones) for p in own.fp32_parameters(ladder).values()}
        for parameter in bones.parameters():
            if parameter not in in_fp32 and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if size(mesh, "cp") > 1:
        seams = []
        for _, ladder, own in plan.ladders(bones):
            owner, _, core = own.core.rpartition(".")
            seams.append((ladder.get_submodule(owner), core, getattr(ladder.get_submodule(owner), core)))
        context.cut(bones, plan, mesh)
        for owner, core, attention in seams:
            setattr(owner, core, partial(_attend_all, attention))
    return bones


def _attend_all(
    attention: Callable, q: Tensor, k: Tensor, v: Tensor, sequence: Any, mask: Tensor | None = None
) -> Tensor:
    return attention(q, k, v, sequence)


def trace(skeleton: Ladder, starts: Sequence[int], call: BoundArguments) -> Outline:
    """Runs the skeleton once. starts: the first layer of every stage."""
    args = [_meta(value) for value in call.args]
    kwargs = {name: _meta(value) for name, value in call.kwargs.items()}
    with torch.enable_grad():  # so that flags are those of a training step
        stream = skeleton.stem(*args, **kwargs)
        entries = [None]
        for i in range(len(skeleton.layers)):
            if i in starts[1:]:
                stream = type(stream)(*map(_outline, stream))
                entries.append(stream)
            stream = skeleton.layer(i, stream)
        return Outline(tuple(entries), _outline(skeleton.head(stream)))


def track(stream: Stream, outline: Stream) -> Stream:
    """The same values, requiring a gradient where the outline does."""
    return type(stream)(
        *(
            value.detach().requires_grad_()
            if isinstance(value, Tensor) and value.requires_grad < wanted.requires_grad
            else value
            for value, wanted in zip(stream, outline, strict=True)
        )
    )


def tensors_of(stream: Stream) -> tuple[Tensor, ...]:
    """What travels over the wire."""
    return tuple(value for value in stream if isinstance(value, Tensor))


def fill(outline: Stream, tensors: Sequence[Tensor]) -> Stream:
    """The stream of these tensors, with the outline's facts."""
    left = iter(tensors)
    return type(outline)(*(next(left) if isinstance(value, Tensor) else value for value in outline))


def check(stage: int, stream: Stream, outline: Stream) -> None:
    """Raises ValueError where a stream is not what the next stage has made room for: that would kill the process."""
    for name, value, expected in zip(stream._fields, stream, outline, strict=True):
        found, wanted = describe(value, torch.is_grad_enabled()), describe(expected, torch.is_grad_enabled())
        if found != wanted:
            raise ValueError(
                f"pipeline stage {stage}: {name} of the stream is {found}, but was {wanted} on the meta device. Stem "
                "and layers must do the same there, and what is trained must not change after Pipeline was made"
            )


def describe(value: Any, with_gradient: bool = False) -> str:
    """A tensor's shape and dtype, and whether it requires a gradient; anything else as it is."""
    if not isinstance(value, Tensor):
        return repr(value)
    shape = "x".join(map(str, value.shape)) or "scalar"
    trained = " that requires a gradient" if with_gradient and value.requires_grad else ""
    return f"{shape} {str(value.dtype).removeprefix('torch.')}{trained}"


def describe_call(call: BoundArguments) -> str:
    """Shapes and dtypes of what a model is called with, by name."""
    return ", ".join(f"{name} {describe(value)}" for name, value in call.arguments.items())


def _meta(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def _outline(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta", requires_grad=value.requires_grad)
