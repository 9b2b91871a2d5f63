"""torch's pipeline stage, where not all that travels has a gradient.

A stream also has what nobody trains through: places, masks, labels. A stage of torch 2.13 knows of each tensor whether
it requires a gradient. In earlier releases a stage lets everything that comes require one, which an integer cannot,
and waits for the gradient of all that it has sent. `_Selective` teaches them the difference; the same travels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage


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
        inputs = given.get("input_values", ())
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
        if kind != "weight" and not self.is_first:
            grads = tuple(_zero_if_unused(x, grad) for x, grad in zip(inputs, grads, strict=True))
        return grads, groups


def _zero_if_unused(x: Tensor, grad: Tensor | None) -> Tensor | None:
    return torch.zeros_like(x) if grad is None and x.requires_grad else grad


TorchStage = PipelineStage if hasattr(PipelineStage, "_get_grad_send_meta") else _Selective
"""Of what travels, only the tensors that require a gradient on the meta device have one."""
