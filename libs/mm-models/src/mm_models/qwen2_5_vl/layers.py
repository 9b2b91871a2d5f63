"""What the tower and the language model share. It keeps little for the backward, as sequences are long."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mm_models.layers import Linear, wide


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean of squares of x + eps) · weight, in the dtype of x; before the product at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # a kernel of its own, which keeps as little
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """It keeps x and a number for each row, where torch's own would keep two float32 tensors of the size of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = wide(x)
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (y * scale).to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, y = wide(grad), wide(x) * scale
        of_weight = (grad * y).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        of_x = ((grad - y * (grad * y).mean(-1, keepdim=True)) * scale).to(x.dtype)
        return of_x, of_weight, None


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns the first half of the channels of x (… H h) with the second by the angles of `rope` (2 … h/2); in at least
    float32, returned as x.
    """
    cos, sin = rope.unsqueeze(-2)  # … 1 h/2
    a, b = wide(x).chunk(2, -1)
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.cat(turned, -1).to(x.dtype)


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
