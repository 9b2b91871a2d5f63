"""Ulysses: in every attention, ranks exchange tokens for heads.

    before      rank u has its tokens of q, k and v, all H heads
    exchange    one all-to-all of q, k and v together
    attention   rank u has all tokens of the block, its H/U heads
    exchange    one all-to-all of the result
    after       rank u has its tokens, all heads

Any number of heads and of tokens: parts differ by at most one, and a rank may have no head at all. Nothing is padded.

Elements that a rank sends per attention, for its n of the block's T tokens and its m of H heads of h elements:

    forward    3 n (H-m) h  +    (T-n) m h
    backward     n (H-m) h  +  3 (T-n) m h

If U divides both, that is 4 T H h (U-1)/U² each way. It falls with U; what a ring sends (see
`mm_parallel.attention.ring`) hardly does, but is hidden behind the computation.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

TOKENS, HEADS = 1, 2  # dims of B L H h


def exchange(
    tensors: Sequence[Tensor],
    cut: int,
    cut_sizes: list[int],
    join: int,
    join_sizes: list[int],
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """Gives rank i its part of dim `cut` of every tensor, and joins what ranks give along dim `join`. Differentiable.

    The tensors have one shape: all of `cut_sizes` along cut, this rank's of `join_sizes` along join.
    """
    return _Exchange.apply(cut, cut_sizes, join, join_sizes, group, *tensors)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cut: int, cut_sizes: list[int], join: int, join_sizes: list[int], group, *tensors: Tensor):
        ctx.back = (join, join_sizes, cut, cut_sizes, group)
        return move(tensors, cut, cut_sizes, join, join_sizes, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return *(None for _ in ctx.back), *move(grads, *ctx.back)


def move(
    tensors: Sequence[Tensor],
    cut: int,
    cut_sizes: list[int],
    join: int,
    join_sizes: list[int],
    group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """`exchange` without autograd."""

    def shape(cut_size: int, join_size: int) -> tuple[int, ...]:
        sizes = {cut: cut_size, join: join_size}
        return len(tensors), *(sizes.get(dim, size) for dim, size in enumerate(tensors[0].shape))

    me = group.rank()
    outgoing = [shape(size, join_sizes[me]) for size in cut_sizes]
    incoming = [shape(cut_sizes[me], size) for size in join_sizes]
    if tensors[0].is_meta:  # a pipeline asks for shapes
        return tuple(tensors[0].new_empty(shape(cut_sizes[me], sum(join_sizes))[1:]) for _ in tensors)
    counts = [torch.Size(out).numel() for out in outgoing], [torch.Size(size).numel() for size in incoming]
    sent, received = (tensors[0].new_empty(sum(count)) for count in counts)
    parts = zip(*(x.split(cut_sizes, cut) for x in tensors), strict=True)
    for place, size, part in zip(sent.split(counts[0]), outgoing, parts, strict=True):
        torch.stack(part, out=place.view(size))
    dist.all_to_all_single(received, sent, counts[1], counts[0], group=group)
    joined = [part.view(size) for part, size in zip(received.split(counts[1]), incoming, strict=True)]
    return torch.cat(joined, join + 1).unbind()
