"""torch's pipeline stage, where not all that travels has a gradient.

A stream also has what nobody trains through: places, masks, labels. A stage of torch 2.13 knows of each tensor whether
it requires a gradient. In earlier releases a stage lets everything that comes require one, which an integer cannot,
and waits for the gradient of all that it has sent. `_Selective` teaches them the difference; the same travels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import (
    _get_grad_fn_or_grad_acc,
    stage_backward_input,
    stage_backward_weight,
)


class _Selective(PipelineStage):
    """Asks the tensors on the meta device, which it was made with, what requires a gradient."""

    def _prepare_forward_infra(self, *args: Any, **named: Any) -> Any:
        trains, self.has_backward = self.has_backward, False  # so that receive buffers are left as they are
        try:
            outputs = super()._prepare_forward_infra(*args, **named)
        finally:
            self.has_backward = trains
        for infos in () if self.is_first else self.args_recv_info.values():
            for info, meta in zip(infos, self.inputs_meta, strict=True):
                info.buffer.requires_grad_(trains and meta.requires_grad)
        return outputs

    def _create_grad_send_info(self, *args: Any) -> list[int | None]:
        sources = super()._create_grad_send_info(*args)
        return [source if meta.requires_grad else None for source, meta in zip(sources, self.inputs_meta, strict=True)]

    def _create_grad_recv_info(self, *args: Any) -> tuple:
        infos = super()._create_grad_recv_info(*args)  # of the last stage: none
        return tuple(info if meta.requires_grad else None for info, meta in zip(infos, self.get_outputs_meta()))  # noqa: B905

    def _map_tensor_from_recv_info(self, infos: tuple) -> tuple:
        return tuple(None if info is None else info.buffer for info in infos)

    def _validate_fwd_outputs(self, *args: Any) -> None:
        """What is sent was compared in `outline.check`; what the last stage makes may have any shape."""

    def backward_maybe_with_nosync(self, kind: str, given: dict[str, Any], *args: Any, **named: Any) -> Any:
        if kind == "weight":
            _add_weight_gradients(self.submod.parameters(), given["param_groups"])
            return (), None
        inputs = given["input_values"]
        if kind == "input":  # torch takes for granted that all outputs have a gradient, and returns those that are
            outputs, grads = given["stage_output"], given["output_grads"]
            places = [i for i, output in enumerate(outputs) if output.requires_grad]
            owners = [get_gradient_edge(outputs[i]) for i in places]
            given = given | {
                "stage_output": [outputs[i] for i in places],
                "output_grads": None if grads is None else [grads[i] for i in places],
            }
        grads, groups = super().backward_maybe_with_nosync(kind, given, *args, **named)
        if kind == "input":
            left = iter(grads)
            grads = tuple(next(left) if x.requires_grad else None for x in inputs)
            _own(groups, owners)
        if not self.is_first:
            grads = tuple(_zero_if_unused(x, grad) for x, grad in zip(inputs, grads, strict=True))
        return grads, groups


def _own(groups: list[dict[str, Any]], owners: list[GradientEdge]) -> None:
    """Keeps the graph behind these edges where it must be: who refers to a node owns it, but not one of Python's."""
    for group in groups:
        if any(isinstance(node, torch._C._FunctionBase) for node in group["intermediates"]):
            group["owners"] = owners


def _back_to_inputs(outputs: list[Tensor], *given: Any) -> tuple[tuple, list[dict[str, Any]]]:
    owners = [get_gradient_edge(output) for output in outputs]
    grads, groups = stage_backward_input(outputs, *given)
    _own(groups, owners)
    return grads, groups


def _add_weight_gradients(weights: Iterable[Tensor], groups: list[dict[str, Any]]) -> None:
    """The second half of a backward, from the nodes at which the first has left each group of weights.

    These releases' own takes a node's first output for all of them, and asks for shapes, which a function that is
    written in Python does not know.
    """
    by_node = {_get_grad_fn_or_grad_acc(weight): weight for weight in weights}
    for group in groups:
        left = zip(group.pop("intermediates"), group.pop("grads"), strict=True)  # popped: their hooks hold the group
        edges = {GradientEdge(node, i): g for node, grads in left for i, g in enumerate(grads) if g is not None}
        if not edges:
            continue
        asked = tuple(GradientEdge(node, 0) for node in group["params"])
        found = _engine_run_backward(
            tuple(edges), tuple(edges.values()), False, False, asked, False, accumulate_grad=False
        )
        for node, grad in zip(group["params"], found, strict=True):
            weight = by_node[node]
            weight.grad = grad if weight.grad is None else weight.grad + grad


def _zero_if_unused(x: Tensor, grad: Tensor | None) -> Tensor | None:
    return torch.zeros_like(x) if grad is None and x.requires_grad else grad


_KNOWS = hasattr(PipelineStage, "_get_grad_send_meta")
TorchStage = PipelineStage if _KNOWS else _Selective
"""Of what travels, only the tensors that require a gradient on the meta device have one."""
back_to_inputs = stage_backward_input if _KNOWS else _back_to_inputs
"""(outputs, their gradients, inputs, weights): the first half of a backward, as stages run it."""
add_weight_gradients = stage_backward_weight if _KNOWS else _add_weight_gradients
"""(weights, groups): the second half, of what the first has left."""
