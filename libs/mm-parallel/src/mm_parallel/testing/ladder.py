"""A toy that has what real ladders have."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from math import prod
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
    spans = list(pairwise(segments)) or [(0, 0)]  # of no sample, too, q, k and v get a gradient: FSDP waits for it
    samples = [[x[:, start:stop].transpose(1, 2) for x in (q, k, v)] for start, stop in spans]
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

    Called as `model(tokens, t, mask, segments) -> y` with tokens B L 5, t B 3, mask B L bool (which tokens are
    attended; None: all), segments in place of the model's own, and y B L 5. shared: heads of keys and values, of which
    several heads of queries may share one. segments: where samples part in every row, with causal or without. A block's
    `read` are the dtypes of its parameters as its last forward found them.
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

    def stem(
        self, tokens: Tensor, t: Tensor, mask: Tensor | None = None, segments: tuple[int, ...] | None = None
    ) -> Stream:
        dtype = self.compute_dtype or tokens.dtype
        x = self.embed(tokens.to(dtype)).to(t.dtype)  # the residual stream stays in fp32 as well
        length = tokens.shape[1]
        place = torch.arange(length, device=t.device, dtype=t.dtype)[:, None] * torch.ones(DIM, device=t.device)
        text = self.read(t.to(dtype)).unflatten(1, (2, DIM))
        sequence = Sequence(length, self.causal, segments or self.segments)
        return self.split(Stream(x, (place / 7).sin(), self.time(t).unflatten(1, (2, DIM)), text, sequence, mask))

    def layer(self, i: int, stream: Stream) -> Stream:
        core = self.core if stream.mask is None else partial(self.core, mask=stream.mask)
        return stream._replace(x=self.blocks[i](stream, core, self.compute_dtype))

    def head(self, stream: Stream) -> Tensor:
        y = self.out(stream.x.to(self.compute_dtype or stream.x.dtype)).to(stream.x.dtype)
        return self.gather(y, stream.sequence)

    def forward(
        self, tokens: Tensor, t: Tensor, mask: Tensor | None = None, segments: tuple[int, ...] | None = None
    ) -> Tensor:
        stream = self.stem(tokens, t, mask, segments)
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

    def forward(self, stream: Stream, core: Callable, dtype: torch.dtype | None) -> Tensor:
        self.read = {name: p.dtype for name, p in self.named_parameters()}
        shift, gate = (self.table + stream.mod).unbind(1)
        y = self.norm(stream.x) + shift[:, None] + stream.place
        y = y.to(dtype or y.dtype)
        y = y + stream.text.mean(1, keepdim=True)
        q, k, v = (x.unflatten(-1, (-1, HEAD_DIM)) for x in (self.norm_q(self.q(y)), self.norm_k(self.k(y)), self.v(y)))
        y = self.o(core(q, k, v, stream.sequence).flatten(2))
        y = self.down(F.gelu(self.up(y)))
        return stream.x + gate[:, None] * y.to(stream.x.dtype)


class TinyTower(TinyLadder):
    """A ladder on items that lie one behind the other, as a vision tower's images.

    Called as `tower(rows, grids) -> y`: N 5 rows of all items; grids (parts, rows of a part) of each item, where parts
    do not know of each other; y N/2 5, as two neighbouring rows become one.
    """

    plan = replace(TinyLadder.plan, tokens={}, share="share", collect="collect", merge=2)

    def __init__(self, layers: int, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__(layers, compute_dtype)
        self.share: Callable = lambda rows, grids: (rows, grids)
        self.collect: Callable = identity

    def stem(self, rows: Tensor, grids: tuple[tuple[int, int], ...]) -> Stream:
        wide = torch.promote_types(rows.dtype, torch.float32)
        one = torch.ones(1, 3, device=rows.device, dtype=wide)
        sizes = [size for parts, size in grids for _ in range(parts)]
        place = torch.tensor([i for size in sizes for i in range(size)], device=rows.device, dtype=wide)
        segments = tuple(accumulate(sizes, initial=0))
        dtype = self.compute_dtype or rows.dtype
        return Stream(
            self.embed(rows[None].to(dtype)).to(wide),
            (place[:, None] / 7).sin().expand(-1, DIM),
            self.time(one).unflatten(1, (2, DIM)),
            self.read(one.to(dtype)).unflatten(1, (2, DIM)),
            Sequence(segments[-1], False, segments),
        )

    def forward(self, rows: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
        own, of = self.share(rows, grids)
        stream = self.stem(own, of)
        for i in range(len(self.blocks)):
            stream = self.layer(i, stream)
        return self.collect(self.head(stream)[0].unflatten(0, (-1, 2)).mean(1), grids)


class TwoLadders(TinyLadder):
    """A ladder in whose stem another runs, as a vision tower in a language model's.

    Called as `model(tokens, t, image, grids, owner, segments)`: image N P 5 are N items of one part; or, with grids
    (see `TinyTower`), rows 5. owner: of each item the sample to whose tokens it is added (without, one for each).
    """

    plan = replace(TinyLadder.plan, inner={"tower": TinyTower.plan})

    def __init__(self, layers: int = 3, compute_dtype: torch.dtype | None = None, inner_layers: int = 2) -> None:
        super().__init__(layers, compute_dtype)
        self.tower = TinyTower(inner_layers, compute_dtype)

    def stem(
        self,
        tokens: Tensor,
        t: Tensor,
        image: Tensor,
        grids: tuple[tuple[int, int], ...] | None = None,
        owner: tuple[int, ...] | None = None,
        segments: tuple[int, ...] | None = None,
    ) -> Stream:
        if grids is None:
            grids = ((1, image.shape[1]),) * len(image)
            image = image.flatten(0, 1)
        samples = range(len(tokens)) if owner is None else owner
        rows = [sample for sample, grid in zip(samples, grids, strict=True) for _ in range(prod(grid) // 2)]
        shares = [2 / prod(grid) for grid in grids for _ in range(prod(grid) // 2)]  # the mean over an item's rows
        seen = self.tower(image, grids) * torch.tensor(shares, device=tokens.device, dtype=tokens.dtype)[:, None]
        rows = torch.tensor(rows, device=tokens.device, dtype=torch.long)
        seen = torch.zeros_like(tokens[:, 0]).index_add(0, rows, seen)  # a graph through the tower, also of no item
        return super().stem(tokens + seen[:, None], t, segments=segments)

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        image: Tensor,
        grids: tuple[tuple[int, int], ...] | None = None,
        owner: tuple[int, ...] | None = None,
        segments: tuple[int, ...] | None = None,
    ) -> Tensor:
        stream = self.stem(tokens, t, image, grids, owner, segments)
        for i in range(len(self.blocks)):
            stream = self.layer(i, stream)
        return self.head(stream)
