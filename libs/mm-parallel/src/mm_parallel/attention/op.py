"""Attention as one op of torch, with its backward as another.

An op of our own can be named: recompute keeps its results, a planner asks it for shapes (`register_fake`), and what
computes it is chosen in one place.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mm_parallel.attention.backends import BACKENDS, pick
from mm_parallel.plan import Sequence


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
    segments: tuple[int, ...] | None = None,
) -> Tensor:
    """Softmax attention on one device, differentiable: q B Lq H h, k and v B Lk H h -> B Lq H h.

    causal: query i sees keys 0 … i; needs Lq = Lk. scale: of the scores, 1/√h if not given. backend: one of
    `BACKENDS`, by default what `pick` says. segments: where packed samples part, see `mm_parallel.plan.Sequence`; each
    is an attention of its own. A query without keys gives 0. Raises ValueError for shapes, segments or a backend that
    do not fit.
    """
    check(q, k, v, causal)
    rest = scale_of(q) if scale is None else scale, causal, backend_of(q, backend)
    if segments is None:
        return _op(q, k, v, *rest)[0]
    check_segments(segments, q.shape[1])
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"packed samples of {q.shape[1]} queries and {k.shape[1]} keys: each needs as many of both")
    samples = (tuple(x[:, start:stop] for x in (q, k, v)) for start, stop in pairwise(segments))
    return torch.cat([_op(*qkv, *rest)[0] for qkv in samples], 1)


def core(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    """The seam of a ladder on one device (see `mm_parallel.plan.Ladder`), by our op."""
    return attention(q, k, v, sequence.causal, segments=sequence.segments)


def scale_of(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def backend_of(q: Tensor, name: str | None) -> str:
    """The name if there is such a backend, else the one that fits."""
    if name is None:
        return pick(q.device.type, q.dtype, q.shape[-1])
    if name not in BACKENDS:
        raise ValueError(f"no attention backend is named {name!r}: there are {', '.join(BACKENDS)}")
    return name


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Raises ValueError for shapes or dtypes that are not those of one attention."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"attention of {shapes}: needs B L H h, all alike but for the L of q (repeat shared heads)")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal attention of {shapes}: where {q.shape[1]} queries begin in {k.shape[1]} keys is open")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention of q {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one dtype")


def check_segments(segments: tuple[int, ...], tokens: int) -> None:
    """Raises ValueError unless they are ends of samples that are these tokens together."""
    if segments[:1] != (0,) or segments[-1] != tokens or any(a >= b for a, b in pairwise(segments)):
        raise ValueError(f"segments {segments} of {tokens} tokens: must begin with 0, grow, and end with {tokens}")


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, backend: str) -> tuple[Tensor, Tensor]:
    """A backend's forward for any lengths, also none; contiguous results. No autograd."""
    if q.numel() == 0 or k.numel() == 0:
        out, lse = like(q)
        return out.zero_(), lse.fill_(float("-inf"))
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
) -> tuple[Tensor, Tensor, Tensor]:
    """A backend's backward for any lengths, also none; contiguous results."""
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
        return dq, dk, dv
    dq, dk, dv = BACKENDS[backend].backward(dout, q, k, v, out, lse, scale, causal)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def like(q: Tensor) -> tuple[Tensor, Tensor]:
    """Empty out and lse of q, as every backend gives them."""
    b, length, heads, _ = q.shape
    out = q.new_empty(q.shape)
    return out, q.new_empty((b, heads, length), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("mm_parallel::attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, backend: str) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, scale, causal, backend)


@torch.library.custom_op("mm_parallel::attention_backward", mutates_args=())
def _op_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dout, q, k, v, out, lse, scale, causal, backend)


def complete(op: Any, op_backward: Any) -> None:
    """Gives an attention op its shapes and its gradient. Both ops begin with q, k, v (behind dout), and what follows is
    the same for both.
    """

    def save(ctx, inputs, output):
        q, k, v, *ctx.rest = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)

    def differentiate(ctx, dout, _):
        return *op_backward(dout, *ctx.saved_tensors, *ctx.rest), *(None for _ in ctx.rest)

    op.register_fake(lambda q, *rest: like(q))
    op_backward.register_fake(lambda dout, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)))
    op.register_autograd(differentiate, setup_context=save)


complete(_op, _op_backward)
