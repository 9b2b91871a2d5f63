"""What a rank sends in a step of training, over which axis of the mesh, and what it hides behind.

Counted: what units send to tensor-parallel and context ranks (`mm_parallel.estimate.units`), by the code that sends it.
Modelled, by what FSDP2 and `mm_parallel` do between them, and compared with what gloo ranks send in tests:

    weights        FSDP gathers a group before its forward, and again before its backward if it was dropped in between
    gradients      FSDP reduces a group's after each backward (after the last one, without bubble); then over copies
    replicated     what stays whole, once a step
    norm           of the gradients, once a step
    stages         what a pipeline sends: the stream up, its gradients down
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.estimate.flight import turns
from mm_parallel.estimate.memory import words_of
from mm_parallel.estimate.traces import Traces
from mm_parallel.estimate.units import Units
from mm_parallel.estimate.weights import Weight, Weights
from mm_parallel.meta import Sent, bytes_sent
from mm_parallel.pipeline.cut import ranges

What = Literal["weights", "gradients", "replicated", "norm", "stages", "tokens", "ring", "tensor"]
_HIDDEN: dict[What, str] = {"weights": "compute", "gradients": "backward", "ring": "attention", "stages": "compute"}
_OF_AXIS: dict[str, What] = {"ring": "ring", "ulysses": "tokens", "cp": "tokens", "tp": "tensor"}


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind in a step, as one rank takes part in them."""

    what: What
    op: str
    """See `mm_parallel.meta.Sent`."""
    axis: str
    ranks: int
    """That take part in each."""
    count: int
    bytes_sent: int
    """That leave this rank in all of them, see `mm_parallel.meta.bytes_sent`."""

    @property
    def overlaps_with(self) -> str:
        """What runs at the same time: compute, backward, attention, or nothing ("")."""
        return _HIDDEN.get(self.what, "")


Sends = Counter[tuple[What, Sent]]
"""How often each collective is made."""


def count_traffic(
    units: Units,
    layout: ParallelConfig,
    memory: MemoryConfig,
    micro_batches: int = 1,
    weights: Weights | None = None,
) -> tuple[tuple[Traffic, ...], ...]:
    """For each pipeline rank what one of its ranks sends in a step.

    layout: resolved; micro_batches: of a data rank; weights: of this layout, where they are at hand.
    """
    return tuple(fold(sends) for sends in count_sends(units, layout, memory, micro_batches, weights))


def fold(sends: Sends) -> tuple[Traffic, ...]:
    """Collectives of one kind together."""
    found: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for (what, sent), count in sends.items():
        sums = found[what, sent.op, sent.axis, sent.ranks]
        sums[0] += count
        sums[1] += count * sent.bytes
    return tuple(Traffic(*kind, *sums) for kind, sums in found.items())


def count_sends(
    units: Units,
    layout: ParallelConfig,
    memory: MemoryConfig,
    micro_batches: int = 1,
    weights: Weights | None = None,
) -> list[Sends]:
    """The same, one by one."""
    weights = weights or Weights(units, layout, memory.reduce)
    count = len(units.layers[""])
    stages = ranges(layout.stages, count) if layout.pp_layers else [range(count)]
    found = []
    for rank in range(layout.pp):
        mine = stages[rank :: layout.pp]
        words = words_of(units, memory, [i for part in mine for i in part], first=rank == 0)
        of_rank = _Rank(units, layout, memory, weights, units.trace(layout, words), rank, mine, micro_batches)
        found.append(of_rank.count_all())
    return found


class _Group(NamedTuple):
    """What FSDP gathers and reduces together."""

    weights: Sequence[Weight]
    chunks: Sequence[int]
    """Virtual stages in which it is gathered."""
    back: Sequence[int]
    """Those in whose backward it is."""
    reduced: int | None
    """The one in whose backward its gradients come; None: it has none."""
    is_unit: bool
    """A layer, or a companion."""


class _Rank:
    """One pipeline rank."""

    def __init__(
        self,
        units: Units,
        layout: ParallelConfig,
        memory: MemoryConfig,
        weights: Weights,
        traces: Traces,
        rank: int,
        stages: Sequence[range],
        count: int,
    ) -> None:
        self.units, self.layout, self.memory, self.weights, self.traces = units, layout, memory, weights, traces
        self.rank, self.stages, self.count = rank, stages, count
        self.is_first, self.is_last = rank == 0, rank == layout.pp - 1
        self.splits = layout.splits
        self.sends: Sends = Counter()
        self.inner = [name for prefix, names in units.layers.items() if prefix for name in names if self.is_first]
        self.names = [[units.layers[""][i] for i in part] for part in stages]
        self.backs: set[int] = set()
        """Virtual stages that have a backward."""

    def count_all(self) -> Sends:
        for unit in self._units():
            for sent in (*unit.sent, *unit.backward_sent):
                self.sends[_OF_AXIS[sent.axis], sent] += self.count
        if self.weights.sharded:
            self._gather_and_reduce()
            self._finish()
        self._measure_norm()
        if self.layout.pp > 1:
            self._pass_on()
        return self.sends

    def _note(self, what: What, op: str, axis: str, size: int, count: int = 1) -> None:
        """size: see `bytes_sent`."""
        ranks = {
            "fsdp": self.weights.ranks,
            "dp_replicate": self.layout.dp_replicate,
            "tp": self.layout.tp,
            "pp": self.layout.pp,
        }[axis]
        if ranks > 1 and count:
            self.sends[what, Sent(op, axis, ranks, bytes_sent(op, size, ranks))] += count

    def _units(self) -> Iterator:
        names = [*["stem"] * self.is_first, *self.inner, *(name for part in self.names for name in part)]
        return (self.traces.units[name] for name in (*names, *["head"] * self.is_last))

    # FSDP

    def _gather_and_reduce(self) -> None:
        groups = list(self._groups())
        for group, gathers in zip(groups, self._count_gathers(groups), strict=True):
            ranks = self.weights.ranks
            gathered = sum(weight.whole(ranks) for weight in group.weights) // ranks
            reduced = sum(weight.to_reduce(ranks) for weight in group.weights)
            self._note("weights", "all_gather", "fsdp", gathered, gathers)
            if group.reduced is not None:
                times = 1 if self.splits else self.count
                self._note("gradients", "reduce_scatter", "fsdp", reduced, times)
                self._note("gradients", "all_reduce", "dp_replicate", reduced // ranks, times)

    def _groups(self) -> Iterator[_Group]:
        """In the order in which their forwards end: within a virtual stage, and the root of all last."""
        ends = [("first", 0)] * self.is_first + [("last", len(self.names) - 1)] * self.is_last
        root: list[Weight] = []
        trained = None
        for owner, virtual in ends:
            own = self.weights.groups(owner).get("", [])
            root += own
            trained = virtual if _trains(own) else trained
        of_chunks = [list(self._groups_of(virtual)) for virtual in range(len(self.names))]
        backs = {virtual for virtual, groups in enumerate(of_chunks) if any(group.back for group in groups)}
        self.backs = backs if trained is None else backs | {trained}
        for groups in of_chunks:
            yield from groups
        if root:
            yield _Group(root, range(len(self.names)), sorted(self.backs), trained, False)

    def _groups_of(self, virtual: int) -> Iterator[_Group]:
        """But for the root of all."""

        def make(weights: Sequence[Weight], goes_back: bool, is_unit: bool = False) -> _Group:
            return _Group(weights, [virtual], [virtual] * goes_back, virtual if _trains(weights) else None, is_unit)

        first = self.weights.groups("first") if self.is_first and virtual == 0 else {}
        ladders = {prefix.removesuffix(".") for prefix in self.units.layers}
        yield from (make(own, _trains(own)) for name, own in first.items() if name not in ladders)
        for name in (*(self.inner if virtual == 0 else ()), *self.names[virtual]):
            if self.inner and name == self.names[0][0]:
                yield from (make(own, _trains(own)) for ladder, own in first.items() if ladder and ladder in ladders)
            goes_back = bool(self.traces.units[name].backward_kernels)
            yield from (make(own, goes_back, True) for own in self.weights.groups(name).values())
        if self.is_last and virtual == len(self.names) - 1:
            yield from (make(own, _trains(own)) for name, own in self.weights.groups("last").items() if name)

    def _count_gathers(self, groups: Sequence[_Group]) -> list[int]:
        """How often each is gathered in a step."""
        reshard = self.memory.reshard
        if self.splits:  # once for all; the root to begin with and to reduce at the end, too
            return [1 if group.weights[0].group or not reshard else 3 for group in groups]
        counts = [0] * len(groups)
        # what no backward drops is there from the first step on
        here = set() if reshard or self.backs else set(range(len(groups)))
        ended: list[int] = []  # forwards, by group

        def gather(i: int) -> None:
            counts[i] += i not in here
            here.add(i)

        for kind, virtual, _ in turns(self.layout, self.rank, self.count):
            if kind == "F":
                for i, group in enumerate(groups):
                    if virtual in group.chunks:
                        gather(i)
                        ended.append(i)
                        if reshard:
                            here.discard(i)
            elif virtual in self.backs:
                for i in reversed(range(len(groups))):
                    if virtual in groups[i].back:
                        gather(i)
                        for ahead in self._ahead(groups, i, ended):
                            gather(ahead)
                here.clear()  # at its end FSDP drops all, also those that had no part in it, and forgets their order
                ended.clear()
        return counts

    def _ahead(self, groups: Sequence[_Group], i: int, ended: list[int]) -> Sequence[int]:
        """What FSDP gathers ahead in the backward of a group; it asks not whether that has a backward."""
        if self.memory.prefetch and groups[i].is_unit:
            before = range(max(0, i - self.memory.prefetch), i)
            return [other for other in before if groups[other].is_unit and groups[other].chunks == groups[i].chunks]
        if i not in ended:
            return ()
        place = len(ended) - 1 - ended[::-1].index(i)
        ended[place] = -1  # each counts once
        return [ended[place - 1]] if place and ended[place - 1] >= 0 else ()

    # once a step

    def _own(self) -> Iterator[Weight]:
        owners = [*self.inner, *(name for part in self.names for name in part)]
        for owner in (*owners, *["first"] * self.is_first, *["last"] * self.is_last):
            yield from self.weights.of(owner)

    def _finish(self) -> None:
        """See `mm_parallel.grads.finish_gradients`."""
        sizes: Counter = Counter()
        for weight in self._own():
            if weight.group is None and weight.trained:
                sizes[weight.held] += weight.bytes(1) + weight.held.itemsize  # and whether it was used
        for size in sizes.values():
            for axis in ("fsdp", "dp_replicate"):
                self._note("replicated", "all_reduce", axis, size)

    def _measure_norm(self) -> None:
        """See `mm_parallel.grads.clip_grad_norm`: a norm for each parameter, of those that are cut alike together."""
        whole = dict(self.units.bones.named_parameters())
        alike: Counter[tuple] = Counter()
        for weight in self._own():
            if weight.trained:
                cut = next((i for i, n in enumerate(whole[weight.name].shape) if n != weight.shape[i]), None)
                alike[weight.group is not None, cut, weight.held.itemsize] += 1
        for (sharded, cut, size), count in alike.items():
            if sharded:
                self._note("norm", "all_reduce", "fsdp", count * size)
            if cut is not None:
                self._note("norm", "all_reduce", "tp", count * size)
        if self.layout.pp > 1:
            self._note("norm", "all_reduce", "pp", max((size for _, _, size in alike), default=4))

    # pipeline

    def _pass_on(self) -> None:
        """Without a bubble, and with frozen weights, gradients that nobody needs are sent as well; not seen here."""
        stream = self.traces.stream[""]
        for virtual, names in enumerate(self.names):
            if not (self.is_last and virtual == len(self.names) - 1):
                for size, _ in stream.values():
                    self._note("stages", "send", "pp", size, self.count)
            if not (self.is_first and virtual == 0):
                for name in self.units.trained[names[0]]:
                    self._note("stages", "send", "pp", stream[name][0], self.count)
        self._note("stages", "all_gather", "pp", 8)  # that all have been given the same


def _trains(weights: Sequence[Weight]) -> bool:
    return any(weight.trained for weight in weights)
