"""Context parallelism: the ranks of "cp" (ring x ulysses) share the tokens of a sample.

`cut` sets the three seams of a ladder. Everything between attentions then runs on a part of the tokens; what the plan
does not name as tokens (text, modulation) stays whole on every rank. Loss and gradients are those of one device.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.attention import attention, ring_attention
from mm_parallel.context import shard
from mm_parallel.context.exact import Exact
from mm_parallel.context.exact import check as check_exact  # noqa: F401 (parallelize asks it)
from mm_parallel.context.shard import TokenLayout, even
from mm_parallel.context.ulysses import HEADS, TOKENS, exchange
from mm_parallel.fsdp import check_same_values
from mm_parallel.mesh import rank_in, size, submesh
from mm_parallel.plan import ParallelPlan


def cut(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh | None, exact: bool = False) -> None:
    """Sets the model's split, core and gather for the ring and ulysses axes of the mesh. Raises ValueError where the
    plan names a seam that the model does not have, or no tokens. exact: see `mm_parallel.context.exact`."""
    if not plan.tokens:
        raise ValueError("the plan names no tokens, so nothing can be cut over cp: give ParallelPlan(tokens={…: dim})")
    if exact:
        group = submesh(mesh, "cp").get_group() if size(mesh, "cp") > 1 else None
        if group:
            check_same_values(model, submesh(mesh, "cp"))  # FSDP does it where it shards
        seams = Exact(model, plan, group)
        split, core, join = seams.split, seams.core, seams.gather
        seams.replace_layers_and_head(model)
    else:
        ranks = Context(mesh, plan.causal)
        split, core, join = partial(ranks.split, fields=plan.tokens), ranks.attention, ranks.gather
    for path, seam in ((plan.split, split), (plan.core, core), (plan.gather, join)):
        _set(model, path, plan, seam)


class Context:
    """The ranks that share the tokens of a sample: sizes, places and groups, asked of the mesh once.

    mesh: None for one rank alone.
    """

    def __init__(self, mesh: DeviceMesh | None, causal: bool = False) -> None:
        self.causal = causal
        self.sizes = size(mesh, "ring"), size(mesh, "ulysses")
        self.ring, self.ulysses, self.rank = rank_in(mesh, "ring"), rank_in(mesh, "ulysses"), rank_in(mesh, "cp")
        self.groups = (
            {} if mesh is None else {axis: submesh(mesh, axis).get_group() for axis in ("ring", "ulysses", "cp")}
        )

    def layout(self, tokens: int) -> TokenLayout:
        """Who holds which of so many tokens."""
        return TokenLayout(tokens, *self.sizes, self.causal)

    def split(self, stream: Any, fields: Mapping[str, int]) -> Any:
        """This rank's part of a stream; fields: a plan's `tokens`."""
        ring, ulysses = self.sizes
        return shard.split(stream, fields, ring, ulysses, self.rank, self.causal)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, tokens: int, backend: str | None = None) -> Tensor:
        """See `context_attention`."""
        layout = self.layout(tokens)
        own, heads = layout.shares(self.ring), even(q.shape[HEADS], layout.ulysses)
        if not q.shape[TOKENS] == k.shape[TOKENS] == own[self.ulysses]:
            raise ValueError(
                f"attention of {q.shape[TOKENS]} queries and {k.shape[TOKENS]} keys, but of {tokens} tokens this rank "
                f"(ring {self.ring} of {layout.ring}, ulysses {self.ulysses} of {layout.ulysses}) has "
                f"{own[self.ulysses]}"
            )
        scale = q.shape[-1] ** -0.5
        if layout.ulysses > 1:
            q, k, v = exchange((q, k, v), HEADS, heads, TOKENS, own, self.groups["ulysses"])
        if layout.ring > 1:
            out = ring_attention(q, k, v, layout.chunks, self.groups["ring"], self.causal, scale, backend)
        else:
            out = attention(q, k, v, self.causal, scale, backend)
        if layout.ulysses > 1:
            (out,) = exchange((out,), TOKENS, own, HEADS, heads, self.groups["ulysses"])
        return out

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """See `gather`."""
        return shard.Gather.apply(x, self.layout(tokens), self.groups["cp"]) if self.groups else x


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: int,
    mesh: DeviceMesh | None,
    causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention between all `tokens` of the sequence, of which this rank holds those of q, k and v: B L H h -> B L H h.

    Which these are says `mm_parallel.context.shard`. Raises ValueError for another number of tokens. In a loop, ask a
    `Context` instead: to look into a mesh takes a millisecond.
    """
    return Context(mesh, causal).attention(q, k, v, tokens, backend)


def gather(x: Tensor, tokens: int, mesh: DeviceMesh | None, causal: bool = False) -> Tensor:
    """B L … of this rank's tokens -> B tokens … of all, in their order, on every rank."""
    return Context(mesh, causal).gather(x, tokens)


def _set(model: nn.Module, path: str, plan: ParallelPlan, seam: object) -> None:
    parent, _, name = path.rpartition(".")
    first = path.partition(".")[0]
    if first in plan.last and getattr(model, first, None) is None:  # a pipeline stage without its head
        return
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        owner = None
    if not hasattr(owner, name):
        raise ValueError(f"the plan's seam {path!r} is no attribute of {type(model).__name__}")
    setattr(owner, name, seam)
