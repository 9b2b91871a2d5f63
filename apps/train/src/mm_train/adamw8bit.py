"""AdamW with moments of 8 bits: a quarter of the memory, in plain PyTorch, so that it runs wherever torch runs.

Each moment of a matrix is one of 256 levels times the largest of its block; a block is `BLOCK` neighbours in a row, so
a matrix that is cut by rows or whole blocks is quantised as if it were whole. Biases and vectors keep float32.
Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_train.optimizers import BLOCK


class AdamW8bit(torch.optim.Optimizer):
    """The formula of `torch.optim.AdamW`. Parameters may be DTensors, cut by rows or by columns."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter] or self._begin(parameter)
                state["step"] += 1
                count = state["step"].item()
                value, grad = _local(parameter), _local(parameter.grad)
                first, second = (_read(state, name) for name in ("exp_avg", "exp_avg_sq"))
                first.lerp_(grad, 1 - beta1)
                second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                value.mul_(1 - lr * group["weight_decay"])
                size = (second.sqrt() / (1 - beta2**count) ** 0.5).add_(group["eps"])
                value.addcdiv_(first, size, value=-lr / (1 - beta1**count))
                _write(state, "exp_avg", first)
                _write(state, "exp_avg_sq", second)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which makes numbers of a parameter's dtype of all of them
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq") if parameter.ndim > 1 else ():
                state[name] = state[name].to(torch.uint8)

    def _begin(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            if parameter.ndim < 2:
                state[name] = torch.zeros_like(parameter)
                continue
            own = _local(parameter)
            levels = torch.zeros(own.shape, dtype=torch.uint8, device=own.device)
            levels += _nearest(torch.zeros((), device=own.device), signed=name == "exp_avg")
            scales = torch.zeros((own.shape[0], _blocks(own.shape)), device=own.device)
            state[name], state[f"{name}_scale"] = _like(parameter, levels), _like(parameter, scales)
        return state


def _read(state: dict[str, Tensor], name: str) -> Tensor:
    """A moment in float32; of a vector, the moment itself."""
    kept = _local(state[name])
    if kept.dtype != torch.uint8:
        return kept
    scales = _local(state[f"{name}_scale"])
    rows, width = kept.shape[0], kept[:1].numel() if kept.shape[0] else 0
    values = _levels(kept.device, name == "exp_avg").index_select(0, kept.flatten().int()).view(rows, width)
    values = F.pad(values, (0, scales.shape[1] * BLOCK - width)).view(rows, -1, BLOCK) if rows else values
    return (values * scales[..., None]).view(rows, -1)[:, :width].reshape(kept.shape) if rows else values.view_as(kept)


def _write(state: dict[str, Tensor], name: str, moment: Tensor) -> None:
    kept = _local(state[name])
    if kept.dtype != torch.uint8 or not len(kept):
        return
    scales, rows = _local(state[f"{name}_scale"]), len(kept)
    width = moment[0].numel()
    blocks = F.pad(moment.reshape(rows, width), (0, scales.shape[1] * BLOCK - width)).view(rows, -1, BLOCK)
    scales.copy_(blocks.abs().amax(-1))
    found = _nearest(blocks / scales[..., None].clamp(min=torch.finfo(torch.float32).tiny), name == "exp_avg")
    kept.copy_(found.view(rows, -1)[:, :width].reshape(kept.shape))


def _nearest(values: Tensor, signed: bool) -> Tensor:
    """Numbers of the levels that are nearest: uint8."""
    levels = _levels(values.device, signed)
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


@cache
def _levels(device: torch.device, signed: bool) -> Tensor:
    """256 rising levels from -1 (or 0) to 1: seven decades, each with twice as many as the one below."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        found += [*middles, *(-x for x in middles)] if signed else middles
    assert len(found) == 256
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


def _blocks(shape: torch.Size) -> int:
    return -(-shape[1:].numel() // BLOCK)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """This rank's part of a state, cut as the parameter is: so a checkpoint holds it whole."""
    if not isinstance(parameter, DTensor):
        return local
    shape = list(parameter.shape) if local.ndim == parameter.ndim and local.dtype == torch.uint8 else None
    if shape is None:
        across = -(-parameter.shape[1:].numel() // max(1, _local(parameter).shape[1:].numel()))  # cuts of the columns
        shape = [parameter.shape[0], across * local.shape[1]]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
