"""Ulysses: in every attention, ranks exchange tokens for heads.

    before      rank u has its tokens of q, k and v, all heads
    exchange    one all-to-all of q, k and v together
    attention   rank u has all tokens of the block, its H/U heads of q, and the heads of k and v that these need
    exchange    one all-to-all of the result
    after       rank u has its tokens, all heads

Any number of heads and of tokens: parts differ by at most one, and a rank may have no head at all. Nothing is padded.

Heads of k and v that are shared by several of q go to every rank that needs them, once: where U divides K each goes to
one rank. On a rank whose heads of q share unevenly (3 of them one head, 1 the next), they are repeated after the
exchange until all are shared by equally many.

Elements that a rank sends per attention, for its n of the block's T tokens, its m of H heads of h elements, and the
k of K' heads of k and v that it needs (K' counts a head as often as ranks need it):

    forward    n (H-m) h  +  2 n (K'-k) h  +  (T-n) m h
    backward   n (H-m) h  +  2 (T-n) k h   +  (T-n) m h

If U divides H = K, that is 4 T H h (U-1)/U² each way. It falls with U; what a ring sends (see
`mm_parallel.attention.ring`) hardly does, but is hidden behind the computation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor

from mm_parallel.context.shard import even, spans

TOKENS, HEADS = 1, 2  # dims of B L H h
Span = tuple[int, int]


@dataclass(frozen=True)
class HeadLayout:
    """Which of H heads of q, and of the K of k and v that they share, each of some ranks has."""

    heads: int
    shared: int
    ranks: int

    @property
    def queries(self) -> list[Span]:
        """(start, stop) of each rank's heads of q."""
        return spans(even(self.heads, self.ranks))

    @property
    def keys(self) -> list[Span]:
        """(start, stop) of the heads of k and v that each rank needs; neighbours may need the same one."""
        each = self.heads // max(self.shared, 1)
        return [(start // each, -(-stop // each)) if start < stop else (0, 0) for start, stop in self.queries]

    def copies(self, rank: int) -> list[int]:
        """How often a rank must repeat each of its heads of k and v, so that its heads of q share them evenly."""
        (first, last), (start, stop) = self.queries[rank], self.keys[rank]
        each = self.heads // max(self.shared, 1)
        counts = [min(last, (head + 1) * each) - max(first, head * each) for head in range(start, stop)]
        return [count // gcd(*counts) for count in counts]


def repeat(x: Tensor, copies: list[int]) -> Tensor:
    """x with each of its heads that often."""
    if all(n == 1 for n in copies):
        return x
    return torch.cat([head.expand(-1, -1, n, -1) for head, n in zip(x.split(1, HEADS), copies, strict=True)], HEADS)


def exchange(
    tensors: Sequence[Tensor],
    cut: int,
    pieces: Sequence[list[Span]],
    join: int,
    sizes: Sequence[list[int]],
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """Gives rank i its piece of dim `cut` of every tensor, and joins what ranks give along dim `join`. Differentiable.

    pieces: of each tensor, (start, stop) for each rank, in order; they cover the tensor and may overlap. sizes: of each
    tensor, what each rank has along join.
    """
    return _Exchange.apply(cut, pieces, join, sizes, group, *tensors)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cut: int, pieces, join: int, sizes, group, *tensors: Tensor):
        ctx.cut, ctx.pieces, ctx.whole = cut, pieces, [x.shape[cut] for x in tensors]
        cut_sizes = [[stop - start for start, stop in own] for own in pieces]
        ctx.back = join, [spans(own) for own in sizes], cut, cut_sizes, group
        return move(tensors, cut, pieces, join, sizes, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        back = move(grads, *ctx.back)
        sums = (_add(x, ctx.cut, *place) for x, *place in zip(back, ctx.pieces, ctx.whole, strict=True))
        return *(None for _ in ctx.back), *sums


def _add(x: Tensor, dim: int, pieces: list[Span], whole: int) -> Tensor:
    """The gradient of a whole from those of its pieces, which lie behind each other in x; summed in at least fp32."""
    if x.shape[dim] == whole:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros((*x.shape[:dim], whole, *x.shape[dim + 1 :]), dtype=wide)
    for (start, stop), part in zip(pieces, x.split([stop - start for start, stop in pieces], dim), strict=True):
        total.narrow(dim, start, stop - start).add_(part)
    return total.to(x.dtype)


def move(
    tensors: Sequence[Tensor],
    cut: int,
    pieces: Sequence[list[Span]],
    join: int,
    sizes: Sequence[list[int]],
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """`exchange` without autograd."""
    me, one = group.rank(), tensors[0]
    parts = [
        [x.narrow(cut, start, stop - start) for start, stop in own] for x, own in zip(tensors, pieces, strict=True)
    ]
    shapes = [
        [_shape(x, cut, own[me], join, size) for size in has]
        for x, own, has in zip(tensors, pieces, sizes, strict=True)
    ]
    # to and from each rank, all tensors behind each other
    outgoing = [[part.numel() for part in to] for to in zip(*parts, strict=True)]
    incoming = [[torch.Size(shape).numel() for shape in of] for of in zip(*shapes, strict=True)]
    sent, received = (one.new_empty(sum(map(sum, counts))) for counts in (outgoing, incoming))
    places = sent.split([count for to in outgoing for count in to])
    for place, part in zip(places, (part for to in zip(*parts, strict=True) for part in to), strict=True):
        place.view(part.shape).copy_(part)
    dist.all_to_all_single(received, sent, [*map(sum, incoming)], [*map(sum, outgoing)], group=group)
    flat = iter(received.split([count for of in incoming for count in of]))
    came = [[next(flat).view(shape) for shape in of] for of in zip(*shapes, strict=True)]
    return tuple(torch.cat(own, join) for own in zip(*came, strict=True))


def _shape(x: Tensor, cut: int, piece: Span, join: int, size: int) -> tuple[int, ...]:
    sizes = {cut: piece[1] - piece[0], join: size}
    return tuple(sizes.get(dim, whole) for dim, whole in enumerate(x.shape))
