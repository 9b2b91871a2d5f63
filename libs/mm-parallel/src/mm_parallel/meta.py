"""Ranks that are not there: what one rank of a layout would run and send, on the meta device and without a process
group.

A `MetaMesh` stands for the mesh of a layout, as one of its ranks sees it. A model on the meta device is cut over it by
the code that cuts over a real one (`mm_parallel.tensor.cut`, `mm_parallel.context.cut`). Its groups send nothing, and
note what they would have sent.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple, Self

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.config import ParallelConfig
from mm_parallel.mesh import AXES, FLAT, rank_in, size


class Sent(NamedTuple):
    """One collective, as one of its ranks sees it."""

    op: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or send."""
    axis: str
    """Of the mesh: one of `AXES` and `FLAT`."""
    ranks: int
    bytes: int
    """That leave this rank, see `bytes_sent`."""


def bytes_sent(op: str, size: int, ranks: int) -> int:
    """What one rank sends in a collective over `ranks`, by the algorithm in a ring, of which there is none that sends
    less.

    size: bytes of what the rank gives: to an all_reduce or a reduce_scatter the whole, to an all_gather its part. Of an
    all_to_all and of a send: what goes to others.
    """
    match op:
        case "all_reduce":
            return 2 * size * (ranks - 1) // ranks
        case "reduce_scatter":
            return size * (ranks - 1) // ranks
        case "all_gather":
            return size * (ranks - 1)
        case "broadcast":
            return size if ranks > 1 else 0
        case "all_to_all" | "send":
            return size
    raise ValueError(f"no collective is called {op!r}")


class MetaGroup(dist.ProcessGroup):
    """In place of the process group of an axis. Collectives leave tensors as they are, and are noted in `notes`."""

    def __init__(self, rank: int, ranks: int, axis: str, notes: list[Sent]) -> None:
        super().__init__(rank, ranks)
        self.axis, self.notes = axis, notes

    @property
    def group_name(self) -> str:
        return f"meta {self.axis}"

    def note(self, op: str, sent: int) -> None:
        """sent: see `bytes_sent`."""
        self.notes.append(Sent(op, self.axis, self.size(), bytes_sent(op, sent, self.size())))

    # as torch.distributed calls them

    def allreduce(self, tensors: Sequence[Tensor], options: object = None) -> None:
        self.note("all_reduce", sum(map(_bytes, tensors)))

    def allgather(self, outputs: object, inputs: Sequence[Tensor], options: object = None) -> None:
        self.note("all_gather", sum(map(_bytes, inputs)))

    def all_gather_single(self, output: Tensor, input: Tensor, options: object = None) -> None:
        self.note("all_gather", _bytes(input))

    def all_to_all_single(
        self, output: Tensor, input: Tensor, receive: Sequence[int], send: Sequence[int], options: object = None
    ) -> None:
        self.note("all_to_all", (sum(send) - send[self.rank()]) * prod(input.shape[1:]) * input.element_size())

    _allgather_base, alltoall_base = all_gather_single, all_to_all_single  # their names before torch 2.13


class MetaMesh:
    """The mesh of `layout` (resolved), as the rank at `place` sees it: an index on each axis, 0 where none is given.

    The rank at 0 everywhere is one of the fullest: what does not divide goes to the first ranks.
    """

    device_type = "meta"

    def __init__(
        self, layout: ParallelConfig, place: Mapping[str, int] | None = None, notes: list[Sent] | None = None
    ) -> None:
        sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.ring, layout.ulysses, layout.tp)
        self.notes = [] if notes is None else notes
        self._set(dict(zip(AXES, sizes, strict=True)), dict.fromkeys(AXES, 0) | dict(place or {}))

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Self:
        """A real mesh, as this rank sees it."""
        made = cls.__new__(cls)
        made.notes = []
        made._set({axis: size(mesh, axis) for axis in AXES}, {axis: rank_in(mesh, axis) for axis in AXES})
        return made

    def _set(self, sizes: dict[str, int], place: dict[str, int]) -> None:
        self.sizes, self.place, self._groups = sizes, place, {}

    def __getitem__(self, axes: str | Sequence[str]) -> "_Axes":
        """One axis, or several that are to be flattened."""
        return _Axes(self, (axes,) if isinstance(axes, str) else tuple(axes), axes if isinstance(axes, str) else "")

    def get_group(self, axis: str) -> MetaGroup:
        return self[FLAT[axis]]._flatten(axis).get_group() if axis in FLAT else self[axis].get_group()


class _Axes:
    """What is asked of a part of a mesh."""

    device_type = "meta"

    def __init__(self, mesh: MetaMesh, axes: tuple[str, ...], name: str) -> None:
        self._mesh, self._axes, self._name = mesh, axes, name

    def _flatten(self, name: str) -> "_Axes":
        return _Axes(self._mesh, self._axes, name)

    def size(self) -> int:
        return prod(self._mesh.sizes[axis] for axis in self._axes)

    def get_local_rank(self) -> int:
        rank = 0
        for axis in self._axes:
            rank = rank * self._mesh.sizes[axis] + self._mesh.place[axis]
        return rank

    def get_group(self) -> MetaGroup:
        groups = self._mesh._groups
        if self._name not in groups:
            groups[self._name] = MetaGroup(self.get_local_rank(), self.size(), self._name, self._mesh.notes)
        return groups[self._name]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
