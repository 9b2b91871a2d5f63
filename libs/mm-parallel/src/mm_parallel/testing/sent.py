"""What a rank sends, counted where it is sent."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import get_process_group_ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm_parallel.attention.ring import _Passing
from mm_parallel.config import ParallelConfig
from mm_parallel.mesh import AXES, FLAT, submesh
from mm_parallel.meta import Sent, bytes_sent

# torch's ops -> what they are, which argument a rank gives, which is the group
_OPS = {
    "allreduce_": ("all_reduce", 0, 1),
    "allgather_": ("all_gather", 1, 2),
    "_allgather_base_": ("all_gather", 1, 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "alltoall_base_": ("all_to_all", 1, 2),
    "broadcast_": ("broadcast", 0, 1),
    "all_reduce": ("all_reduce", 0, 2),
    "all_reduce_": ("all_reduce", 0, 2),
    "all_gather_into_tensor": ("all_gather", 0, 2),
    "reduce_scatter_tensor": ("reduce_scatter", 0, 3),
    "send": ("send", 0, 1),
}
_OTHERS = {"recv_", "wait_tensor", "barrier", "_wrap_tensor_autograd"}


@contextmanager
def count_sent(mesh: DeviceMesh) -> Iterator[Counter[Sent]]:
    """Counts what this rank sends within to others along an axis of `mesh`: how often each collective was made."""
    sent: Counter[Sent] = Counter()
    # by their ranks: torch has several groups of the same ranks
    names = {tuple(get_process_group_ranks(submesh(mesh, axis).get_group())): axis for axis in (*FLAT, *AXES)}
    passing = _Passing.__init__

    def note(op: str, group: dist.ProcessGroup | str, size: int) -> None:
        group = dist.distributed_c10d._resolve_process_group(group) if isinstance(group, str) else group
        if group.size() > 1:
            size = bytes_sent(op, size, group.size())
            sent[Sent(op, names[tuple(get_process_group_ranks(group))], group.size(), size)] += 1

    def begin(self: _Passing, sent_on: Tensor, received: Tensor, ring: Any) -> None:  # out of sight of torch's modes
        if sent_on.numel():
            note("send", ring.group, _bytes(sent_on))
        passing(self, sent_on, received, ring)

    _Passing.__init__ = begin
    try:
        with _Collectives(note):
            yield sent
    finally:
        _Passing.__init__ = passing


def by_axes(sends: Mapping[Any, int], layout: ParallelConfig) -> Counter[tuple]:
    """How often each (op, axes, ranks, bytes) is in it, axes those that are not of size 1: torch has one group for
    them, by whatever name. sends: by `Sent`, or as `mm_parallel.estimate.collectives.count_sends` has them.
    """
    found: Counter[tuple] = Counter()
    for key, count in sends.items():
        sent = key if isinstance(key, Sent) else key[1]
        axes = tuple(axis for axis in FLAT.get(sent.axis, (sent.axis,)) if getattr(layout, axis) > 1)
        found[sent.op, axes, sent.ranks, sent.bytes] += count
    return found


class _Collectives(TorchDispatchMode):
    def __init__(self, note: Callable[[str, Any, int], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with its local parts comes here
        name = op._schema.name.split("::")[1]
        if op.namespace in ("c10d", "_c10d_functional") and name not in _OTHERS:
            kind, given, group = _OPS[name]
            group = args[group] if isinstance(args[group], str) else dist.ProcessGroup.unbox(args[group])
            size = _bytes(args[given])
            if kind == "all_to_all":
                each = args[4] or [len(args[given]) // group.size()] * group.size()
                size -= each[group.rank()] * (size // max(1, len(args[given])))
            self.note(kind, group, size)
        return op(*args, **(kwargs or {}))


def _bytes(given: Any) -> int:
    if isinstance(given, Tensor):
        return given.numel() * given.element_size()
    return sum(map(_bytes, given))
