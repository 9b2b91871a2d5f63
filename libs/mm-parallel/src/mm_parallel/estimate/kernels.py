"""Which kernels a piece of code runs, what each multiplies, and the bytes that it moves: counted, by running the code.

    with KernelCounter() as counter:
        model(x).sum().backward()
    for kernel in counter.kernels: ...

Tensors may be real, fake or on the meta device: shapes are all that is looked at. Nothing is measured and no device is
asked. What is counted is what eager torch runs there, one kernel for each operation; a compiler would fuse some.

Bytes are those that a kernel must move at least: each input once, each output once, nothing that a cache may save and
nothing that it may have to fetch again.

    views, detach, empty tensors    nothing is moved, and nothing is said of them
    in place                        the tensor is read and written; by copy_, fill_ and their like only written
    expanded tensors                what lies in memory, once
    a table (embedding, index)      the rows that are asked for
    attention                       q, k, v, out, lse and their gradients, once; never the scores
    collectives                     not here: see `mm_parallel.estimate.collectives`

FLOPs are those of torch's `FlopCounterMode`, a multiply-add counted as two, and of attention as if nothing was masked:
its `shape` says where about half is skipped. To torch's table come attention on the CPU, packed samples, and our own
ops, see `FORMULAS`.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import mm_parallel.attention  # noqa: F401 (it makes the ops)
from mm_parallel.estimate.peak import tensors_in
from mm_parallel.meta import MetaMesh

Kind = Literal["gemm", "attention", "memory"]


class Shape(NamedTuple):
    """Of an attention: what its speed depends on, beside its FLOPs."""

    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    uneven: bool
    """Packed samples, or masked keys: each call has lengths of its own."""
    causal: bool
    """About half of the FLOPs is skipped."""


@dataclass(frozen=True)
class Kernel:
    """One kernel."""

    kind: Kind
    """What bounds it: matrix products (also convolutions), attention, or memory."""
    op: str
    """torch's name of the operation: "aten.mm"."""
    flops: int
    bytes_read: int
    bytes_written: int
    dtype: torch.dtype
    """Of what it computes on: its first floating-point input, or its output."""
    shape: Shape | None = None
    """Of attention."""

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written


class KernelCounter(TorchDispatchMode):
    """Notes every kernel that runs within, in order, in `kernels`.

    mesh: where there is one of ranks that are not there, it is told what attention over a ring sends, too, which on the
    meta device runs no further than its shapes.
    """

    def __init__(self, mesh: MetaMesh | None = None) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.mesh = mesh

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with its local parts comes here
        kwargs = kwargs or {}
        if _formula(op) is None and not moves_nothing(op) and not _has_kernel(op):
            with self:  # in inference mode some operations come whole, and in parts otherwise
                result = op.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = op(*args, **kwargs)
        if kernel := describe(op, args, kwargs, result):
            self.kernels.append(kernel)
        if self.mesh is not None:
            note_ring(op, args, kwargs, self.mesh)
        return result


def _has_kernel(op: Any) -> bool:
    """Whether it is one kernel, though torch could also take it apart."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")


def describe(op: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> Kernel | None:
    """The kernel of one operation; None where nothing runs."""
    if moves_nothing(op):
        return None
    name = f"{op.namespace}.{op._schema.name.split('::')[1]}"
    formula = _formula(op)
    given = _bind(op, args, kwargs)
    read, written = _bytes(op, given, result)
    flops = formula(*args, **kwargs, out_val=result) if formula else 0
    kind = "memory" if formula is None else "attention" if "attention" in name or "attn" in name else "gemm"
    floats = [x for x in (*tensors_in(list(given.values())), *tensors_in(result)) if x.is_floating_point()]
    dtype = floats[0].dtype if floats else next((x.dtype for x in tensors_in(result)), torch.uint8)
    if kind == "memory" and not read + written:
        return None
    return Kernel(kind, name, flops, read, written, dtype, _shape(op, given) if kind == "attention" else None)


# FLOPs


def _attend(products: int) -> Callable[..., int]:
    """B H L h, as torch's ops have it, of which `products` matrix products are made."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        q, k = (args[0], args[1]) if products == 2 else (args[1], args[2])
        samples, heads, queries, size = q.shape
        return products * 2 * samples * heads * queries * k.shape[2] * size

    return count


def _attend_ours(products: int, ring: bool) -> Callable[..., int]:
    """B L H h, as our ops have it. Of packed samples those pairs that are in one sample; of a mask, all.

    Over a ring what this rank computes, where all ranks have alike to do: the mean, of packed samples.
    """

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        q, k, *_ = args if products == 2 else args[1:]
        # scale, causal, backend (, lengths, group), mask, segments, behind q, k, v (or dout, q, k, v, out, lse)
        rest = list(args[3:] if products == 2 else args[6:])
        lengths = rest[3] if ring else [k.shape[1]]
        place = 6 if ring else 4
        segments = kwargs.get("segments", rest[place] if len(rest) > place else None)
        samples, queries, heads, size = q.shape
        pairs = queries * sum(lengths)
        if segments is not None:
            pairs = sum((b - a) ** 2 for a, b in pairwise(segments)) * queries // max(1, sum(lengths))
        return products * 2 * samples * heads * pairs * size

    return count


def _raw(formula: Callable) -> Callable:
    """A formula that is asked like those of torch's table: with tensors, and what came of them."""
    formula._get_raw = True
    return formula


def _formulas() -> dict[Any, Callable]:
    aten, ours = torch.ops.aten, torch.ops.mm_parallel
    table = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attend(2),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attend(5),
        ours.attention: _attend_ours(2, ring=False),
        ours.attention_backward: _attend_ours(5, ring=False),
        ours.ring_attention: _attend_ours(2, ring=True),
        ours.ring_attention_backward: _attend_ours(5, ring=True),
    }
    with suppress(ImportError, AttributeError):  # packed samples: torch knows their FLOPs, and tells it to no counter
        from torch.nn.attention import varlen  # noqa: F401 (it makes the ops)
        from torch.utils import flop_counter

        table[torch.ops.torch_attn._varlen_attn] = flop_counter._varlen_attn_forward_flop
        table[torch.ops.torch_attn._varlen_attn_backward] = flop_counter._varlen_attn_backward_flop
    return {op: _raw(formula) for op, formula in table.items()}


FORMULAS = _formulas()
"""FLOPs of what `FlopCounterMode` does not know; it takes them as `custom_mapping`."""


def _formula(op: Any) -> Callable | None:
    packet = getattr(op, "_overloadpacket", None)
    return FORMULAS.get(packet) or flop_registry.get(packet)


_RING = (torch.ops.mm_parallel.ring_attention.default, torch.ops.mm_parallel.ring_attention_backward.default)


def note_ring(op: Any, args: tuple, kwargs: dict[str, Any], mesh: MetaMesh) -> None:
    """Notes what attention over a ring sends, if this is one: on the meta device it runs no further than its shapes."""
    if op in _RING:
        for size in _ring_sends(_bind(op, args, kwargs), mesh.place["ring"]):
            mesh.get_group("ring").note("send", size)


def _ring_sends(given: dict[str, Any], rank: int) -> Iterator[int]:
    """Bytes of what a rank sends in one attention over a ring, one by one; see `mm_parallel.attention.ring`."""
    k, lengths = given["k"], given["lengths"]
    ranks = len(lengths) // (1 + given["causal"])
    blocks = [lengths[r] + (lengths[-1 - r] if given["causal"] else 0) for r in range(ranks)]
    row = 2 * k.shape[0] * k.shape[2] * k.shape[3]  # elements of k and v of one token
    for step in range(ranks):
        passing = blocks[(rank - step) % ranks] * row
        if step < ranks - 1:
            yield passing * k.element_size()
        if "dout" in given:  # gradients travel one hop more
            yield passing * torch.promote_types(k.dtype, torch.float32).itemsize


# Bytes

_NOTHING = {"c10d", "_c10d_functional", "_dtensor", "prim", "profiler", "symm_mem"}  # namespaces
_VIEWS = {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "_local_scalar_dense", "set_", "resize_"}
_EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted"}
# they ask a tensor for its shape alone
_SHAPED = {"ones_like", "zeros_like", "full_like", "rand_like", "randn_like", "randint_like"}
_SHAPED |= {"new_zeros", "new_ones", "new_full"}
# they write a tensor without reading it
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
_OVERWRITING |= {"_foreach_copy_", "_foreach_zero_"}
# their first tensor is a table, of which as much is read as comes out
_READING_ROWS = {"embedding", "index", "index_select", "gather"}
# they read and write as much of a tensor as they are given
_WRITING_ROWS = {"index_put_", "_index_put_impl_", "index_add_", "index_copy_", "scatter_", "scatter_add_"}


@cache
def moves_nothing(op: Any) -> bool:
    if not isinstance(op, torch._ops.OpOverload):
        return True
    name = op._schema.name.split("::")[1]
    views = op.is_view or torch.Tag.inplace_view in op.tags or name in _VIEWS
    return op.namespace in _NOTHING or views or name in _EMPTY or name.startswith("sym_")


def _bytes(op: Any, given: dict[str, Any], result: Any) -> tuple[int, int]:
    name = op._schema.name.split("::")[1]
    written_args = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    out_args = {a.name for a in op._schema.arguments if a.is_out}
    inputs = [] if name in _SHAPED else list(given.items())
    changed = [x for key, value in given.items() if key in written_args for x in tensors_in(value)]
    made = _made(op, result)
    if name in _WRITING_ROWS:
        others = _once(x for key, value in given.items() if key not in written_args for x in tensors_in(value))
        largest = max((_stored(x) for x in others if x.dtype == changed[0].dtype), default=0)
        return sum(map(_stored, others)) + largest, largest
    if name in _READING_ROWS:
        _, *others = (x for value in given.values() for x in tensors_in(value))
        outcome = sum(map(_stored, made))
        return sum(map(_stored, _once(others))) + outcome, outcome
    unread = out_args | (written_args if name in _OVERWRITING else set())
    read = _once(x for key, value in inputs if key not in unread for x in tensors_in(value))
    rounds = _rounds(op, given)
    return rounds * sum(map(_stored, read)), sum(map(_stored, _once((*changed, *made))))


def _rounds(op: Any, given: dict[str, Any]) -> int:
    """How often the inputs are read: over a ring once for each rank, with keys as many as ours."""
    return len(given["lengths"]) // (1 + given["causal"]) if "lengths" in given and "group" in given else 1


def _made(op: Any, result: Any) -> list[Tensor]:
    """Of what is returned, what is new."""
    results = result if isinstance(result, tuple) else (result,)
    if len(results) != len(op._schema.returns):
        return list(tensors_in(result))
    new = (x for x, said in zip(results, op._schema.returns, strict=True) if said.alias_info is None)
    return [x for each in new for x in tensors_in(each)]


def _stored(x: Tensor) -> int:
    """Bytes of x in memory: where it is expanded, those of what is there."""
    if x.layout != torch.strided:
        return x.numel() * x.element_size()
    places = prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size)
    return places * x.element_size()


def _bind(op: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their names; what is not given as its default."""
    names = [argument.name for argument in op._schema.arguments]
    defaults = {
        argument.name: argument.default_value for argument in op._schema.arguments if argument.has_default_value()
    }
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def _once(tensors: Any) -> list[Tensor]:
    return list({id(x): x for x in tensors}.values())


def _shape(op: Any, given: dict[str, Any]) -> Shape:
    q, k = (given.get(short, given.get(long)) for short, long in (("q", "query"), ("k", "key")))
    packed = given.get("segments") is not None or q.ndim == 3
    tokens, heads = (2, 1) if op.namespace == "aten" and "_scaled_dot_product" in op._schema.name else (-3, -2)
    window = given.get("window_size")
    causal = given.get("is_causal") or given.get("causal") or (window and window[0] < 0 and window[1] == 0)
    uneven = packed or given.get("mask") is not None
    return Shape(q.shape[heads], k.shape[heads], q.shape[-1], q.shape[tokens], k.shape[tokens], uneven, bool(causal))
