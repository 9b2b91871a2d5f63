"""The three attention kernels that torch has for CUDA, called one level below F.scaled_dot_product_attention.

They want head dims that are multiples of 8; others are padded with zeros, which changes no score and no value. Flash
and cuDNN read shared heads of keys in place; flash alone takes packed samples of any lengths in one call. Programs may
put FlashAttention 3 or 4 behind the ops of flash, see `mm_parallel.attention.loading`.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
_MULTIPLE = 8  # elements of a head
_LSE_MULTIPLE = 32  # rows of the memory-efficient kernel's log-sum-exp


def flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    dim = q.shape[-1]
    q, k, v = map(_into, (q, k, v))
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return _back(out, dim), lse


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dim, lengths = q.shape[-1], (q.shape[1], k.shape[1])
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # as for the others, but this kernel's kind
    dout, q, k, v, out = map(_into, (dout, q, k, v, out))
    grads = _aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, *lengths, 0.0, causal, seed, seed, scale=scale
    )
    dq, dk, dv = (_back(grad, dim) for grad in grads)
    return dq, dk, dv


def flash_packed_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, segments: Sequence[int]
) -> tuple[Tensor, Tensor]:
    rows, dim, (ends, longest) = len(q), q.shape[-1], _ends(q, segments)
    q, k, v = map(_flat, (q, k, v))
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, 0.0, causal, False, scale=scale
    )
    return _rows(out, rows, dim), lse.unflatten(1, (rows, -1)).transpose(0, 1)  # comes as H (B L)


def flash_packed_backward(
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
    rows, dim, (ends, longest) = len(q), q.shape[-1], _ends(q, segments)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dout, q, k, v, out = map(_flat, (dout, q, k, v, out))
    lse = lse.transpose(0, 1).flatten(1).contiguous()
    grads = _aten._flash_attention_backward(
        dout, q, k, v, out, lse, ends, ends, longest, longest, 0.0, causal, seed, seed, scale=scale
    )
    dq, dk, dv = (_rows(grad, rows, dim) for grad in grads)
    return dq, dk, dv


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    dim, shape = q.shape[-1], (q.shape[0], q.shape[2], q.shape[1])
    q, k, v = map(_into, (q, k, v))
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return _back(out, dim), lse.reshape(shape)  # comes as B H L 1


def cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dim, seed, lengths = q.shape[-1], _no_dropout(q), (q.shape[1], k.shape[1])
    dout, q, k, v, out = map(_into, (dout, q, k, v, out))
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, None, None, *lengths, 0.0, causal, scale=scale
    )
    dq, dk, dv = (_back(grad, dim) for grad in grads)
    return dq, dk, dv


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    dim, length = q.shape[-1], q.shape[1]
    q, k, v = map(_into, (q, k, v))
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return _back(out, dim), lse.narrow(-1, 0, length)  # comes with rows up to a multiple of 32


def efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dim, seed = q.shape[-1], _no_dropout(q)
    lse = F.pad(lse, (0, -lse.shape[-1] % _LSE_MULTIPLE), value=float("inf"))  # exp(score - inf): rows without weight
    dout, q, k, v, out = map(_into, (dout, q, k, v, out))
    grads = _aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
    )
    dq, dk, dv = (_back(grad, dim) for grad in grads[:3])
    return dq, dk, dv


def _into(x: Tensor) -> Tensor:
    """B L H h -> B H L h, the head padded; a view where there is nothing to pad and elements of a head are neighbours,
    which the kernels want.
    """
    return _pad(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _pad(x: Tensor) -> Tensor:
    missing = -x.shape[-1] % _MULTIPLE
    return F.pad(x, (0, missing)) if missing else x  # F.pad by nothing is a copy


def _back(x: Tensor, dim: int) -> Tensor:
    return x.transpose(1, 2).narrow(-1, 0, dim)


def _ends(q: Tensor, segments: Sequence[int]) -> tuple[Tensor, int]:
    """Where samples part in all rows, one behind the other, on the device; and the longest sample."""
    rows, length = q.shape[:2]
    ends = torch.tensor([0, *(row * length + end for row in range(rows) for end in segments[1:])], dtype=torch.int32)
    return ends.to(q.device, non_blocking=True), max(stop - start for start, stop in pairwise(segments))


def _flat(x: Tensor) -> Tensor:
    """B L H h -> (B L) H h, the head padded."""
    return _pad(x).flatten(0, 1).contiguous()


def _rows(x: Tensor, rows: int, dim: int) -> Tensor:
    return x.unflatten(0, (rows, -1)).narrow(-1, 0, dim)


def _no_dropout(q: Tensor) -> Tensor:
    """In place of the random state that a forward with dropout would have returned; never read."""
    return torch.empty((), dtype=torch.int64, device=q.device)
