"""One run of every kind of unit on the meta device: what it keeps, what it needs while it runs, which kernels.

A unit is the stem, one layer with its companions, or the head with the loss. Units of one kind have parameters of the
same shapes and run the same operations: the first of them stands for all. The code that runs is that of training:
`tensor.cut`, `context.cut` and `recompute` have cut and wrapped it, and only what is sent is left out.

*Counted*: bytes by storage, as tensors come and go (`PeakMemory`), and kernels (`mm_parallel.estimate.kernels`).
Not seen: what a kernel uses while it runs, and the buffers of a ring.
Values are not known here. So every label counts, and attention is that of `mm_parallel.attention` on every device.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mm_parallel import context, tensor
from mm_parallel.attention import core
from mm_parallel.config import Base, MemoryConfig, ParallelConfig
from mm_parallel.estimate.counting import (
    Counting,
    Door,
    Held,
    NamedAttention,
    Operations,
    bytes_of,
    end_of,
    enter,
    running,
    skip,
)
from mm_parallel.estimate.ranks import FullestItems
from mm_parallel.estimate.traces import Around, Traces, UnitTrace, Way, way_of
from mm_parallel.frozen import hold
from mm_parallel.meta import MetaMesh
from mm_parallel.plan import ParallelPlan
from mm_parallel.recompute import recompute

Losses = Callable[[Tensor], Tensor]


class Units:
    """The units of a model. Each kind runs once for every way of cutting that is asked for, and is kept.

    model: whole, on the meta device, with adapters and `requires_grad`; it is not changed.
    dtype: of the computation; None: as parameters are.
    example: arguments of the model for one micro-batch of one data rank; tensors on the meta device, facts as they are.
    losses: output -> losses of any shape, as the training has them. None: squares of the output in float32.
    base: what frozen matrices are held in (`mm_parallel.frozen`); None: they are parameters like others.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ParallelPlan,
        dtype: torch.dtype | None,
        example: Mapping[str, Any],
        losses: Losses | None = None,
        base: Base | None = None,
    ) -> None:
        plan.check(model)
        self.plan, self.dtype, self.example = plan, dtype, example
        self.base = base
        self.losses = losses or (lambda output: output.float().square())
        self.layers: dict[str, list[str]] = {}
        """Names of the layers of each ladder, by its prefix."""
        self.companions: dict[str, list[str]] = {}
        """Of each layer that has some, in the order in which they run before it."""
        for prefix, ladder, own in plan.ladders(model):
            units = own.units_in_order(ladder)
            self.layers[prefix] = [prefix + name for name in units if name not in own.companions]
            for name, number in own.companions.items():
                self.companions.setdefault(self.layers[prefix][number], []).append(prefix + name)
        self._look(model)
        others = [name for name, first in self.kinds.items() if name != first]
        others += [companion for name in others for companion in self.companions.get(name, ())]
        self.bones = copy.deepcopy(model, {id(model.get_submodule(name)): None for name in others})
        self._twins: dict[tuple[Way, str], nn.Module] = {}
        self._meshes: dict[tuple[Way, str], MetaMesh] = {}
        self._stems: dict[Way, _Stem] = {}
        self._traces: dict[tuple[Way, str, str, frozenset[str] | None], UnitTrace] = {}
        self._heads: dict[tuple[Way, bool, bool], tuple[UnitTrace, int]] = {}

    def _look(self, model: nn.Module) -> None:
        """Runs the whole model once, to see which layers are of one kind, and what requires a gradient."""
        whole = copy.deepcopy(model)
        seen: dict[tuple, str] = {}
        self.kinds: dict[str, str] = {}
        """For each layer the name of the first of its kind."""
        self.trained: dict[str, frozenset[str]] = {}
        """The fields of the stream that require a gradient when they enter a layer; "": when they leave the last."""
        self.travels: dict[str, frozenset[str]] = {}
        """By prefix, the fields that some layer changes."""

        def watch(prefix: str, ladder: nn.Module) -> Callable[[int, Any], Any]:
            layer = ladder.layer  # bound, as this takes its place

            def watched(i: int, stream: Any) -> Any:
                name = self.layers[prefix][i]
                self.trained[name] = _trained(stream)
                stream = _cut_off(stream)
                with Operations() as operations:
                    following = layer(i, stream)
                parts = [whole.get_submodule(part) for part in (*self.companions.get(name, ()), name)]
                shapes = [(p.shape, p.dtype, p.requires_grad) for part in parts for p in part.parameters()]
                kind = (prefix, tuple(shapes), self.trained[name], tuple(operations.seen))
                self.kinds[name] = seen.setdefault(kind, name)
                changed = {n for n, a, b in zip(stream._fields, stream, following, strict=True) if a is not b}
                self.travels[prefix] = self.travels.get(prefix, frozenset()) | changed
                self.trained[prefix] = _trained(following)
                return following

            return watched

        for prefix, ladder, own in self.plan.ladders(whole):
            _name_core(ladder, own)
            ladder.layer = watch(prefix, ladder)
        with torch.enable_grad(), NamedAttention():
            stream = whole.stem(**self.example)
            for i in range(len(self.layers[""])):
                stream = whole.layer(i, stream)

    def trace(self, layout: ParallelConfig, words: Mapping[str, str], split: Iterable[Sequence[str]] = ()) -> Traces:
        """Of stem, head, and the layers of `words`: what each recomputes. layout: resolved; its stages do not matter.

        A layer's name has its ladder's prefix: "blocks.0", "visual.blocks.0". split: of each stage whose backwards are
        in halves, the units in the order in which they run.
        """
        way = way_of(layout)
        stem = self._stem(way)
        units = {"stem": stem.trace}
        returned = None
        for names in split:
            above = frozenset[str]()  # what the last one hands on is cut from the graph
            for name in reversed(names):
                if name == "head":
                    units[name], returned = self._head(way, layout.pp > 1, True)
                else:
                    units[name] = self._layer(way, "", self.kinds[name], words[name], above)
                above = units[name].halves.reaches
        for prefix, names in self.layers.items():
            others = [name for name in names if name in words and name not in units]
            units |= {name: self._layer(way, prefix, self.kinds[name], words[name], None) for name in others}
        if returned is None:
            units["head"], returned = self._head(way, layout.pp > 1, False)
        streams = {
            prefix: _sizes(entry, self.tracked if layout.splits and not prefix else self.trained[prefix])
            for prefix, entry in stem.entries.items()
        }
        return Traces(units, stem.around, streams, returned)

    @cached_property
    def tracked(self) -> frozenset[str]:
        """The fields of the stream that require a gradient behind the first stage of a pipeline that splits backwards:
        there they do as though nothing was frozen (`mm_parallel.pipeline.chunk`).
        """
        bones = copy.deepcopy(self.bones).requires_grad_()
        for prefix, ladder, _ in self.plan.ladders(bones):
            if prefix:
                ladder.layer = lambda i, stream: stream
        with torch.enable_grad(), NamedAttention():
            return _trained(bones.stem(**self.example))

    def twin(self, way: Way, word: str = "none") -> nn.Module:
        """The model with one layer of each kind, cut and wrapped, the others None; on the meta device."""
        if (way, word) in self._twins:
            return self._twins[way, word]
        twin = copy.deepcopy(self.bones)
        plan = self.plan.on(twin)
        if self.base is not None:
            hold(twin, plan, self.base)
        if way.sharded and self.dtype is not None:
            in_fp32 = {p for _, ladder, own in plan.ladders(twin) for p in own.fp32_parameters(ladder).values()}
            for parameter in twin.parameters():
                if parameter not in in_fp32 and parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.dtype)
        mesh = MetaMesh(ParallelConfig(dp_shard=1, ring=way.ring, ulysses=way.ulysses, tp=way.tp).resolve(way.ranks))
        if way.tp > 1:
            tensor.cut(twin, plan, mesh)
        cuts_tokens = way.ring * way.ulysses > 1
        if cuts_tokens:
            context.cut(twin, plan, mesh)
        for prefix, ladder, own in plan.ladders(twin):
            if not cuts_tokens or prefix:
                _name_core(ladder, own)
            if cuts_tokens and prefix and own.share:
                items = FullestItems(0, mesh.get_group("cp"), own.merge)
                own.set_seam(ladder, own.share, items.share)
                own.set_seam(ladder, own.collect, items.collect)
        recompute(twin, plan, MemoryConfig(recompute=word), core_is_cut=cuts_tokens)
        self._twins[way, word], self._meshes[way, word] = twin, mesh
        return twin

    def _stem(self, way: Way) -> "_Stem":
        if way not in self._stems:
            self._stems[way] = self._run_stem(way)
        return self._stems[way]

    def _run_stem(self, way: Way) -> "_Stem":
        twin, mesh = self.twin(way), self._meshes[way, "none"]
        entries: dict[str, Any] = {}
        around: dict[str, Around] = {}
        ladders = [(prefix, ladder) for prefix, ladder, _ in self.plan.ladders(twin) if prefix]
        counting = Counting(mesh)

        def stand_in(prefix: str, ladder: nn.Module) -> Callable[[int, Any], Any]:
            def layer(i: int, stream: Any) -> Any:
                if prefix in entries:
                    return stream
                entries[prefix], made = _describe(stream), counting.now
                around[prefix] = Around(made, 0)

                def note(grad: Tensor) -> None:
                    waits = counting.now - counting.settled - grad.untyped_storage().nbytes()
                    around[prefix] = Around(made, waits)

                travels, after = self.travels[prefix], self.trained[prefix]
                through = {name: skip(getattr(stream, name), note if name in after else None) for name in travels}
                return stream._replace(**through)

            return layer

        try:
            for prefix, ladder in ladders:
                ladder.layer = stand_in(prefix, ladder)
            example, held, left = tree_map_only(Tensor, torch.empty_like, dict(self.example)), Held(), Held()
            held.watch(example, example)
            with running(counting, twin):
                stream = twin.stem(**example)
                example = None
                forward, kernels, sent = counting.peak, *counting.take()
                end = end_of([x for x in stream if isinstance(x, Tensor)])
                output = bytes_of([getattr(stream, name) for name in self.travels[""]])
                entries[""] = _describe(stream)
                left.watch(stream, self.travels[""])
                stream = None
                saved, refers = counting.now, (held.find(), frozenset(), self.travels[""], left.find())
                made = counting.back(end)
        finally:
            for _, ladder in ladders:
                ladder.__dict__.pop("layer", None)
        back_kernels, back_sent = counting.take()
        runs = kernels, back_kernels, sent, back_sent
        trace = UnitTrace(saved, 0, 0, output, forward, *made, *refers, *runs)
        return _Stem(trace, around, {prefix: _make(entry) for prefix, entry in entries.items()})

    def _layer(self, way: Way, prefix: str, name: str, word: str, above: frozenset[str] | None) -> UnitTrace:
        """above: of a backward in halves, the fields on whose graph units above hold between them."""
        if (way, name, word, above) not in self._traces:
            stem, twin = self._stem(way), self.twin(way, word)
            entry = stem.entries[prefix]
            ladder = twin.get_submodule(prefix.removesuffix(".")) if prefix else twin
            number = self.layers[prefix].index(name)
            mesh = self._meshes[way, word]
            trained = self.trained[name] if above is None else self.tracked
            made = self._run_layer(ladder, number, prefix, entry, trained, twin, mesh, word, above)
            self._traces[way, name, word, above] = made
        return self._traces[way, name, word, above]

    def _run_layer(
        self,
        ladder: nn.Module,
        i: int,
        prefix: str,
        entry: Any,
        trained: frozenset[str],
        twin: nn.Module,
        mesh: MetaMesh,
        word: str,
        above: frozenset[str] | None,
    ) -> UnitTrace:
        travels, door = self.travels[prefix], Door()
        counting = Counting(mesh)
        stream = enter(entry, set(entry._fields) - travels, trained, door)
        held, taken, left = Held(), Held(), Held()
        with running(counting, twin):
            held.watch(stream, set(stream._fields) - travels)
            stream = enter(stream, travels, trained, door)
            taken.watch(stream, travels)
            following = ladder.layer(i, stream)
            changes = {name for name in travels if getattr(following, name) is not getattr(stream, name)}
            stream = None
            left.watch(following, changes)
            forward, kernels, sent = counting.peak, *counting.take()
            kept = counting.kept if word == "but_attention" else 0
            made = [getattr(following, field) for field in travels]
            output, end = bytes_of(made), end_of(made)
            tops = [getattr(following, field).grad_fn for field in above or ()]
            del following, made
            saved, refers = counting.now, (held.find(), taken.find(), frozenset(changes), left.find())
            if above is None:
                backward, halves = counting.back(end), None
            else:
                backward, halves = counting.back_in_halves(end, door, twin, [])
            tops.clear()
        inputs = saved - kept if word != "none" else 0
        back_kernels, back_sent = counting.take()
        runs = kernels, back_kernels, sent, back_sent
        return UnitTrace(saved, inputs, kept, output, forward, *backward, *refers, *runs, halves)

    def _head(self, way: Way, returns: bool, split: bool) -> tuple[UnitTrace, int]:
        if (way, returns, split) not in self._heads:
            self._heads[way, returns, split] = self._run_head(way, returns, split)
        return self._heads[way, returns, split]

    def _run_head(self, way: Way, returns: bool, split: bool) -> tuple[UnitTrace, int]:
        """returns: whether what the model returns lives until the backward has ended."""
        twin, entry = self.twin(way), self._stem(way).entries[""]
        travels, trained, door = self.travels[""], self.tracked if split else self.trained[""], Door()
        counting = Counting(self._meshes[way, "none"])
        stream, held, taken = enter(entry, set(entry._fields) - travels, trained, door), Held(), Held()
        with running(counting, twin):
            held.watch(stream, set(stream._fields) - travels)
            stream = enter(stream, travels, trained, door)
            taken.watch(stream, travels)
            output = twin.head(stream)
            stream = None
            losses = self.losses(output)
            returned, output = bytes_of([output]), output.detach() if returns else None  # `output` would hold the graph
            end, size, losses = losses.sum(), bytes_of([losses]), losses.detach()  # as a step keeps them
            forward, kernels, sent = counting.peak, *counting.take()
            saved, refers = counting.now, (held.find(), taken.find(), frozenset(), frozenset())
            if split:
                kept, output = [output], None
                backward, halves = counting.back_in_halves(end, door, twin, kept)
            else:
                backward, halves = counting.back(end), None
        back_kernels, back_sent = counting.take()
        runs = kernels, back_kernels, sent, back_sent
        trace = UnitTrace(saved, 0, 0, size, forward, *backward, *refers, *runs, halves)
        return trace, returned


class _Stem(NamedTuple):
    trace: UnitTrace
    around: dict[str, Around]
    entries: dict[str, Any]
    """By prefix, the stream that enters the first layer."""


def _name_core(ladder: nn.Module, plan: ParallelPlan) -> None:
    owner, _, seam = plan.core.rpartition(".")
    if hasattr(ladder.get_submodule(owner), seam):
        plan.set_seam(ladder, plan.core, core)


def _trained(stream: Any) -> frozenset[str]:
    return frozenset(name for name, x in stream._asdict().items() if isinstance(x, Tensor) and x.requires_grad)


def _cut_off(stream: Any) -> Any:
    return type(stream)(*(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in stream))


def _sizes(entry: Any, trained: frozenset[str]) -> dict[str, tuple[int, bool]]:
    tensors = {
        name: [x for x in tree_leaves(value) if isinstance(x, Tensor)] for name, value in entry._asdict().items()
    }
    return {name: (bytes_of(own), name in trained) for name, own in tensors.items() if own}


class _Shape(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _describe(stream: Any) -> Any:
    """The stream with shapes in place of tensors, which would hold their memory and their graph."""
    return tree_map_only(Tensor, lambda x: _Shape(tuple(x.shape), x.stride(), x.dtype), stream)


def _make(stream: Any) -> Any:
    """With tensors in place of shapes."""
    return tree_map(
        lambda x: torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta") if isinstance(x, _Shape) else x,
        stream,
        is_leaf=lambda x: isinstance(x, _Shape),
    )
