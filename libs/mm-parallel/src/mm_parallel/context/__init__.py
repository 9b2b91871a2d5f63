"""Context parallelism: the ranks of "cp" (ring x ulysses) share the tokens of a sample.

`cut` sets the three seams of a ladder. Everything between attentions then runs on a part of the tokens; what the plan
does not name as tokens (text, modulation, masks of keys) stays whole on every rank. Loss and gradients are those of one
device.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.attention import attention, ring_attention
from mm_parallel.attention.op import check_mask
from mm_parallel.context import shard
from mm_parallel.context.shard import TokenLayout, even
from mm_parallel.context.ulysses import HEADS, TOKENS, exchange
from mm_parallel.mesh import rank_in, size, submesh
from mm_parallel.plan import ParallelPlan, Sequence


def cut(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh | None) -> None:
    """Sets the seams of the model, and of inner ladders, for the ring and ulysses axes of the mesh.

    Raises ValueError where a plan names a seam that the ladder does not have, and for a plan without tokens.
    """
    if not plan.tokens:
        raise ValueError("the plan names no tokens, so nothing can be cut over cp: give ParallelPlan(tokens={…: dim})")
    for prefix, ladder, own in plan.ladders(model):
        if own.tokens:
            ranks = InnerContext(mesh) if prefix else Context(mesh)
            set_seams(ladder, own, partial(ranks.split, fields=own.tokens), ranks.attention, ranks.gather)


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
        backend: str | None = None,
    ) -> Tensor:
        """See `context_attention`."""
        layout = self.layout(sequence)
        own, heads = layout.shares(self.ring), even(q.shape[HEADS], layout.ulysses)
        if not q.shape[TOKENS] == k.shape[TOKENS] == own[self.ulysses]:
            raise ValueError(
                f"attention of {q.shape[TOKENS]} queries and {k.shape[TOKENS]} keys, but of {layout.tokens} tokens "
                f"this rank (ring {self.ring} of {layout.ring}, ulysses {self.ulysses} of {layout.ulysses}) has "
                f"{own[self.ulysses]}"
            )
        if layout.ring > 1 and sequence.segments is not None:
            raise ValueError(
                f"{len(sequence.segments) - 1} packed samples over ring={layout.ring}: a ring takes one sample; use "
                "ulysses for all of cp, or do not pack"
            )
        check_mask(mask, q, layout.tokens, sequence.causal, sequence.segments)
        scale = q.shape[-1] ** -0.5
        if layout.ulysses > 1:
            q, k, v = exchange((q, k, v), HEADS, heads, TOKENS, own, self.groups["ulysses"])
        if layout.ring > 1:
            out = ring_attention(q, k, v, layout.chunks, self.groups["ring"], sequence.causal, scale, backend, mask)
        else:
            out = attention(q, k, v, sequence.causal, scale, backend, sequence.segments, mask)
        if layout.ulysses > 1:
            (out,) = exchange((out,), TOKENS, own, HEADS, heads, self.groups["ulysses"])
        return out

    def gather(self, x: Tensor, sequence: Sequence) -> Tensor:
        """See `gather`."""
        return shard.Gather.apply(x, self.layout(sequence), self.groups["cp"]) if self.groups else x


class InnerContext(Context):
    """The same for a ladder in another's stem.

    Only Ulysses ranks share its tokens, as they may be packed samples (images), which a ring does not take. Ranks of a
    ring do the same.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__(mesh)
        self.sizes, self.ring, self.rank = (1, self.sizes[1]), 0, self.ulysses

    def gather(self, x: Tensor, sequence: Sequence) -> Tensor:
        """All tokens on every rank, for an outer ladder that cuts its own."""
        if not self.groups:
            return x
        return shard.InnerGather.apply(x, self.layout(sequence), self.groups["ulysses"], self.groups["cp"])


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: Sequence,
    mesh: DeviceMesh | None,
    backend: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention between all tokens of the sequence, of which this rank holds those of q, k and v: B L H h -> B L H h.

    Which these are says `mm_parallel.context.shard`. mask: B tokens, bool, of all tokens: True for a key that is
    attended; the same on every rank. Raises ValueError for another number of tokens, for packed samples over a ring,
    and for a mask together with causal or packed samples. In a loop, ask a `Context` instead: to look into a mesh takes
    a millisecond.
    """
    return Context(mesh).attention(q, k, v, sequence, mask, backend)


def gather(x: Tensor, sequence: Sequence, mesh: DeviceMesh | None) -> Tensor:
    """B L … of this rank's tokens -> B tokens … of all, in their order, on every rank."""
    return Context(mesh).gather(x, sequence)
