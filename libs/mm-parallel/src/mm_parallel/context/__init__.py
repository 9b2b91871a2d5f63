"""Context parallelism: the ranks of "cp" (ring x ulysses) share the tokens of a sample.

`cut` sets the three seams of a ladder. Everything between attentions then runs on a part of the tokens; what the plan
does not name as tokens (text, modulation, masks of keys) stays whole on every rank. The items of a ladder in the stem
are shared, see `mm_parallel.context.items`. Loss and gradients are those of one device.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.attention import attention, ring_attention
from mm_parallel.attention.op import check, check_mask
from mm_parallel.context import shard
from mm_parallel.context.items import Items
from mm_parallel.context.shard import TokenLayout, spans
from mm_parallel.context.ulysses import HEADS, TOKENS, HeadLayout, exchange, repeat
from mm_parallel.mesh import rank_in, size, submesh
from mm_parallel.plan import ParallelPlan, Sequence


def cut(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh | None, backend: str = "auto") -> None:
    """Sets the seams of the model, and of inner ladders, for the ring and ulysses axes of the mesh.

    backend: what computes attention, see `mm_parallel.attention.attention`.
    Raises ValueError where a plan names a seam that the ladder does not have, and for a plan without tokens.
    """
    check_tokens(plan)
    ranks = Context(mesh)
    core = partial(ranks.attention, backend=backend)
    set_seams(model, plan, partial(ranks.split, fields=plan.tokens), core, ranks.gather)
    for prefix, ladder, own in plan.ladders(model):
        if prefix and own.share and ranks.groups:
            items = Items(ranks.rank, ranks.groups["cp"], own.merge)
            own.set_seam(ladder, own.share, items.share)
            own.set_seam(ladder, own.collect, items.collect)


def check_tokens(plan: ParallelPlan) -> None:
    """Raise ValueError for a plan by which context parallelism cuts nothing."""
    if not plan.tokens:
        raise ValueError("the plan names no tokens, so nothing can be cut over cp: give ParallelPlan(tokens={…: dim})")


def set_seams(model: nn.Module, plan: ParallelPlan, split: object, core: object, join: object) -> None:
    """Sets the attributes that the plan calls split, core and gather; ValueError where there are none."""
    for path, seam in ((plan.split, split), (plan.core, core), (plan.gather, join)):
        plan.set_seam(model, path, seam)


class Context:
    """The ranks that share the tokens of a sample: sizes, places and groups, asked of the mesh once.

    mesh: None for one rank alone.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.sizes = size(mesh, "ring"), size(mesh, "ulysses")
        self.ring, self.ulysses, self.rank = rank_in(mesh, "ring"), rank_in(mesh, "ulysses"), rank_in(mesh, "cp")
        self.groups = (
            {} if mesh is None else {axis: submesh(mesh, axis).get_group() for axis in ("ring", "ulysses", "cp")}
        )

    def layout(self, sequence: Sequence) -> TokenLayout:
        """Who holds which of its tokens."""
        return TokenLayout(sequence.tokens, *self.sizes, sequence.causal)

    def split(self, stream: Any, fields: Mapping[str, int]) -> Any:
        """This rank's part of a stream; fields: a plan's `tokens`."""
        return shard.split(stream, fields, self.layout(stream.sequence), self.rank)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequence: Sequence,
        mask: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """See `context_attention`."""
        layout = self.layout(sequence)
        own = layout.shares(self.ring)
        if not q.shape[TOKENS] == k.shape[TOKENS] == own[self.ulysses]:
            raise ValueError(
                f"attention of {q.shape[TOKENS]} queries and {k.shape[TOKENS]} keys, but of {layout.tokens} tokens "
                f"this rank (ring {self.ring} of {layout.ring}, ulysses {self.ulysses} of {layout.ulysses}) has "
                f"{own[self.ulysses]}"
            )
        check(q, k, v, sequence.causal)
        check_mask(mask, q, layout.tokens, sequence.causal, sequence.segments)
        scale = q.shape[-1] ** -0.5
        if layout.ulysses > 1:
            heads = HeadLayout(q.shape[HEADS], k.shape[HEADS], layout.ulysses)
            pieces = heads.queries, heads.keys, heads.keys
            q, k, v = exchange((q, k, v), HEADS, pieces, TOKENS, [own] * 3, self.groups["ulysses"])
            k, v = (repeat(x, heads.copies(self.ulysses)) for x in (k, v))
        if layout.ring > 1:
            ring = layout.chunks, self.groups["ring"]
            out = ring_attention(q, k, v, *ring, sequence.causal, scale, backend, mask, sequence.segments)
        else:
            out = attention(q, k, v, sequence.causal, scale, backend, sequence.segments, mask)
        if layout.ulysses > 1:
            sizes = [stop - start for start, stop in heads.queries]
            (out,) = exchange((out,), TOKENS, [spans(own)], HEADS, [sizes], self.groups["ulysses"])
        return out

    def gather(self, x: Tensor, sequence: Sequence) -> Tensor:
        """See `gather`."""
        return shard.Gather.apply(x, self.layout(sequence), self.groups["cp"]) if self.groups else x


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: Sequence,
    mesh: DeviceMesh | None,
    backend: str = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """Attention between all tokens of the sequence, of which this rank holds those of q, k and v: B L H h -> B L H h.

    k and v: B L K h, where K divides H: each of their heads is shared by H/K neighbouring heads of q.
    Which tokens these are says `mm_parallel.context.shard`. mask: B tokens, bool, of all tokens: True for a key that is
    attended; the same on every rank. Raises ValueError for another number of tokens or heads, and for a mask together
    with causal or packed samples. In a loop, ask a `Context` instead: to look into a mesh takes a millisecond.
    """
    return Context(mesh).attention(q, k, v, sequence, mask, backend)


def gather(x: Tensor, sequence: Sequence, mesh: DeviceMesh | None) -> Tensor:
    """B L … of this rank's tokens -> B tokens … of all, in their order, on every rank."""
    return Context(mesh).gather(x, sequence)
