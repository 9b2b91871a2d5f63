"""One run of every kind of unit on the meta device: what it keeps, what it needs while it runs, which kernels.

A unit is the stem, one layer with its companions, or the head with the loss. Units of one kind have parameters of the
same shapes and run the same operations: the first of them stands for all. The code that runs is that of training:
`tensor.cut`, `context.cut` and `recompute` have cut and wrapped it, and only what is sent is left out.

*Counted*: bytes by storage, as tensors come and go (`PeakMemory`), and kernels (`mm_parallel.estimate.kernels`).
Not seen: what a kernel uses while it runs, and the buffers of a ring.
Values are not known here. So every label counts, and attention is that of `mm_parallel.attention` on every device.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mm_parallel import context, tensor
from mm_parallel.attention import KEPT, attention, core
from mm_parallel.config import Base, MemoryConfig, ParallelConfig
from mm_parallel.estimate.kernels import Kernel, note_ring
from mm_parallel.estimate.operations import perform
from mm_parallel.estimate.peak import PeakMemory, is_view
from mm_parallel.estimate.ranks import FullestItems
from mm_parallel.frozen import hold
from mm_parallel.meta import MetaMesh, Sent
from mm_parallel.plan import ParallelPlan
from mm_parallel.recompute import recompute

Losses = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class UnitTrace:
    """One micro-batch through one unit, on the fullest rank. All bytes are counted; of parameters there are none."""

    saved: int
    """Bytes that live from the forward to the backward: what autograd and recompute hold of what this unit or the one
    before it made. What the stem makes for all layers is not among them.
    """
    inputs: int
    """Of `saved`, what offload="inputs" moves."""
    kept: int
    """Of `saved`, what offload="attention" moves."""
    output: int
    """Bytes that it hands on to the next unit; of the head, of its losses, which are kept until the end of the step."""
    forward: int
    """Most bytes at one time in the forward: its input, what it makes and saves, its output."""
    backward: int
    """Most bytes at one time in the backward: what is saved, what is made, gradients of its parameters among it."""
    again: int
    """The same where the parameters have gradients already, to which others are added."""
    gradients: int
    """Bytes of gradients of its parameters, in the dtype in which it reads them."""
    holds: frozenset[str]
    """The fields of the stream that it changes nothing of, and that live until its backward, for it refers to them; of
    the stem, the model's arguments.
    """
    takes: frozenset[str]
    """Of the fields that travel, those that are in `saved` as it was given them."""
    changes: frozenset[str]
    """Of the same, those that it hands on in new memory."""
    keeps: frozenset[str]
    """Of `changes`, those that are in `saved` as it hands them on."""
    kernels: tuple[Kernel, ...] = field(repr=False)
    """Of one forward."""
    backward_kernels: tuple[Kernel, ...] = field(repr=False)
    """Of one backward, with what recompute runs again."""
    sent: tuple[Sent, ...] = field(repr=False)
    """Collectives over tensor-parallel and context ranks in one forward."""
    backward_sent: tuple[Sent, ...] = field(repr=False)
    """In one backward, with those that recompute makes again."""


class Around(NamedTuple):
    """Bytes of the stem that live while the layers of an inner ladder run."""

    forward: int
    """What it has made, with what enters the ladder."""
    backward: int
    """What waits for the rest of the stem's backward."""


class Traces(NamedTuple):
    """Of one way of cutting."""

    units: dict[str, UnitTrace]
    """By name: "stem" (with what is around the layers of inner ladders), module names of layers, "head"."""
    around: dict[str, Around]
    """By prefix of an inner ladder."""
    stream: dict[str, dict[str, tuple[int, bool]]]
    """By prefix, of each field of the stream with tensors: bytes, and whether it requires a gradient when it leaves the
    last layer.
    """
    returned: int
    """Bytes of what the model returns. In a pipeline it is in the head's `saved`, and lives until the last stage's
    backward has ended: torch's stage refers to it.
    """

    def constants(self, prefix: str, names: Iterable[str]) -> int:
        """Bytes of the fields that some of these units refer to."""
        held = frozenset[str]().union(*(self.units[name].holds for name in names))
        return sum(self.stream[prefix][name][0] for name in held)


class Way(NamedTuple):
    """What of a layout changes a unit."""

    tp: int
    ring: int
    ulysses: int
    sharded: bool
    """Whether parameters come in the dtype of the computation."""

    @property
    def ranks(self) -> int:
        return self.tp * self.ring * self.ulysses


def way_of(layout: ParallelConfig) -> Way:
    sharded = layout.dp_replicate * layout.dp_shard * layout.ring * layout.ulysses > 1
    return Way(layout.tp, layout.ring, layout.ulysses, sharded)


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
        self._traces: dict[tuple[Way, str, str], UnitTrace] = {}
        self._heads: dict[tuple[Way, bool], tuple[UnitTrace, int]] = {}

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
                with _Operations() as operations:
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
        with torch.enable_grad(), _NamedAttention():
            stream = whole.stem(**self.example)
            for i in range(len(self.layers[""])):
                stream = whole.layer(i, stream)

    def trace(self, layout: ParallelConfig, words: Mapping[str, str]) -> Traces:
        """Of stem, head, and the layers of `words`: what each recomputes. layout: resolved; its stages do not matter.

        A layer's name has its ladder's prefix: "blocks.0", "visual.blocks.0".
        """
        way = way_of(layout)
        stem = self._stem(way)
        units = {"stem": stem.trace}
        for prefix, names in self.layers.items():
            units |= {name: self._layer(way, prefix, self.kinds[name], words[name]) for name in names if name in words}
        units["head"], returned = self._head(way, layout.pp > 1)
        streams = {prefix: self._sizes(prefix, entry) for prefix, entry in stem.entries.items()}
        return Traces(units, stem.around, streams, returned)

    def _sizes(self, prefix: str, entry: Any) -> dict[str, tuple[int, bool]]:
        tensors = {
            name: [x for x in tree_leaves(value) if isinstance(x, Tensor)] for name, value in entry._asdict().items()
        }
        return {name: (_bytes(own), name in self.trained[prefix]) for name, own in tensors.items() if own}

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
        counting = _Counting(mesh)

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
                through = {name: _pass(getattr(stream, name), note if name in after else None) for name in travels}
                return stream._replace(**through)

            return layer

        try:
            for prefix, ladder in ladders:
                ladder.layer = stand_in(prefix, ladder)
            example, held, left = tree_map_only(Tensor, torch.empty_like, dict(self.example)), _Held(), _Held()
            held.watch(example, example)
            with _running(counting, twin):
                stream = twin.stem(**example)
                example = None
                forward, kernels, sent = counting.peak, *counting.take()
                end = _end([x for x in stream if isinstance(x, Tensor)])
                output = _bytes([getattr(stream, name) for name in self.travels[""]])
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

    def _layer(self, way: Way, prefix: str, name: str, word: str) -> UnitTrace:
        if (way, name, word) not in self._traces:
            stem, twin = self._stem(way), self.twin(way, word)
            entry = stem.entries[prefix]
            ladder = twin.get_submodule(prefix.removesuffix(".")) if prefix else twin
            number = self.layers[prefix].index(name)
            mesh = self._meshes[way, word]
            self._traces[way, name, word] = self._run_layer(ladder, number, name, prefix, entry, twin, mesh, word)
        return self._traces[way, name, word]

    def _run_layer(
        self, ladder: nn.Module, i: int, name: str, prefix: str, entry: Any, twin: nn.Module, mesh: MetaMesh, word: str
    ) -> UnitTrace:
        travels, trained = self.travels[prefix], self.trained[name]
        counting = _Counting(mesh)
        stream, held, taken, left = _enter(entry, set(entry._fields) - travels, trained), _Held(), _Held(), _Held()
        with _running(counting, twin):
            held.watch(stream, set(stream._fields) - travels)
            stream = _enter(stream, travels, trained)
            taken.watch(stream, travels)
            following = ladder.layer(i, stream)
            changes = {name for name in travels if getattr(following, name) is not getattr(stream, name)}
            stream = None
            left.watch(following, changes)
            forward, kernels, sent = counting.peak, *counting.take()
            kept = counting.kept if word == "but_attention" else 0
            made = [getattr(following, field) for field in travels]
            output, end = _bytes(made), _end(made)
            del following, made
            saved, refers = counting.now, (held.find(), taken.find(), frozenset(changes), left.find())
            backward = counting.back(end)
        inputs = saved - kept if word != "none" else 0
        back_kernels, back_sent = counting.take()
        runs = kernels, back_kernels, sent, back_sent
        return UnitTrace(saved, inputs, kept, output, forward, *backward, *refers, *runs)

    def _head(self, way: Way, returns: bool) -> tuple[UnitTrace, int]:
        if (way, returns) not in self._heads:
            self._heads[way, returns] = self._run_head(way, returns)
        return self._heads[way, returns]

    def _run_head(self, way: Way, returns: bool) -> tuple[UnitTrace, int]:
        """returns: whether what the model returns lives until the backward has ended."""
        twin, entry = self.twin(way), self._stem(way).entries[""]
        travels, trained = self.travels[""], self.trained[""]
        counting = _Counting(self._meshes[way, "none"])
        stream, held, taken = _enter(entry, set(entry._fields) - travels, trained), _Held(), _Held()
        with _running(counting, twin):
            held.watch(stream, set(stream._fields) - travels)
            stream = _enter(stream, travels, trained)
            taken.watch(stream, travels)
            output = twin.head(stream)
            stream = None
            losses = self.losses(output)
            returned, output = _bytes([output]), output.detach() if returns else None  # `output` would hold the graph
            end, size = losses.sum(), _bytes([losses])
            forward, kernels, sent = counting.peak, *counting.take()
            saved, refers = counting.now, (held.find(), taken.find(), frozenset(), frozenset())
            backward = counting.back(end)
        back_kernels, back_sent = counting.take()
        trace = UnitTrace(saved, 0, 0, size, forward, *backward, *refers, kernels, back_kernels, sent, back_sent)
        return trace, returned


class _Stem(NamedTuple):
    trace: UnitTrace
    around: dict[str, Around]
    entries: dict[str, Any]
    """By prefix, the stream that enters the first layer."""


class _Held:
    """Which of these fields somebody refers to."""

    def watch(self, stream: Any, names: Iterable[str]) -> None:
        """stream: or the arguments of the model, by name."""
        fields = stream if isinstance(stream, Mapping) else stream._asdict()
        self._storages = {
            name: [weakref.ref(x.untyped_storage()) for x in tree_leaves(fields[name]) if isinstance(x, Tensor)]
            for name in names
        }

    def find(self) -> frozenset[str]:
        return frozenset(name for name, own in self._storages.items() if any(x() is not None for x in own))


class _Counting(PeakMemory):
    """Counts bytes and kernels of what has no values; where a value is asked for, it is worked with the worst."""

    def __init__(self, mesh: MetaMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.kernels: list[Kernel] = []
        mesh.notes.clear()
        self.kept = 0
        self.settled = 0
        self.peak_besides = 0

    def take(self) -> tuple[tuple[Kernel, ...], tuple[Sent, ...]]:
        """The kernels since the last time, and what was sent."""
        kernels, sent = tuple(self.kernels), tuple(note for note in self.mesh.notes if note.ranks > 1)
        self.kernels.clear()
        self.mesh.notes.clear()
        return kernels, sent

    def back(self, end: Tensor | None) -> tuple[int, int, int]:
        """Runs the backward: (backward, again, gradients) of a `UnitTrace`."""
        self.peak = self.peak_besides = self.now
        if end is not None and end.requires_grad:
            # `end.backward()` would step out of the mode that names attention, and recompute would run another
            run = torch.autograd.Variable._execution_engine.run_backward
            run((end,), (torch.ones_like(end),), False, False, (), allow_unreachable=True, accumulate_grad=True)
        return self.peak, self.peak_besides, self.settled

    def settle(self, parameter: nn.Parameter) -> None:
        """Its gradient is complete."""
        self.settled += parameter.grad.untyped_storage().nbytes()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if is_view(op):
            return op(*args, **(kwargs or {}))
        if op is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return (args[0].dtype.is_floating_point and 0.0) or 0
        if op is torch.ops.aten.nonzero.default and args[0].is_meta:
            x = args[0]
            op, args, kwargs = torch.ops.aten.new_empty.default, (x, (x.numel(), x.ndim)), {"dtype": torch.int64}
        with torch._C.DisableTorchFunction():  # else every look at a shape would ask the mode that names attention
            result = super().__torch_dispatch__(op, types, args, kwargs)
        if op in KEPT:
            self.kept += _bytes(list(result))
        note_ring(op, args, kwargs or {}, self.mesh)
        return result

    def perform(self, op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        result, kernel = perform(op, args, kwargs)
        if kernel:
            self.kernels.append(kernel)
        return result

    def _count(self, counted: list[int], size: int) -> None:
        super()._count(counted, size)
        self.peak_besides = max(self.peak_besides, self.now - self.settled)


class _Operations(TorchDispatchMode):
    """What runs, and on which shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs))
        self.seen.append((op, *(x.shape if isinstance(x, Tensor) else repr(x) for x in given)))
        return perform(op, args, kwargs or {})[0]


class _NamedAttention(TorchFunctionMode):
    """torch's attention as ours: on the meta device torch would hold the scores of all pairs, as no kernel does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """B H L h; a mask of keys alone: B 1 1 L. By torch's op for a CPU, which runs here without its kernel: recompute of
    all but attention keeps ours (`KEPT`), and not what a layer asks torch for, as of the text.
    """
    if q.shape[1] == k.shape[1]:
        bias = None if attn_mask is None else attn_mask.to(q.dtype)
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return op(q, k, v, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]
    mask = None if attn_mask is None else attn_mask[:, 0, 0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v, is_causal, scale, mask=mask).transpose(1, 2)


class _Begin(torch.autograd.Function):
    """New memory like x, with a graph behind it in which its gradient ends."""

    @staticmethod
    def forward(ctx, leaf: Tensor, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        return None, None


class _End(torch.autograd.Function):
    """In whose backward gradients appear, as they come from the next unit: nothing else refers to them."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype) for x in tensors]
        return torch.empty(0, device="meta")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ctx.like)


def _end(tensors: Sequence[Tensor]) -> Tensor | None:
    trained = [x for x in tensors if x.requires_grad]
    return _End.apply(*trained) if trained else None


def _leaf() -> Tensor:
    return torch.empty(0, device="meta", requires_grad=True)


def _pass(x: Tensor, note: Callable[[Tensor], None] | None) -> Tensor:
    """note: is given the gradient; None: there is none."""
    return torch.empty_like(x) if note is None else _Through.apply(x, _leaf(), note)


class _Through(torch.autograd.Function):
    """In place of layers: new memory like x, and in the backward new memory like its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, leaf: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        ctx.note = note
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.note(grad)
        return torch.empty_like(grad), None, None


def _enter(stream: Any, names: Any, trained: frozenset[str]) -> Any:
    """The stream with new memory in the fields `names`."""

    def renew(name: str) -> Any:
        value = getattr(stream, name)
        return _Begin.apply(_leaf(), value) if name in trained else tree_map_only(Tensor, torch.empty_like, value)

    return stream._replace(**{name: renew(name) for name in names})


@contextmanager
def _running(counting: _Counting, twin: nn.Module) -> Iterator[None]:
    """Counting, with gradients of parameters that are dropped at the end."""
    parameters = [p for p in twin.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(counting.settle) for p in parameters]
    try:
        with torch.enable_grad(), _NamedAttention(), counting:
            yield
    finally:
        for hook, parameter in zip(hooks, parameters, strict=True):
            hook.remove()
            parameter.grad = None


def _name_core(ladder: nn.Module, plan: ParallelPlan) -> None:
    owner, _, seam = plan.core.rpartition(".")
    if hasattr(ladder.get_submodule(owner), seam):
        plan.set_seam(ladder, plan.core, core)


def _trained(stream: Any) -> frozenset[str]:
    return frozenset(name for name, x in stream._asdict().items() if isinstance(x, Tensor) and x.requires_grad)


def _cut_off(stream: Any) -> Any:
    return type(stream)(*(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in stream))


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


def _bytes(tensors: Sequence[Any]) -> int:
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if isinstance(x, Tensor)}
    return sum(storages.values())
