"""A backend's attention for all that the op takes: any lengths, masks of keys, packed samples, shared heads.

Packed samples are one call where the backend has a form for them (`PACKED`): else samples of equal length share a
call, as a batch. A kernel that does not know shared heads gets keys and values repeated for each head of queries.

No autograd: the ops are built on this.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mm_parallel.attention.backends import BACKENDS, PACKED, SHARING

HEADS = 2  # dim of B L H h


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    backend: str,
    mask: Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """q B Lq H h, k and v B Lk K h -> out B Lq H h, lse B H Lq; contiguous.

    mask: B Lk; segments: ends of packed samples, from 0. Where a sample sees no key, out is 0 and lse is -inf.
    """
    if q.numel() == 0 or k.numel() == 0:
        out, lse = like(q)
        return out.zero_(), lse.fill_(float("-inf"))
    if segments is not None:
        return _forward_packed(q, k, v, scale, causal, backend, segments)
    if mask is not None:
        out, lse = like(q)
        for i, seen in visible(mask, q.device):
            out[i], lse[i] = forward(q[i], k[i][:, seen], v[i][:, seen], scale, causal, backend)
        return out, lse
    k, v = _repeat(q, (k, v), backend)
    out, lse = BACKENDS[backend].forward(q, k, v, scale, causal)
    return out.contiguous(), lse.contiguous()


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    backend: str,
    mask: Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; 0 for keys that nobody sees."""
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
        return dq, dk, dv
    if segments is not None:
        return _backward_packed(dout, q, k, v, out, lse, scale, causal, backend, segments)
    if mask is not None:
        dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
        for i, seen in visible(mask, q.device):
            keys = k[i][:, seen], v[i][:, seen]
            dq[i], dk[i][:, seen], dv[i][:, seen] = backward(
                dout[i], q[i], *keys, out[i], lse[i], scale, causal, backend
            )
        return dq, dk, dv
    shared = k.shape[HEADS]
    k, v = _repeat(q, (k, v), backend)
    dq, dk, dv = BACKENDS[backend].backward(dout, q, k, v, out, lse, scale, causal)
    return dq.contiguous(), _fold(dk, shared), _fold(dv, shared)


def visible(mask: Tensor, device: torch.device) -> Iterator[tuple[slice, slice | Tensor]]:
    """Neighbours in the batch that see the same keys, and these: a slice for all of them, or their places."""
    rows, counts = mask.cpu().unique_consecutive(dim=0, return_counts=True)  # to the host once: lengths are shapes
    start = 0
    for row, count in zip(rows, counts.tolist(), strict=True):
        yield slice(start, start + count), slice(None) if row.all() else row.nonzero()[:, 0].to(device)
        start += count


def like(q: Tensor) -> tuple[Tensor, Tensor]:
    """Empty out and lse of q, as every backend gives them."""
    b, length, heads, _ = q.shape
    out = q.new_empty(q.shape)
    return out, q.new_empty((b, heads, length), dtype=torch.promote_types(q.dtype, torch.float32))


def _forward_packed(q, k, v, scale, causal, backend, segments) -> tuple[Tensor, Tensor]:
    if backend in PACKED:
        out, lse = PACKED[backend].forward(q, k, v, scale, causal, segments)
        return out.contiguous(), lse.contiguous()
    out, lse = like(q)
    for samples in _equal_lengths(segments):
        part, part_lse = forward(*(_stack(x, 1, samples) for x in (q, k, v)), scale, causal, backend)
        _place(out, 1, samples, part)
        _place(lse, 2, samples, part_lse)
    return out, lse


def _backward_packed(dout, q, k, v, out, lse, scale, causal, backend, segments) -> tuple[Tensor, Tensor, Tensor]:
    if backend in PACKED:
        dq, dk, dv = PACKED[backend].backward(dout, q, k, v, out, lse, scale, causal, segments)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for samples in _equal_lengths(segments):
        inputs = (_stack(x, 1, samples) for x in (dout, q, k, v, out))
        parts = backward(*inputs, _stack(lse, 2, samples), scale, causal, backend)
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            _place(whole, 1, samples, part)
    return dq, dk, dv


def _equal_lengths(segments: Sequence[int]) -> list[list[tuple[int, int]]]:
    """(start, stop) of samples, those of one length together."""
    found: dict[int, list[tuple[int, int]]] = {}
    for start, stop in pairwise(segments):
        found.setdefault(stop - start, []).append((start, stop))
    return list(found.values())


def _stack(x: Tensor, dim: int, samples: list[tuple[int, int]]) -> Tensor:
    """Samples of equal length along dim, below each other in the batch."""
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in samples])


def _place(whole: Tensor, dim: int, samples: list[tuple[int, int]], stacked: Tensor) -> None:
    """The way back."""
    for (start, stop), part in zip(samples, stacked.chunk(len(samples)), strict=True):
        whole.narrow(dim, start, stop - start).copy_(part)


def _repeat(q: Tensor, tensors: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    """Keys and values with as many heads as the kernel needs."""
    times = q.shape[HEADS] // tensors[0].shape[HEADS]
    if times == 1 or backend in SHARING:
        return tensors
    return [x.repeat_interleave(times, HEADS) for x in tensors]


def _fold(grad: Tensor, shared: int) -> Tensor:
    """The gradient of heads before they were repeated."""
    if grad.shape[HEADS] != shared:
        grad = grad.unflatten(HEADS, (shared, -1)).sum(HEADS + 1)
    return grad.contiguous()
