"""Flash attention on the CPU. Any float dtype and head dim; shared heads of keys are read in place."""

import torch
from torch import Tensor

_aten = torch.ops.aten


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = map(_into, (q, k, v))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=None, scale=scale)
    return out.transpose(1, 2), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = map(_into, (dout, q, k, v, out))
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=None, scale=scale
    )
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv


def _into(x: Tensor) -> Tensor:
    """B L H h -> B H L h. The kernel believes, without looking, that the elements of a head are neighbours."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
