"""Which rank holds which tokens, and cutting and joining tensors accordingly.

The tokens of a sequence are cut twice, in blocks over the ring and then each block over its Ulysses ranks. Any number
of tokens goes over any number of ranks: sizes differ by at most one, and may be 0. In a causal ring a block is two
chunks, one from the front and one from the back, so that all ranks have alike to do (see `mm_parallel.attention.ring`):

    10 tokens, ring 2, ulysses 2        not causal              causal
    rank 0 = ring 0, ulysses 0          0 1 2                   0 1 2
    rank 1 = ring 0, ulysses 1          3 4                     8 9
    rank 2 = ring 1, ulysses 0          5 6 7                   3 4 5
    rank 3 = ring 1, ulysses 1          8 9                     6 7
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm_parallel.collectives import gather_rows


def even(n: int, parts: int) -> list[int]:
    """Sizes of `parts` parts of n; the first ones are one larger where it does not divide."""
    return [n // parts + (i < n % parts) for i in range(parts)]


def spans(sizes: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of neighbours of these sizes."""
    stops = list(accumulate(sizes))
    return list(zip([0, *stops[:-1]], stops, strict=True))


@dataclass(frozen=True)
class TokenLayout:
    """Which ranks hold which of `tokens`."""

    tokens: int
    ring: int
    ulysses: int
    causal: bool = False

    @property
    def chunks(self) -> list[int]:
        """Sizes of the pieces of the sequence, in its order: one for each ring rank, or two if causal."""
        return even(self.tokens, self.ring * 2 if self.causal and self.ring > 1 else self.ring)

    def block(self, ring: int) -> list[tuple[int, int]]:
        """(start, stop) of the pieces that a ring rank and its Ulysses ranks hold together."""
        pieces = spans(self.chunks)
        return [pieces[ring], pieces[-1 - ring]] if len(pieces) > self.ring else [pieces[ring]]

    def shares(self, ring: int) -> list[int]:
        """Tokens of each Ulysses rank of a block."""
        return even(sum(stop - start for start, stop in self.block(ring)), self.ulysses)

    def pieces(self, rank: int) -> list[tuple[int, int]]:
        """(start, stop) of what one of the ring x ulysses ranks holds, in the order in which it holds them."""
        ring, ulysses = divmod(rank, self.ulysses)
        first, last = spans(self.shares(ring))[ulysses]
        own, offset = [], 0
        for start, stop in self.block(ring):  # the part of the piece that lies in first … last of the block
            low, high = max(first - offset, 0), min(last - offset, stop - start)
            if low < high:
                own.append((start + low, start + high))
            offset += stop - start
        return own or [(0, 0)]


def take(x: Tensor, dim: int, pieces: list[tuple[int, int]]) -> Tensor:
    """These pieces of x along dim. A copy, so that the whole x can be freed; its gradient is zero elsewhere."""
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in pieces], dim)


def token_dims(stream: Any, tokens: Mapping[str, int]) -> dict[str, int]:
    """Which fields of a stream hold tokens, in which dim (`tokens`: a plan's).

    A field of size 1 is the same for all tokens, and is left out; not so the first. Raises ValueError for another size
    than the sequence has tokens.
    """
    (first, *_), number, dims = tokens, stream.sequence.tokens, {}
    for name, dim in tokens.items():
        x = getattr(stream, name)
        if x is None or (x.shape[dim] == 1 and name != first):
            continue
        if x.shape[dim] != number:
            raise ValueError(f"stream.{name} has {x.shape[dim]} tokens in dim {dim}, but the sequence has {number}")
        dims[name] = dim
    return dims


def split(stream: Any, tokens: Mapping[str, int], layout: TokenLayout, rank: int) -> Any:
    """A rank's part of a stream: of every field that holds tokens (see `token_dims`), the others as they are."""
    pieces, dims = layout.pieces(rank), token_dims(stream, tokens)
    return stream._replace(**{name: take(getattr(stream, name), dim, pieces) for name, dim in dims.items()})


def join(x: Tensor, dim: int, held: list[list[tuple[int, int]]], group: dist.ProcessGroup) -> Tensor:
    """The whole of what ranks have parts of along dim, in order, on every rank. held: what each rank has. No autograd.

    The parts travel padded to the longest, as all-gather wants it.
    """
    sizes = [sum(stop - start for start, stop in pieces) for pieces in held]
    whole = x.new_empty((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]))
    if not any(sizes):  # there is no token anywhere
        return whole
    part, rows = x.movedim(dim, 0), whole.movedim(dim, 0)
    sent = part.new_zeros((max(sizes), *part.shape[1:]))
    sent[: len(part)] = part
    for pieces, part in zip(held, gather_rows(sent, group).split(len(sent)), strict=True):
        offset = 0
        for start, stop in pieces:
            rows[start:stop] = part[offset : offset + stop - start]
            offset += stop - start
    return whole


class Gather(torch.autograd.Function):
    """All tokens, in the order of the sequence, on every rank. B L … of this rank -> B tokens …

    The backward keeps the own tokens' gradient, times the number of ranks: see the rule in `mm_parallel.grads`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layout: TokenLayout, group: dist.ProcessGroup) -> Tensor:
        held = [layout.pieces(rank) for rank in range(group.size())]
        ctx.pieces, ctx.ranks = held[group.rank()], len(held)
        return join(x, 1, held, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return take(grad, 1, ctx.pieces) * ctx.ranks, None, None
