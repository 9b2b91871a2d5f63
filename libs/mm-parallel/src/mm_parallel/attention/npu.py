"""Ascend's fused attention, after the documentation of torch_npu 2.x (npu_fusion_attention and its gradient).

Layout BSND is ours, for packed samples TND with all rows behind each other; heads of keys may be fewer. The forward
gives, per row and eight times over, the largest score and the sum of exp(score - it): the log-sum-exp is max +
log(sum). The gradient computes exp(score - max) / sum, so max = lse and sum = 1 serve it, and lse and out may be those
of a whole ring. Never run on an NPU yet; tested against a stand-in with these signatures.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LEFT_UP_CAUSAL = 2  # sparse_mode: the mask is 2048 x 2048 for every length, True where nothing may be seen
_MASK = 2048
_COPIES = 8


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    import torch_npu  # never a dependency: without CANN it breaks `import torch`

    out, largest, total, *_ = torch_npu.npu_fusion_attention(
        *_contiguous(q, k, v), q.shape[2], "BSND", scale=scale, keep_prob=1.0, **_mask(q, causal)
    )
    return out, largest[..., 0] + total[..., 0].log()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    import torch_npu

    largest = lse[..., None].expand(*lse.shape, _COPIES).contiguous()
    dq, dk, dv, *_ = torch_npu.npu_fusion_attention_grad(
        *_contiguous(q, k, v, dout),
        q.shape[2],
        "BSND",
        softmax_max=largest,
        softmax_sum=torch.ones_like(largest),
        attention_in=out.contiguous(),
        scale_value=scale,
        keep_prob=1.0,
        **_mask(q, causal),
    )
    return dq, dk, dv


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, segments: Sequence[int]
) -> tuple[Tensor, Tensor]:
    import torch_npu

    rows, flat = len(q), (x.flatten(0, 1).contiguous() for x in (q, k, v))
    out, largest, total, *_ = torch_npu.npu_fusion_attention(
        *flat, q.shape[2], "TND", scale=scale, keep_prob=1.0, **_ends(q, segments), **_mask(q, causal)
    )
    lse = largest[..., 0] + total[..., 0].log()  # (B L) H
    return out.unflatten(0, (rows, -1)), lse.unflatten(0, (rows, -1)).transpose(1, 2)


def packed_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    segments: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    import torch_npu

    rows, flat = len(q), (x.flatten(0, 1).contiguous() for x in (q, k, v, dout))
    largest = lse.transpose(1, 2).flatten(0, 1)[..., None]
    largest = largest.expand(*largest.shape[:-1], _COPIES).contiguous()
    dq, dk, dv, *_ = torch_npu.npu_fusion_attention_grad(
        *flat,
        q.shape[2],
        "TND",
        softmax_max=largest,
        softmax_sum=torch.ones_like(largest),
        attention_in=out.flatten(0, 1).contiguous(),
        scale_value=scale,
        keep_prob=1.0,
        **_ends(q, segments),
        **_mask(q, causal),
    )
    return tuple(grad.unflatten(0, (rows, -1)) for grad in (dq, dk, dv))


def _ends(q: Tensor, segments: Sequence[int]) -> dict[str, list[int]]:
    """Where each sample of each row ends."""
    rows, length = q.shape[:2]
    ends = [row * length + end for row in range(rows) for end in segments[1:]]
    return {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def _mask(q: Tensor, causal: bool) -> dict[str, Any]:
    if not causal:
        return {}
    later = torch.ones(_MASK, _MASK, dtype=torch.bool, device=q.device).triu(1)
    return {"atten_mask": later, "sparse_mode": _LEFT_UP_CAUSAL}
