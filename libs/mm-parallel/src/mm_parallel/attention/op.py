"""Attention as one op of torch, with its backward as another.

An op of our own can be named: recompute keeps its results, a planner asks it for shapes (`register_fake`), and what
computes it is chosen in one place.

A mask says which keys are attended. It is no bias: kernels without one are the fastest, and are all that a ring can
use. What is masked is left out instead, sample by sample, before the kernel is called; it costs no work, its weight is
exactly 0, and so are its gradients. A call without a mask is one call of the kernel, as ever.

Heads of keys and values may be fewer than those of queries: neighbouring heads of queries then share one. Nothing is
repeated in memory where the kernel knows this (see `mm_parallel.attention.backends`).
"""

from collections import abc
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mm_parallel.attention.around import call
from mm_parallel.attention.backends import BACKENDS, pick
from mm_parallel.attention.dispatch import backward, forward, like
from mm_parallel.plan import Sequence


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
    segments: tuple[int, ...] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention on one device, differentiable: q B Lq H h, k and v B Lk K h -> B Lq H h.

    K divides H: each head of k and v is shared by H/K neighbouring heads of q.
    causal: query i sees keys 0 … i; needs Lq = Lk. scale: of the scores, 1/√h if not given. backend: one of
    `BACKENDS`, or "auto": what `pick` says. segments: where packed samples part, see `mm_parallel.plan.Sequence`; each
    is an attention of its own, and there may be none. mask: B Lk, bool: True for a key that is attended, None: all; not
    together with causal or segments. A query without keys gives 0.
    Raises ValueError for shapes, segments, a mask or a backend that do not fit.
    """
    check(q, k, v, causal)
    check_mask(mask, q, k.shape[1], causal, segments)
    rest = scale_of(q) if scale is None else scale, causal, named(backend)
    if segments is not None:
        check_segments(segments, q.shape[1])
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"packed samples of {q.shape[1]} queries and {k.shape[1]} keys: each needs as many of both"
            )
    return call(_op, q, k, v, *rest, mask, parting(segments))[0]


def core(
    q: Tensor, k: Tensor, v: Tensor, sequence: Sequence, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The seam of a ladder on one device (see `mm_parallel.plan.Ladder`), by our op."""
    return attention(q, k, v, sequence.causal, backend=backend, segments=sequence.segments, mask=mask)


def scale_of(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def named(backend: str) -> str:
    """The same, if there is such a backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"no attention backend is named {backend!r}: there are {', '.join(BACKENDS)}")
    return backend


def backend_of(
    q: Tensor, k: Tensor, backend: str, mask: Tensor | None, segments: abc.Sequence[int] | None, keys: int | None = None
) -> str:
    """What computes an op on these. Asked inside the op, so that a compiler does not look into it.

    keys: of a call, where they are not those of k. A name is taken as it is; programs ask `choose` whether it can be.
    Only cuDNN leaves to others what it would be wrong or slow for.
    """
    if backend not in ("auto", "cudnn"):
        return backend
    sizes = {"queries": q.shape[1], "keys": k.shape[1] if keys is None else keys}
    heads = {"heads": q.shape[2], "kv_heads": k.shape[2]}
    uneven = {"masked": mask is not None, "packed": segments is not None}
    return pick(q.device, q.dtype, q.shape[-1], **heads, **sizes, **uneven, name=backend)


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Raises ValueError for shapes or dtypes that are not those of one attention."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention of {shapes}: needs B L H h, all alike but for L and H of q")
    heads, shared = q.shape[2], k.shape[2]
    if heads != shared and (shared == 0 or heads % shared):
        raise ValueError(
            f"attention of {shapes}: {heads} heads of q and {shared} of k and v; neighbours share one, so the second "
            "number must divide the first"
        )
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal attention of {shapes}: where {q.shape[1]} queries begin in {k.shape[1]} keys is open")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention of q {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one dtype")


def check_segments(segments: tuple[int, ...], tokens: int) -> None:
    """Raises ValueError unless they are ends of samples that are these tokens together."""
    if segments[:1] != (0,) or segments[-1] != tokens or any(a >= b for a, b in pairwise(segments)):
        said = segments if len(segments) <= 8 else f"({', '.join(map(str, segments[:4]))}, … {segments[-1]})"
        raise ValueError(f"segments {said} of {tokens} tokens: must begin with 0, grow, and end with {tokens}")


def parting(segments: abc.Sequence[int] | None) -> abc.Sequence[int] | None:
    """The segments where they part anything, else None: one sample, or none, is no pack."""
    return segments if segments is not None and len(segments) > 2 else None


def check_mask(
    mask: Tensor | None, q: Tensor, keys: int, causal: bool, segments: tuple[int, ...] | None = None
) -> None:
    """Raises ValueError for a mask that is not B keys, bool, and for one together with causal or packed samples."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != (q.shape[0], keys):
        raise ValueError(
            f"a mask {tuple(mask.shape)} {str(mask.dtype).removeprefix('torch.')} of {q.shape[0]} samples with {keys} "
            f"keys: needs ({q.shape[0]}, {keys}) bool, True for a key that is attended"
        )
    if segments is not None:
        raise ValueError(
            f"{len(segments) - 1} packed samples with a mask of keys: leave out what is masked when you pack"
        )
    if causal:
        raise ValueError(
            "causal attention with a mask of keys: there is no such kernel; pack without what is masked instead"
        )


@torch.library.custom_op("mm_parallel::attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    backend: str,
    mask: Tensor | None = None,
    segments: abc.Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, scale, causal, backend_of(q, k, backend, mask, segments), mask, segments)


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
    mask: Tensor | None = None,
    segments: abc.Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dout, q, k, v, out, lse, scale, causal, backend_of(q, k, backend, mask, segments), mask, segments)


def complete(op: Any, op_backward: Any) -> None:
    """Gives an attention op its shapes and its gradient. Both ops begin with q, k, v (behind dout) and end with the
    mask and the segments, and what is between is the same for both.
    """

    def save(ctx, inputs, output):
        q, k, v, *ctx.rest, mask, ctx.segments = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, mask)

    def differentiate(ctx, dout, _):
        *saved, mask = ctx.saved_tensors
        grads = op_backward(dout, *saved, *ctx.rest, mask, ctx.segments)
        return *grads, *(None for _ in ctx.rest), None, None

    op.register_fake(lambda q, *rest: like(q))
    op_backward.register_fake(lambda dout, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)))
    op.register_autograd(differentiate, setup_context=save)


complete(_op, _op_backward)
