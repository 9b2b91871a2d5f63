"""What crosses from stage to stage, known beforehand: shapes, dtypes, what requires a gradient, static facts."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import BoundArguments
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel import context
from mm_parallel.mesh import parameter_mesh, size
from mm_parallel.meta import MetaMesh
from mm_parallel.plan import Ladder, ParallelPlan

Model = TypeVar("Model", bound=nn.Module)
Stream = TypeVar("Stream", bound=NamedTuple)


@dataclass(frozen=True)
class Outline(Generic[Stream]):
    """Micro-batches of one shape on their way through the pipeline. All tensors are meta.

    entries: the stream that enters each stage; None for the first, which makes its own. Facts are those of one of the
        micro-batches; those of another are facts of what its stem makes (see `begin`).
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
    model will read them. Where tokens are cut, attention has the shape of its queries; the losses of a vocabulary have
    that of the labels.
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
        context.cut(bones, plan, MetaMesh.of(mesh))
        plan.set_seam(bones, plan.core, _attend)
    if plan.vocabulary:
        plan.set_seam(bones, plan.losses, _losses)
    return bones


def _losses(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return x[..., 0].to(torch.promote_types(x.dtype, torch.float32))  # which rows have a label is not known here


def _attend(q: Tensor, k: Tensor, v: Tensor, sequence: Any, mask: Tensor | None = None) -> Tensor:
    return q + (k.sum() + v.sum())


def begin(skeleton: Model, plan: ParallelPlan, call: BoundArguments) -> Any:
    """What the stem makes of a call: the facts, the shapes and dtypes of the stream. Flags of gradients are not right.

    Milliseconds, as the layers of inner ladders are not run: none changes any of this.
    """
    inner = [ladder for prefix, ladder, _ in plan.ladders(skeleton) if prefix]
    for ladder in inner:
        ladder.layer = _hand_on
    try:
        with torch.no_grad():
            stream = _stem(skeleton, call)
    finally:
        for ladder in inner:
            del ladder.layer
    return type(stream)(*map(_outline, stream))


def trace(skeleton: Ladder, starts: Sequence[int], call: BoundArguments) -> list[Any]:
    """The stream that enters each stage, but for the first: runs all layers once, up to a second for a large model.

    starts: the first layer of every stage. Dtypes and flags of gradients are those of any call with the same arguments.
    Raises ValueError for a layer that changes shapes or facts.
    """
    entries = []
    with torch.enable_grad():  # so that flags are those of a training step
        stream = _stem(skeleton, call)
        given = _facts(stream)
        for i in range(len(skeleton.layers)):
            if i in starts[1:]:
                stream = type(stream)(*map(_outline, stream))
                entries.append(stream)
            stream = skeleton.layer(i, stream)
            if (made := _facts(stream)) != given:
                raise ValueError(
                    f"layer {i} made of the stream {made} of {given}: only the stem makes shapes and facts"
                )
    return entries


def shape(skeleton: Ladder, entries: Sequence[Any], begun: Any) -> Outline:
    """The outline of what the stem made (see `begin`), after the entries of another call with the same arguments."""
    shaped = [type(entry)(*map(_resize, entry, begun)) for entry in entries]
    with torch.no_grad():
        return Outline((None, *shaped), _outline(skeleton.head(shaped[-1])))


def _resize(value: Any, like: Any) -> Any:
    if not isinstance(value, Tensor):
        return like
    return torch.empty_like(like, dtype=value.dtype, requires_grad=value.requires_grad)


def _stem(skeleton: Ladder, call: BoundArguments) -> Any:
    return skeleton.stem(*map(_meta, call.args), **{name: _meta(value) for name, value in call.kwargs.items()})


def _hand_on(i: int, stream: Stream) -> Stream:
    return stream


def _facts(stream: Stream) -> dict[str, Any]:
    fields = stream._asdict().items()
    return {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in fields}


def describe_shapes(stream: Stream) -> str:
    """Shapes and dtypes of what travels, by name."""
    fields = stream._asdict().items()
    return ", ".join(f"{name} {describe(value)}" for name, value in fields if isinstance(value, Tensor))


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


def fill(facts: Stream, tensors: Sequence[Tensor]) -> Stream:
    """The stream of these tensors, with the facts of what the stem makes of its micro-batch."""
    left = iter(tensors)
    return type(facts)(*(next(left) if isinstance(value, Tensor) else value for value in facts))


def check(stage: int, stream: Stream, outline: Stream, facts: Stream) -> None:
    """Raises ValueError where a stream is not what the next stage has made room for: that would kill the process."""
    for name, value, expected in zip(stream._fields, stream, fill(facts, tensors_of(outline)), strict=True):
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
