"""Exact mode: Ulysses whose losses and gradients are the same bits on 1, 2 and 4 ranks. Slow; for verification.

A floating-point sum depends on its order, and a matrix product on the shapes of its matrices. So both are fixed:

- The tokens are always `CHUNKS` = 4 chunks; a rank holds 4, 2 or 1 of them. A layer, and the head, run once per chunk,
  never on two together. A chunk's graph is then the same on any number of ranks.
- At a seam, `core` or `gather`, the chunks of all ranks meet. Attention is computed head by head on whole sequences.
- What all chunks share (parameters, tensors of the stream without tokens) gets a gradient from each chunk. They are
  added as (0 + 1) + (2 + 3), on every rank. So every rank has whole gradients, and nothing is left to average.

To meet in the middle of a layer, a rank's chunks run in threads, one at a time. The backward needs no threads: each
chunk's graph is cut at the exchanges, and `torch.autograd.grad` walks its pieces in one order (what is behind an
exchange twice).

The same bits also need the same machine, kernels and number of threads. Stem and loss run on all tokens on every rank,
and so do ladders in the stem.
"""

from collections import abc
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.attention import dispatch, op
from mm_parallel.collectives import gather_rows
from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.context import set_seams, shard
from mm_parallel.context.shard import even, spans, take
from mm_parallel.context.ulysses import HEADS, TOKENS, move
from mm_parallel.fsdp import check_same_values
from mm_parallel.mesh import size, submesh
from mm_parallel.plan import ParallelPlan, Sequence
from mm_parallel.verify.rendezvous import Rendezvous

Model = TypeVar("Model", bound=nn.Module)
CHUNKS = 4
Span = tuple[int, int]


def parallelize(
    model: Model,
    plan: ParallelPlan,
    mesh: DeviceMesh | None = None,
    memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
) -> Model:
    """In place of `mm_parallel.parallelize`, in place: every sum of the model in one fixed order; returns it.

    Every rank keeps whole weights, and makes whole gradients. Raises ValueError for a mesh that is not Ulysses over 1,
    2 or 4 ranks, for a plan that names no tokens, for ranks with different values, and for any choice of memory.
    """
    if mesh is not None and (size(mesh, "ulysses") != mesh.size() or mesh.size() not in (1, 2, 4)):
        raise ValueError(_explain(size(mesh, "ulysses"), mesh.size()))
    plan.check(model)
    _check_memory(memory)
    if not plan.tokens:
        raise ValueError("the plan names no tokens, so there is nothing to sum in order: give ParallelPlan(tokens=…)")
    group = submesh(mesh, "cp").get_group() if size(mesh, "cp") > 1 else None
    if group:
        check_same_values(model, submesh(mesh, "cp"))  # FSDP does it where it shards
    seams = Exact(model, plan, group)
    set_seams(model, plan, seams.split, seams.core, seams.gather)
    seams.replace_layers_and_head(model)
    return model


def check_layout(parallel: ParallelConfig, world: int) -> None:
    """Raises ValueError for a layout of `world` ranks that cannot be verified."""
    whole = parallel.resolve(world)
    if world not in (1, 2, 4) or whole.ulysses != world:
        raise ValueError(_explain(whole.ulysses, world))


def _explain(ulysses: int | None, world: int) -> str:
    return (
        "exact needs Ulysses over all of 1, 2 or 4 ranks and nothing else, as its sums are four chunks of "
        f"tokens, added in one order: not ulysses={ulysses} of {world} ranks; give cp={world}, without "
        "tp, pp_layers or ring, on 1, 2 or 4 ranks"
    )


def _check_memory(memory: MemoryConfig) -> None:
    """Raises ValueError for what would run a layer, or sum its gradients, in another way."""
    names = "recompute", "but_attention", "offload", "offload_params", "reduce", "base", "host_layers"
    asked = {name: getattr(memory, name) for name in names}
    asked = {name: value for name, value in asked.items() if value not in ("none", 0, "float32", "dtype")}
    if asked:
        words = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        raise ValueError(f"exact with {words}: exact mode runs every layer as it is, and shards nothing; leave it out")


class Exact:
    """What stands in a model's seams and for its `layer` and `head`, on one rank.

    Between split and head, the stream is a list of streams, one for each chunk of this rank.

    group: the ranks that share the tokens; None for one rank.
    """

    def __init__(self, model: nn.Module, plan: ParallelPlan, group: dist.ProcessGroup | None) -> None:
        self.model, self.plan, self.group = model, plan, group
        self.rank, self.ranks = (group.rank(), group.size()) if group else (0, 1)
        self.own = CHUNKS // self.ranks  # chunks of a rank
        self.rendezvous: Rendezvous | None = None  # of the layer or head that runs

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def mine(self, of_chunks: abc.Sequence) -> list:
        return list(of_chunks[self.rank * self.own : (self.rank + 1) * self.own])

    def replace_layers_and_head(self, model: nn.Module) -> None:
        """Makes the model run its layers and head by ours. A head that is a module stays one: parameters keep names."""
        model.layer = partial(self.layer, model.layer)
        if isinstance(model.head, nn.Module):
            model.head.forward = partial(self.head, model.head.forward)
        else:
            model.head = partial(self.head, model.head)

    def split(self, stream: Any) -> list[Any]:
        dims, tensors = shard.token_dims(stream, self.plan.tokens), _tensors(stream)
        pieces = spans(even(stream.sequence.tokens, CHUNKS))
        flat = _Split.apply(self, [dims.get(name) for name in tensors], pieces, *tensors.values())
        return self._refill([stream] * self.own, flat)

    def layer(self, layer: Callable, i: int, streams: list[Any]) -> list[Any]:
        outputs, flat = self._run(partial(layer, i), streams, False)
        return self._refill(outputs, flat)

    def head(self, head: Callable, streams: list[Any]) -> Tensor:
        return self._run(head, streams, True)[1][0]

    def core(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence, mask: Tensor | None = None) -> Tensor:
        op.check(q, k, v, sequence.causal)
        op.check_mask(mask, q, sequence.tokens, sequence.causal, sequence.segments)
        if sequence.segments is not None:
            op.check_segments(sequence.segments, sequence.tokens)
        if q.shape[HEADS] != k.shape[HEADS]:  # each chunk sums over the heads that share one, in one order
            k, v = (x.repeat_interleave(q.shape[HEADS] // x.shape[HEADS], HEADS) for x in (k, v))
        return self.rendezvous.meet((q, k, v), partial(self._attend, sequence, mask))

    def gather(self, x: Tensor, sequence: Sequence) -> Tensor:
        return self.rendezvous.meet((x,), partial(self._gather, sequence.tokens))

    def _run(self, function: Callable, streams: list[Any], joins: bool) -> tuple[list[Any], tuple[Tensor, ...]]:
        """The function of each stream, as it gave them (streams to fill) and as tensors that autograd knows."""
        self.rendezvous = rendezvous = Rendezvous(self.own)
        inputs = [x for stream in streams for x in _tensors(stream).values()]
        try:
            flat = _Run.apply(
                self, rendezvous, function, streams, joins, torch.is_grad_enabled(), *inputs, *self.parameters
            )
        finally:
            self.rendezvous = None
        return rendezvous.results, flat

    def _refill(self, streams: list[Any], flat: abc.Sequence[Tensor]) -> list[Any]:
        parts = _by_chunk(flat, len(streams))
        return [s._replace(**dict(zip(_tensors(s), part, strict=True))) for s, part in zip(streams, parts, strict=True)]

    def _attend(
        self, sequence: Sequence, mask: Tensor | None, sent: list[tuple[Tensor, ...]]
    ) -> tuple[list[Tensor], Callable]:
        first = sent[0][0]
        chunks, heads = even(sequence.tokens, CHUNKS), spans(even(first.shape[HEADS], self.ranks))
        of_ranks = [sum(chunks[rank * self.own : (rank + 1) * self.own]) for rank in range(self.ranks)]

        def to_heads(parts: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
            """By chunk, its tokens of some tensors -> by head of this rank, all tokens of these tensors."""
            xs = [torch.cat(x, TOKENS) for x in zip(*parts, strict=True)]
            if self.group:
                xs = move(xs, HEADS, [heads] * len(xs), TOKENS, [of_ranks] * len(xs), self.group)
            # in memory of its own: for other strides a kernel may go another way
            return list(zip(*([x.contiguous() for x in whole.split(1, HEADS)] for whole in xs), strict=True))

        def to_chunks(parts: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
            """The way back."""
            xs = [torch.cat(x, HEADS) for x in zip(*parts, strict=True)]
            if self.group:
                sizes = [stop - start for start, stop in heads]
                xs = move(xs, TOKENS, [spans(of_ranks)] * len(xs), HEADS, [sizes] * len(xs), self.group)
            return list(
                zip(*([x.contiguous() for x in own.split(self.mine(chunks), TOKENS)] for own in xs), strict=True)
            )

        segments, qkv = op.parting(sequence.segments), to_heads(sent)
        q, k, _ = qkv[0]  # one head, with all tokens: alike on every rank
        rest = op.scale_of(first), sequence.causal, op.backend_of(q, k, "auto", mask, segments), mask, segments
        results = [dispatch.forward(*head, *rest) for head in qkv]

        def back(grads: list[Tensor]) -> list[tuple[Tensor, ...]]:
            douts = to_heads([(grad,) for grad in grads])
            triples = zip(douts, qkv, results, strict=True)
            return to_chunks([dispatch.backward(dout, *head, *result, *rest) for (dout,), head, result in triples])

        return [out for (out,) in to_chunks([(out,) for out, _ in results])], back

    def _gather(self, tokens: int, sent: list[tuple[Tensor]]) -> tuple[list[Tensor], Callable]:
        pieces = spans(even(tokens, CHUNKS))
        whole = self.join([x for (x,) in sent], 1, pieces)

        def back(grads: list[Tensor]) -> list[tuple[Tensor]]:
            return [(take(grads[0], 1, [piece]),) for piece in self.mine(pieces)]  # of the first: see _Run.backward

        return [whole.clone() for _ in sent], back

    def join(self, parts: list[Tensor], dim: int, pieces: list[Span]) -> Tensor:
        """The whole of what all chunks of all ranks have parts of along dim."""
        x = torch.cat(parts, dim)
        held = [pieces[rank * self.own : (rank + 1) * self.own] for rank in range(self.ranks)]
        return shard.join(x, dim, held, self.group) if self.group else x

    def sums(self, parts: list[abc.Sequence[Tensor | None]], like: abc.Sequence[Tensor]) -> list[Tensor | None]:
        """Some tensors' sums over all chunks of all ranks, given by chunk; None for a tensor that no chunk has."""
        columns = list(zip(*parts, strict=True))
        used = torch.tensor([any(x is not None for x in column) for column in columns], dtype=torch.int32)
        if self.group and columns:
            used = used.to(like[0].device)
            dist.all_reduce(used, dist.ReduceOp.MAX, group=self.group)
        places = [i for i, use in enumerate(used.tolist()) if use]
        own = [_tree([torch.zeros_like(like[i]) if x is None else x for x in columns[i]]) for i in places]
        totals = {
            i: _tree(list(column)) for i, column in zip(places, zip(*self._of_ranks(own), strict=True), strict=True)
        }
        return [totals.get(i) for i in range(len(columns))]

    def _of_ranks(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """By rank, its tensors of the same shapes; as bytes, so that one collective takes all dtypes."""
        if not self.group or not tensors:
            return [tensors]
        sent = [x.contiguous().view(-1).view(torch.uint8) for x in tensors]
        sizes, flat = [len(x) for x in sent], torch.cat(sent)
        return [
            [piece.clone().view(x.dtype).view(x.shape) for piece, x in zip(part.split(sizes), tensors, strict=True)]
            for part in gather_rows(flat, self.group).chunk(self.ranks)
        ]


class _Split(torch.autograd.Function):
    """Tensors of a stream -> those of each chunk, chunk by chunk."""

    @staticmethod
    def forward(ctx, exact: Exact, dims: list[int | None], pieces: list[Span], *tensors: Tensor):
        ctx.exact, ctx.dims, ctx.pieces = exact, dims, pieces
        chunks = [
            [x.clone() if dim is None else take(x, dim, [piece]) for x, dim in zip(tensors, dims, strict=True)]
            for piece in exact.mine(pieces)
        ]
        ctx.mark_non_differentiable(
            *(out for chunk in chunks for out, x in zip(chunk, tensors, strict=True) if not x.requires_grad)
        )
        return tuple(x for chunk in chunks for x in chunk)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        columns = zip(*_by_chunk(grads, ctx.exact.own), strict=True)
        wholes: list[Tensor | None] = []
        for column, dim, needed in zip(columns, ctx.dims, ctx.needs_input_grad[3:], strict=True):
            if not needed:
                wholes.append(None)
            elif dim is None:
                wholes.extend(ctx.exact.sums([[x] for x in column], column))
            else:
                wholes.append(ctx.exact.join(list(column), dim, ctx.pieces))
        return None, None, None, *wholes


class _Run(torch.autograd.Function):
    """A function of each chunk's stream: tensors of the streams, and parameters -> tensors of its results.

    joins: the function's result is whole, the same from every chunk, and given once.
    """

    @staticmethod
    def forward(
        ctx, exact: Exact, rendezvous: Rendezvous, function: Callable, streams: list, joins: bool, grad: bool, *tensors
    ):
        ctx.parameters = exact.parameters
        own = _by_chunk(tensors[: len(tensors) - len(ctx.parameters)], exact.own)
        leaves = [[x.detach().requires_grad_(grad and x.requires_grad) for x in chunk] for chunk in own]
        inputs = exact._refill(streams, [x for chunk in leaves for x in chunk])
        results = rendezvous.run([partial(function, stream) for stream in inputs], grad)
        outputs = [[results[0]]] + [[]] * (exact.own - 1) if joins else [list(_tensors(s).values()) for s in results]
        ctx.set_materialize_grads(False)
        ctx.exact, ctx.rendezvous, ctx.joins, ctx.leaves, ctx.outputs = exact, rendezvous, joins, leaves, outputs
        flat = {x: x.detach().clone() for chunk in outputs for x in chunk}
        ctx.mark_non_differentiable(*(new for x, new in flat.items() if not x.requires_grad))
        return tuple(flat[x] for chunk in outputs for x in chunk)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        exact, grad_of = ctx.exact, iter(grads)
        results = [[(x, next(grad_of)) for x in chunk] for chunk in ctx.outputs]
        sent: list[list] = [[] for _ in results]
        for exchange in reversed(ctx.rendezvous.exchanges):
            received = [
                _grad(result + more, [x], keep=True)[0]
                for result, more, x in zip(results, sent, exchange.received, strict=True)
            ]
            filled = [torch.zeros_like(x) if g is None else g for x, g in zip(exchange.received, received, strict=True)]
            with torch.no_grad():
                back = exchange.back(filled)
            for more, tensors, given in zip(sent, exchange.sent, back, strict=True):
                more += zip(tensors, given, strict=True)
        if ctx.joins and exact.rank != 0:  # what comes behind the join is everywhere; it counts once
            results[0] = []
        by_chunk = [
            _grad(result + more, [*leaves, *ctx.parameters], keep=False)
            for result, more, leaves in zip(results, sent, ctx.leaves, strict=True)
        ]
        fields = len(ctx.leaves[0])
        shared = exact.sums([given[fields:] for given in by_chunk], ctx.parameters)
        return *(None for _ in range(6)), *(x for given in by_chunk for x in given[:fields]), *shared


def _grad(roots: list[tuple[Tensor, Tensor | None]], inputs: list[Tensor], keep: bool) -> list[Tensor | None]:
    """`torch.autograd.grad` for roots and inputs of which some have none."""
    roots = [(x, grad) for x, grad in roots if grad is not None and x.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not roots or not wanted:
        return [None] * len(inputs)
    outputs, weights = zip(*roots, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, weights, retain_graph=keep, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


def _tree(parts: list[Tensor]) -> Tensor:
    """The sum of 1, 2 or 4, neighbours first."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _tensors(stream: Any) -> dict[str, Tensor]:
    return {name: x for name, x in stream._asdict().items() if isinstance(x, Tensor)}


def _by_chunk(flat: abc.Sequence[Tensor], chunks: int) -> list[list[Tensor]]:
    fields = len(flat) // chunks
    return [list(flat[i * fields : (i + 1) * fields]) for i in range(chunks)]
