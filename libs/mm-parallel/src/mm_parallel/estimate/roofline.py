"""Seconds of a step of training, modelled: what kernels compute and move, what ranks send, what waits for what.

Kernels are counted (`mm_parallel.estimate.kernels`), collectives too (`mm_parallel.estimate.collectives`); speeds are
constants of a device (`mm_parallel.devices`). The rest is this model:

    a kernel        the longest of its FLOPs at the share of the peak that such kernels reach, its bytes at that of the
                    bandwidth, and a launch. Attention by the kernel that `mm_parallel.attention.pick` would take there
    a collective    the bytes that leave a rank over the slowest link on their way. Neighbours are in tp, then ulysses,
                    ring, dp; so many as a host has devices share its fast links, and each has a network card
    at one time     FSDP with compute (all but what the first waits for, and the last), reduction with the backward, a
                    ring with its attention, offload with compute, layers that come from the host with the forward
                    and with the backward. Ulysses and tensor parallelism with nothing
    a pipeline      a bubble of (ranks - 1) / virtual stages micro-batches; without bubble a third of it
    the optimizer   its bytes, on each rank's own part

Not here: loading of data, encoders, the host being too slow to launch, ranks that wait for a slower one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mm_parallel.attention.backends import Call, choose
from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.devices import Device
from mm_parallel.estimate.collectives import Traffic, count_traffic
from mm_parallel.estimate.kernels import Kernel
from mm_parallel.estimate.memory import find_waiting, words_of
from mm_parallel.estimate.traces import UnitTrace
from mm_parallel.estimate.units import Units
from mm_parallel.estimate.weights import Weights
from mm_parallel.mesh import AXES, FLAT
from mm_parallel.pipeline.cut import ranges

LATENCY = 2e-5
"""Seconds that a collective takes at least. A guess."""
FUSED = 0.5
"""Of the bytes of memory-bound kernels, what is left where a compiler has fused them. A guess."""
_HEAD = 128  # elements, of which the shares of attention are told
_SLOWER = 0.4  # exponent: heads of 64 reach 76 % of what heads of 128 do (FlashAttention-3: 69 to 88 %)
_CUDNN = 99_999  # new enough


class Seconds(NamedTuple):
    """Of some kernels, by what bounds them."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: "Seconds", times: float = 1.0) -> "Seconds":
        return Seconds(*(a + times * b for a, b in zip(self, other, strict=True)))


class Link(NamedTuple):
    """What some traffic costs."""

    traffic: Traffic
    over: str
    """link (within hosts) or network (between)."""
    seconds: float
    """If nothing else was going on."""
    waited: float
    """Of these, those for which the rank waits."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest pipeline rank. They add up to `total`."""

    gemm: float
    """Matrix products, with those that recompute makes again."""
    attention: float
    memory: float
    """Kernels that are bound by memory."""
    communication: float
    """For which the rank waits; the rest of it hides, see `links`."""
    offload: float
    """Copies to and from the host for which the rank waits."""
    bubble: float
    optimizer: float
    """With the clipping of gradients."""
    mfu: float
    """Useful FLOPs of the step over what all devices could have computed at their peak in this time."""
    rank: int
    """The slowest pipeline rank."""
    kernels: tuple[str, ...]
    """Names of the kernels of attention."""
    links: tuple[Link, ...]

    @property
    def compute(self) -> float:
        return self.gemm + self.attention + self.memory

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.offload + self.bubble + self.optimizer


class Clock:
    """Tells the time of steps on a device. One for a whole search: what it has summed once it keeps.

    dtype: of the computation, of whose peak MFU is a share. attention: see `mm_parallel.attention.pick`. compiled:
    whether layers are. foreach: whether AdamW is computed operation by operation, not fused.

    Raises ValueError for a dtype of which no peak is known, and (when a step is timed) for a kernel of attention that
    cannot run there.
    """

    def __init__(
        self,
        device: Device,
        dtype: torch.dtype | None,
        *,
        attention: str = "auto",
        compiled: bool = False,
        foreach: bool = False,
    ) -> None:
        self.device, self.attention, self.compiled, self.foreach = device, attention, compiled, foreach
        self.peak = device.peak_of(_name(dtype or torch.float32))
        self._summed: dict[int, tuple[UnitTrace, Seconds, Seconds]] = {}

    # Kernels

    def kernel(self, kernel: Kernel, backward: bool) -> float:
        """Seconds of one."""
        shares, device = self.device.shares, self.device
        moved = kernel.bytes * (FUSED if self.compiled and kernel.kind == "memory" else 1)
        seconds = max(shares.launch, moved / (device.bandwidth * shares.memory))
        if kernel.kind == "memory":
            return seconds
        # a dtype of which there is no figure runs where 16 bits run 16 times as fast, or so
        peak = device.peak.get(_name(kernel.dtype), device.peak_of("bfloat16") / 16)
        if kernel.kind == "gemm":
            return max(seconds, kernel.flops / (peak * shares.gemm))
        shape = kernel.shape
        share = shares.attention.get(self.pick(kernel), shares.attention["math"])[backward]
        share *= min(1.0, (shape.head_dim / _HEAD) ** _SLOWER)
        return max(seconds, kernel.flops / (1 + shape.causal) / (peak * share))

    def pick(self, kernel: Kernel) -> str:
        """The kernel that computes an attention on this device."""
        shape = kernel.shape
        call = Call(
            self.device.kind,
            kernel.dtype,
            shape.head_dim,
            shape.kv_heads,
            shape.queries,
            shape.keys,
            shape.uneven,
            self.device.capability,
            _CUDNN if self.device.cudnn else 0,
            {"flash3": "FA3", "flash4": "FA4"}.get(self.attention),
        )
        return choose(call, self.attention)

    def unit(self, trace: UnitTrace) -> tuple[Seconds, Seconds]:
        """Of its forward and of its backward, for one micro-batch."""
        known = self._summed.get(id(trace))
        if known is None:
            halves = (trace.kernels, False), (trace.backward_kernels, True)
            forward, backward = (self._sum(kernels, back) for kernels, back in halves)
            known = self._summed[id(trace)] = (trace, forward, backward)  # kept with it: an id is of what is alive
        return known[1:]

    def _sum(self, kernels: tuple[Kernel, ...], backward: bool) -> Seconds:
        sums = dict.fromkeys(Seconds._fields, 0.0)
        for kernel in kernels:
            # what recompute runs in a backward is a forward
            sums[kernel.kind] += self.kernel(kernel, backward and kernel.op.endswith("backward"))
        return Seconds(**sums)

    # Collectives

    def link(self, traffic: Traffic, layout: ParallelConfig) -> tuple[str, float]:
        """(link or network, seconds) of all collectives of one kind."""
        device, share = self.device, self.device.shares.collective
        stride, size = _place(traffic.axis, layout)
        here = max(1, min(size, device.per_host // stride))  # ranks of the group on one host
        waiting = LATENCY * traffic.count
        if here == size:
            return "link", waiting + traffic.bytes_sent / (device.link * share)
        if traffic.op == "send":
            rate = device.network
        elif traffic.op == "all_to_all":
            away = (size - here) / (size - 1)
            rate = 1 / max(away / device.network, (1 - away) / device.link)
        else:  # a ring over all hosts for each network card: of the bytes of a host's ranks each carries its part
            rate = min(device.link, here * device.network)
        return "network", waiting + traffic.bytes_sent / (rate * share)

    # The step

    def time(
        self,
        units: Units,
        layout: ParallelConfig,
        memory: MemoryConfig,
        micro_batches: int,
        flops: float,
        *,
        average: bool = False,
    ) -> StepTime:
        """Of a step. layout: resolved; micro_batches: of a data rank; flops: useful ones of the whole step, over all
        ranks, as `mm_train` counts them; average: whether there is an EMA.
        """
        weights = Weights(units, layout, memory.reduce)
        stages = ranges(layout.stages, len(units.layers[""])) if layout.pp_layers else [range(len(units.layers[""]))]
        traffic = count_traffic(units, layout, memory, micro_batches, weights)
        ranks = [
            self._rank(units, layout, memory, weights, stages, traffic[rank], rank, micro_batches, average)
            for rank in range(layout.pp)
        ]
        slowest = max(ranks, key=lambda found: found.total)
        world = layout.pp * layout.dp_replicate * layout.dp_shard * layout.ring * layout.ulysses * layout.tp
        return replace(slowest, mfu=flops / (slowest.total * world * self.peak))

    def _rank(
        self,
        units: Units,
        layout: ParallelConfig,
        memory: MemoryConfig,
        weights: Weights,
        stages: list[range],
        traffic: tuple[Traffic, ...],
        rank: int,
        count: int,
        average: bool,
    ) -> StepTime:
        here = [i for part in stages[rank :: layout.pp] for i in part]
        words = words_of(units, memory, here, first=rank == 0)
        traces = units.trace(layout, words).units
        names = [*["stem"] * (rank == 0), *words, *["head"] * (rank == layout.pp - 1)]
        forward = backward = Seconds()
        moved = 0
        for name in names:
            ahead, back = self.unit(traces[name])
            forward, backward = forward.plus(ahead), backward.plus(back)
            moved += {"inputs": traces[name].inputs, "attention": traces[name].kept, "none": 0}[memory.offload]
        compute = Seconds().plus(forward, count).plus(backward, count)
        links = self._wait(traffic, layout, compute, backward.total * count, len(names))
        waited = sum(link.waited for link in links)
        copied = 2 * count * moved / self.device.host_link
        comes = [size for size, _ in weights.waiting(find_waiting(units, memory, here, first=rank == 0))]
        late = sum(  # two layers are there already where a forward, or a backward, begins
            max(0.0, sum(of) / self.device.host_link - half.total)
            for of, half in ((comes[2:], forward), (comes[:-2], backward))
        )
        bytes_of_own = self._optimizer_bytes(units, weights, words, rank, layout, average)
        virtual = len(layout.stages) if layout.pp > 1 else 1
        of_each = (compute.total + waited) / count
        return StepTime(
            *compute,
            communication=waited,
            offload=max(0.0, copied - compute.total) + count * late,
            bubble=(layout.pp - 1) / virtual * of_each * (1 / 3 if layout.splits else 1),
            optimizer=bytes_of_own / self._optimizer_rate(memory),
            mfu=0.0,
            rank=rank,
            kernels=tuple(sorted(self._kernels_of(traces[name] for name in names))),
            links=links,
        )

    def _kernels_of(self, traces: Iterator[UnitTrace]) -> set[str]:
        kernels = {kernel for trace in traces for kernel in trace.kernels if kernel.kind == "attention"}
        return {self.pick(kernel) for kernel in kernels}

    def _wait(
        self, traffic: tuple[Traffic, ...], layout: ParallelConfig, compute: Seconds, backward: float, units: int
    ) -> tuple[Link, ...]:
        """What each costs, and what of it is waited for."""
        costs = [(each, *self.link(each, layout)) for each in traffic]
        # what hides behind the same shares its time
        behind = {"compute": compute.total, "backward": backward, "attention": compute.attention}
        if layout.splits:  # weights come before all, gradients go after all
            behind |= {"compute": 0.0, "backward": 0.0}
        of: dict[str, float] = {}
        for each, _, seconds in costs:
            of[each.overlaps_with] = of.get(each.overlaps_with, 0.0) + seconds
        if "backward" in of:  # weights for the backward are gathered at the same time
            behind["compute"] = max(0.0, behind["compute"] - of["backward"])
        links = []
        for each, over, seconds in costs:
            if not each.overlaps_with:
                links.append(Link(each, over, seconds, seconds))
                continue
            together = of[each.overlaps_with]
            late = max(0.0, together - behind[each.overlaps_with]) / together if together else 0.0
            ends = 1 / max(1, units) if each.what in ("weights", "gradients") else 0.0  # of the first unit, of the last
            links.append(Link(each, over, seconds, seconds * max(late, ends)))
        return tuple(links)

    def _optimizer_bytes(
        self, units: Units, weights: Weights, words: Mapping[str, str], rank: int, layout: ParallelConfig, average: bool
    ) -> float:
        """Read and written by AdamW, clipping, and an EMA, on this rank's part."""
        owners = [*words, *["first"] * (rank == 0), *["last"] * (rank == layout.pp - 1)]
        trained = sum(w.bytes(weights.ranks) for owner in owners for w in weights.of(owner) if w.trained)
        adamw = 7 * (2 if self.foreach else 1)  # parameter, gradient, two moments; all but the gradient written
        return trained * (adamw + 3 + 3 * average)  # clipping reads gradients twice, and writes them

    def _optimizer_rate(self, memory: MemoryConfig) -> float:
        if memory.offload_params:
            return self.device.host_link  # the host's own memory is not in the table; it is about as fast
        return self.device.bandwidth * self.device.shares.memory


def _place(axis: str, layout: ParallelConfig) -> tuple[int, int]:
    """(how far the neighbours in an axis are apart, their number)."""
    sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.ring, layout.ulysses, layout.tp)
    of = dict(zip(AXES, sizes, strict=True))
    own = FLAT.get(axis, (axis,))
    stride = size = 1
    for name in AXES[AXES.index(own[-1]) + 1 :]:
        stride *= of[name]
    for name in own:
        size *= of[name]
    return stride, size


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
