"""A toy that has what real ladders have."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_parallel.plan import ParallelPlan, Sequence

HEADS, HEAD_DIM = 4, 3
DIM = HEADS * HEAD_DIM


class Stream(NamedTuple):
    """What travels up `TinyLadder`."""

    x: Tensor  # B L D
    place: Tensor  # L D, a position for every token
    mod: Tensor  # B 2 D, in fp32
    text: Tensor  # B 2 D, the same for all tokens
    sequence: Sequence
    mask: Tensor | None = None  # B L, bool: the tokens that are attended, of the whole sequence on every rank


def identity(x, *_):
    """A seam that nobody uses."""
    return x


def attention(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence, mask: Tensor | None = None) -> Tensor:
    """Softmax attention on B L H h, k and v perhaps of fewer heads.

    mask: B L, True for a key that is attended; of one sample, not causal.
    """
    segments = sequence.segments or (0, sequence.tokens)
    samples = [[x[:, start:stop].transpose(1, 2) for x in (q, k, v)] for start, stop in pairwise(segments)]
    seen = None if mask is None else mask[:, None, None]
    how = {"attn_mask": seen, "is_causal": sequence.causal, "enable_gqa": q.shape[2] != k.shape[2]}
    outs = [F.scaled_dot_product_attention(*qkv, **how) for qkv in samples]
    return torch.cat(outs, 2).transpose(1, 2)


class Linear(nn.Linear):
    """In the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """In the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class TinyLadder(nn.Module):
    """Parameters of each kind that stay in fp32, sizes that no world size divides, norms over all heads, a dtype.

    Called as `model(tokens, t, mask) -> y` with tokens B L 5, t B 3, mask B L bool (which tokens are attended; None:
    all) and y B L 5. shared: heads of keys and values, of which several heads of queries may share one. segments: where
    samples part in every row, with causal or without. A block's `read` are the dtypes of its parameters as its last
    forward found them.
    """

    plan = ParallelPlan(
        layers=("blocks.*",),
        keep_fp32=("time.*", "*.norm.weight", "*.table"),
        last=("out",),
        tokens={"x": 1, "place": 0},
        heads=HEADS,
        columns=("blocks.*.q", "blocks.*.k", "blocks.*.v", "blocks.*.up"),
        rows=("blocks.*.o", "blocks.*.down"),
        norms=("blocks.*.norm_q", "blocks.*.norm_k"),
    )

    def __init__(
        self,
        layers: int = 3,
        compute_dtype: torch.dtype | None = None,
        causal: bool = False,
        segments: tuple[int, ...] | None = None,
        shared: int = HEADS,
    ) -> None:
        super().__init__()
        self.compute_dtype, self.causal, self.segments = compute_dtype, causal, segments
        self.embed = Linear(5, DIM)
        self.read = Linear(3, 2 * DIM)
        self.time = nn.Sequential(nn.Linear(3, 9), nn.SiLU(), nn.Linear(9, 2 * DIM))  # matrices: a group of its own
        self.blocks = nn.ModuleList(TinyBlock(shared) for _ in range(layers))
        self.out = Linear(DIM, 5)
        self.split: Callable = identity
        self.core: Callable = attention
        self.gather: Callable = identity

    @property
    def layers(self) -> nn.ModuleList:
        return self.blocks

    def stem(self, tokens: Tensor, t: Tensor, mask: Tensor | None = None) -> Stream:
        dtype = self.compute_dtype or tokens.dtype
        x = self.embed(tokens.to(dtype)).to(t.dtype)  # the residual stream stays in fp32 as well
        length = tokens.shape[1]
        place = torch.arange(length, device=t.device, dtype=t.dtype)[:, None] * torch.ones(DIM, device=t.device)
        text = self.read(t.to(dtype)).unflatten(1, (2, DIM))
        sequence = Sequence(length, self.causal, self.segments)
        return self.split(Stream(x, (place / 7).sin(), self.time(t).unflatten(1, (2, DIM)), text, sequence, mask))

    def layer(self, i: int, stream: Stream) -> Stream:
        core = self.core if stream.mask is None else partial(self.core, mask=stream.mask)
        return self.blocks[i](stream, core, self.compute_dtype)

    def head(self, stream: Stream) -> Tensor:
        y = self.out(stream.x.to(self.compute_dtype or stream.x.dtype)).to(stream.x.dtype)
        return self.gather(y, stream.sequence)

    def forward(self, tokens: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        stream = self.stem(tokens, t, mask)
        for i in range(len(self.blocks)):
            stream = self.layer(i, stream)
        return self.head(stream)


class TinyBlock(nn.Module):
    def __init__(self, shared: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 2, DIM) / DIM**0.5)  # fp32, in a module with matrices: replicated
        self.norm = nn.LayerNorm(DIM, bias=False)
        self.q, self.k, self.v = (Linear(DIM, heads * HEAD_DIM) for heads in (HEADS, shared, shared))
        self.o = Linear(DIM, DIM)
        # over all heads together
        self.norm_q, self.norm_k = RMSNorm(DIM, eps=1e-6), RMSNorm(shared * HEAD_DIM, eps=1e-6)
        self.up, self.down = Linear(DIM, 10), Linear(10, DIM)
        self.read: dict[str, torch.dtype] = {}

    def forward(self, stream: Stream, core: Callable, dtype: torch.dtype | None) -> Stream:
        self.read = {name: p.dtype for name, p in self.named_parameters()}
        shift, gate = (self.table + stream.mod).unbind(1)
        y = self.norm(stream.x) + shift[:, None] + stream.place
        y = y.to(dtype or y.dtype)
        y = y + stream.text.mean(1, keepdim=True)
        q, k, v = (x.unflatten(-1, (-1, HEAD_DIM)) for x in (self.norm_q(self.q(y)), self.norm_k(self.k(y)), self.v(y)))
        y = self.o(core(q, k, v, stream.sequence).flatten(2))
        y = self.down(F.gelu(self.up(y)))
        return stream._replace(x=stream.x + gate[:, None] * y.to(stream.x.dtype))


class TwoLadders(TinyLadder):
    """A ladder in whose stem another runs, as a vision tower in a language model's.

    Called as `model(tokens, t, image, owner)`: image N P 5, owner N the sample that each image belongs to (without, one
    for each sample), and what is seen on it is added to all tokens of its owner.
    """

    plan = replace(TinyLadder.plan, inner={"tower": TinyLadder.plan})

    def __init__(self, layers: int = 3, compute_dtype: torch.dtype | None = None, inner_layers: int = 2) -> None:
        super().__init__(layers, compute_dtype)
        self.tower = TinyLadder(inner_layers, compute_dtype)

    def stem(self, tokens: Tensor, t: Tensor, image: Tensor, owner: Tensor | None = None) -> Stream:
        seen = self.tower(image, t if owner is None else t[owner]).mean(1)  # N 5
        if owner is not None:
            seen = torch.zeros_like(tokens[:, 0]).index_add(0, owner, seen)
        return super().stem(tokens + seen[:, None], t)

    def forward(self, tokens: Tensor, t: Tensor, image: Tensor, owner: Tensor | None = None) -> Tensor:
        stream = self.stem(tokens, t, image, owner)
        for i in range(len(self.blocks)):
            stream = self.layer(i, stream)
        return self.head(stream)
