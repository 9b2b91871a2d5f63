"""torch's pipeline stage, where not all that travels has a gradient.

A stream also has what nobody trains through: places, masks, labels. A stage of torch 2.13 knows of each tensor whether
it requires a gradient. In earlier releases a stage lets everything that comes require one, which an integer cannot,
and waits for the gradient of all that it has sent. `_Selective` teaches them the difference; the same travels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import _get_grad_fn_or_grad_acc


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
            given = given | {
                "stage_output": [outputs[i] for i in places],
                "output_grads": None if grads is None else [grads[i] for i in places],
            }
        grads, groups = super().backward_maybe_with_nosync(kind, given, *args, **named)
        if kind == "input":
            left = iter(grads)
            grads = tuple(next(left) if x.requires_grad else None for x in inputs)
        if not self.is_first:
            grads = tuple(_zero_if_unused(x, grad) for x, grad in zip(inputs, grads, strict=True))
        return grads, groups


def _add_weight_gradients(weights: Iterable[Tensor], groups: list[dict[str, Any]]) -> None:
    """What `torch.autograd.grad` makes of each group's edges. It asks a node for shapes first, and in these releases
    functions that are written in Python have no answer.
    """
    by_node = {_get_grad_fn_or_grad_acc(weight): weight for weight in weights}
    for group in groups:
        pairs = zip(group["grads"], group.pop("intermediates"), strict=True)  # popped: their hooks hold the group
        known = [([g for g in grads if g is not None], node) for grads, node in pairs]
        edges = {GradientEdge(node, 0): sum(grads) for grads, node in known if grads}
        if not edges:
            continue
        asked = tuple(GradientEdge(node, 0) for node in group["params"])
        found = _engine_run_backward(
            tuple(edges), tuple(edges.values()), False, False, asked, False, accumulate_grad=False
        )
        del group["grads"]
        for node, grad in zip(group["params"], found, strict=True):
            weight = by_node[node]
            weight.grad = grad if weight.grad is None else weight.grad + grad


def _zero_if_unused(x: Tensor, grad: Tensor | None) -> Tensor | None:
    return torch.zeros_like(x) if grad is None and x.requires_grad else grad


TorchStage = PipelineStage if hasattr(PipelineStage, "_get_grad_send_meta") else _Selective
"""Of what travels, only the tensors that require a gradient on the meta device have one."""
