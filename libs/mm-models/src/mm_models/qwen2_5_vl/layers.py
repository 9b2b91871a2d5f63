"""What the tower and the language model share. It keeps little for the backward, as sequences are long."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mm_models.layers import Linear, rotate


def turn(x: Tensor, rope: Tensor) -> Tensor:
    """Turns the first half of the channels of x (… H h) with the second by the angles of `rope` (2 … h/2)."""
    return rotate(x, *rope.unsqueeze(-2), (2, -1), -2)  # cos, sin: … 1 h/2


class GatedSilu(torch.autograd.Function):
    """silu(gate) · up. It keeps its two inputs for the backward, where autograd's own would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x))"""

    def __init__(self, dim: int, ffn_dim: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, ffn_dim, bias=bias)
        self.up_proj = Linear(dim, ffn_dim, bias=bias)
        self.down_proj = Linear(ffn_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(GatedSilu.apply(self.gate_proj(x), self.up_proj(x)))
