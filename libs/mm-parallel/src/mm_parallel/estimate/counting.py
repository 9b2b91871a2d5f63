"""Running one unit without the others: counts, and what stands for what comes before and behind it."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mm_parallel.attention import KEPT, attention
from mm_parallel.estimate.kernels import Kernel, note_ring
from mm_parallel.estimate.operations import perform
from mm_parallel.estimate.peak import PeakMemory, is_view
from mm_parallel.estimate.traces import Halves
from mm_parallel.meta import MetaMesh, Sent
from mm_parallel.pipeline.stage import add_weight_gradients, back_to_inputs


class Held:
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


class Counting(PeakMemory):
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

    def back_in_halves(
        self, end: Tensor, door: "Door", twin: nn.Module, kept: list[Any]
    ) -> tuple[tuple[int, int, int], Halves]:
        """Runs the backward in halves: (backward, again, gradients) of a `UnitTrace`, and its `Halves`.

        kept: what is referred to until the first half of all units has ended; it is emptied then.
        """
        kept.append(end.grad_fn)  # all of the graph
        self.peak = self.now
        _, groups = back_to_inputs([end], None, [door.leaf], twin.parameters())
        most, after = self.peak, self.now
        kept.clear()
        reaches = door.find()
        between = self.peak = self.peak_besides = self.now
        last = 0  # torch refers to the gradients of a group until it has those of the next
        while groups:
            group = groups.pop(0)
            parameters = [p for p in twin.parameters() if p.requires_grad and p.grad is None]
            add_weight_gradients(twin.parameters(), [group])
            self.settled += last
            last = sum(p.grad.untyped_storage().nbytes() for p in parameters if p.grad is not None)
        made = self.settled + last
        halves = Halves(after, between, self.peak, self.peak_besides, self.now - made, reaches)
        return (most, most, made), halves

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
            self.kept += bytes_of(list(result))
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


class Operations(TorchDispatchMode):
    """What runs, and on which shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs))
        self.seen.append((op, *(x.shape if isinstance(x, Tensor) else repr(x) for x in given)))
        return perform(op, args, kwargs or {})[0]


class NamedAttention(TorchFunctionMode):
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
    def forward(ctx, leaf: Tensor, x: Tensor, node: "_Node") -> Tensor:
        ctx.node = node
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.empty(0, device="meta"), None, None  # torch before 2.13 refuses to do without


class _End(torch.autograd.Function):
    """In whose backward gradients appear, as they come from the next unit: nothing else refers to them."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype) for x in tensors]
        return torch.empty(0, device="meta")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ctx.like)


def end_of(tensors: Sequence[Tensor]) -> Tensor | None:
    trained = [x for x in tensors if x.requires_grad]
    return _End.apply(*trained) if trained else None


def _leaf() -> Tensor:
    return torch.empty(0, device="meta", requires_grad=True)


def skip(x: Tensor, note: Callable[[Tensor], None] | None) -> Tensor:
    """In place of layers: new memory like x, and of the gradient. note: is given that; None: there is none."""
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


class Door:
    """Through which tensors with a gradient enter a unit."""

    def __init__(self) -> None:
        self.leaf = _leaf()
        self._nodes: dict[str, weakref.ref] = {}

    def enter(self, name: str, x: Tensor) -> Tensor:
        node = _Node()
        self._nodes[name] = weakref.ref(node)
        return _Begin.apply(self.leaf, x, node)

    def find(self) -> frozenset[str]:
        """Those to which some graph leads."""
        return frozenset(name for name, node in self._nodes.items() if node() is not None)


class _Node:
    """Lives as long as the node of a graph that it is given to."""


def enter(stream: Any, names: Any, trained: frozenset[str], door: Door) -> Any:
    """The stream with new memory in the fields `names`."""

    def renew(name: str) -> Any:
        value = getattr(stream, name)
        return door.enter(name, value) if name in trained else tree_map_only(Tensor, torch.empty_like, value)

    return stream._replace(**{name: renew(name) for name in names})


@contextmanager
def running(counting: Counting, twin: nn.Module) -> Iterator[None]:
    """Counting, with gradients of parameters that are dropped at the end."""
    parameters = [p for p in twin.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(counting.settle) for p in parameters]
    try:
        with torch.enable_grad(), NamedAttention(), counting:
            yield
    finally:
        for hook, parameter in zip(hooks, parameters, strict=True):
            hook.remove()
            parameter.grad = None


def bytes_of(tensors: Sequence[Any]) -> int:
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if isinstance(x, Tensor)}
    return sum(storages.values())
