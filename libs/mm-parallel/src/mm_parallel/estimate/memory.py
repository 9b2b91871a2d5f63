"""Bytes on each pipeline rank in a step of training, and when most of them are there.

Of each unit, what it saves and what it needs while it runs is counted (`mm_parallel.estimate.units`). Here a step walks
over the units in the order in which they run, forward and backward, and adds what is there besides:

    always            parameters, moments, average; gradients as soon as a micro-batch has made them
    with FSDP         the weights of the unit that runs, and as many again in the buffer in which they came; those of
                      the next in the backward; gradients before they are reduced, and the buffer in which they are
    the root's        (embeddings, head) from the first layer to the last, and their gradients until the end
    in a pipeline     what waits of other micro-batches, and buffers for what is received, of all micro-batches;
                      of virtual stages and zero_bubble also all that was sent, until the end of the step

That is what torch's FSDP2 and its pipelines do; it is modelled, and compared with runs in tests.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.estimate.flight import Turn, turns
from mm_parallel.estimate.units import Traces, Units, UnitTrace
from mm_parallel.estimate.weights import Weight, Weights
from mm_parallel.fits import check_fits
from mm_parallel.frozen import spread
from mm_parallel.pipeline.cut import ranges
from mm_parallel.plan import ParallelPlan
from mm_parallel.recompute import choose_inner_words, choose_words


@dataclass(frozen=True)
class UnitMemory:
    """One unit of a pipeline rank: stem, layer (with its companions) or head. Bytes of one micro-batch."""

    name: str
    word: str
    """What it recomputes: none, full or but_attention."""
    saved: int
    """What waits on the device for the backward, but for `shared`."""
    shared: int
    """Of what it saves, what a unit before saves too, or what is the buffer in which it was received."""
    host: int
    """What waits on the host."""
    weights: int
    """Of its parameters, gathered (this rank's tensor-parallel part of them); without FSDP as they are."""
    gathered: int
    """Of what is gathered at one time; 0 without FSDP."""
    reduced: int
    """Of the buffer in which its gradients are reduced; 0 without FSDP."""
    gradients: int
    """Of this rank's part of its gradients."""
    trace: UnitTrace


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank, the fullest of those that share its stages.

    Parameters to average are exact; saved, stream, head and host are counted; gathered and transient are modelled of
    what is counted. With `offload_params` most of the first four are on the host, and in `host`.
    """

    rank: int
    """Pipeline rank; 0 without a pipeline."""
    parameters: int
    gradients: int
    moments: int
    average: int
    """Of an EMA."""
    gathered: int
    """At the peak: weights that FSDP has whole, gradients before they are reduced, and buffers of both; and the two
    buffers in which frozen matrices come from the host.
    """
    saved: int
    """Activations of all units and micro-batches that wait for their backward, when these are most."""
    stream: int
    """Of the same micro-batches, what the stem makes for all layers, what it is called with, and losses; in a pipeline
    also what it sends, and buffers for what it receives.
    """
    waiting: int
    """Of `parameters`, frozen matrices that wait on the host (`host_layers`); they are in `host`, too."""
    head: int
    """Logits and loss: most bytes that head, loss and their backward make; 0 before the last stage."""
    transient: int
    """At the peak: what a unit needs while it runs, or the optimizer."""
    host: int
    """On the host."""
    peak: int
    """Most bytes on the device at one time."""
    moment: str
    """When that is: "backward of blocks.39"."""
    in_flight: int
    """Micro-batches that wait for their backward at one time, when these are most; of all virtual stages."""
    layers: tuple[UnitMemory, ...]
    """All units, in the order in which they run."""


def estimate_memory(
    model: nn.Module,
    plan: ParallelPlan,
    layout: ParallelConfig,
    memory: MemoryConfig,
    dtype: torch.dtype | None,
    example: Mapping[str, Any],
    *,
    micro_batches: int = 1,
    average: bool = False,
    optimizer: Literal["fused", "foreach"] = "fused",
    moments: Callable[[str, tuple[int, ...]], int] | None = None,
    losses: Callable[[Tensor], Tensor] | None = None,
    units: Units | None = None,
) -> tuple[RankMemory, ...]:
    """Bytes of a step of training on each pipeline rank. No process group, no values, no device.

    model: whole, on the meta device, with adapters and `requires_grad`; it is not changed. layout: resolved.
    dtype: of the computation. example, losses: see `Units`. micro_batches: of one data rank in a step. average: whether
    there is an EMA of what is trained. optimizer: how AdamW is computed. moments: (name of a parameter, shape of what a
    rank holds of it) -> bytes of the optimizer's states for it; by default those of AdamW. units: of the same model,
    from another call: what has run there is not run again.

    Raises ValueError for what `parallelize` or `Pipeline` would refuse.
    """
    check_fits(model, plan, layout, memory)
    units = units or Units(model, plan, dtype, example, losses, memory.base if memory.holds_frozen else None)
    weights = Weights(units, layout, memory.reduce)
    count = len(units.layers[""])
    stages = ranges(layout.stages, count) if layout.pp_layers else [range(count)]
    found = []
    for rank in range(layout.pp):
        mine = stages[rank :: layout.pp]
        words = words_of(units, memory, [i for part in mine for i in part], first=rank == 0)
        waiting = weights.waiting(find_waiting(units, memory, [i for part in mine for i in part], first=rank == 0))
        of_rank = _Rank(
            units, layout, memory, weights, mine, words, waiting, rank, micro_batches, average, optimizer, moments
        )
        found.append(of_rank.measure())
    return tuple(found)


def words_of(units: Units, memory: MemoryConfig, here: list[int], first: bool) -> dict[str, str]:
    """What each layer of a pipeline rank recomputes, by name. here: numbers of the main ladder's layers."""
    words = {}
    for prefix, names in units.layers.items():
        if not prefix:
            chosen = choose_words(memory, len(names), here)
        elif first:
            chosen = choose_inner_words(memory, list(range(len(names))))
        else:
            continue
        words |= {names[i]: word for i, word in chosen.items()}
    return words


def find_waiting(units: Units, memory: MemoryConfig, here: list[int], first: bool) -> list[str]:
    """The layers of a pipeline rank whose frozen matrices wait on the host, in the order in which they run. here: as
    for `words_of`.
    """
    ladders = {prefix: here if not prefix else range(len(names)) for prefix, names in units.layers.items()}
    return [
        units.layers[prefix][own[i]]
        for prefix, own in ladders.items()
        if first or not prefix
        for i in spread(memory.host_layers, len(own))
    ]


class _Moment(NamedTuple):
    """Bytes at one time, besides what is always there."""

    name: str
    saved: int
    gathered: int
    transient: int
    gradients: int

    @property
    def total(self) -> int:
        return self.saved + self.gathered + self.transient + self.gradients


class _Rank:
    """One pipeline rank."""

    def __init__(
        self,
        units: Units,
        layout: ParallelConfig,
        memory: MemoryConfig,
        weights: Weights,
        stages: Sequence[range],
        words: Mapping[str, str],
        waiting: Sequence[tuple[int, int]],
        rank: int,
        micro_batches: int,
        average: bool,
        optimizer: str,
        moments: Callable[[str, tuple[int, ...]], int] | None,
    ) -> None:
        self.states = moments
        self.units, self.layout, self.memory, self.weights = units, layout, memory, weights
        self.waiting = sum(size for size, _ in waiting)
        self.buffers = min(2, len(waiting)) * max((size for _, size in waiting), default=0)
        self.words, self.rank, self.count, self.average, self.optimizer = words, rank, micro_batches, average, optimizer
        self.traces: Traces = units.trace(layout, words)
        self.is_first, self.is_last = rank == 0, rank == layout.pp - 1
        names = units.layers[""]
        self.chunks: list[list[UnitMemory]] = []
        self.sent: list[int] = []
        """Of each virtual stage, bytes of what it hands on that none of its units saves."""
        for virtual, part in enumerate(stages):
            begins, ends = self.is_first and virtual == 0, self.is_last and virtual == len(stages) - 1
            own = self._chain(["stem"] * begins + [names[i] for i in part] + ["head"] * ends, received=not begins)
            if begins:
                self.stem = own.pop(0)
            if ends:
                self.head = own.pop()
            self.chunks.append(own)
        self.inner: dict[str, list[UnitMemory]] = {}
        if self.is_first:
            self.inner = {p: [self._unit(name) for name in own] for p, own in units.layers.items() if p}
        owners = [name for chunk in self.chunks for name in (unit.name for unit in chunk)]
        owners += [unit.name for own in self.inner.values() for unit in own]
        owners += ["first"] * self.is_first + ["last"] * self.is_last
        self.own: list[Weight] = [weight for owner in owners for weight in weights.of(owner)]

    def _chain(self, names: Iterable[str], received: bool) -> list[UnitMemory]:
        """Units of a stage one after the other. received: what enters the first lies in buffers."""
        counted, units = self.units.travels[""] if received else frozenset[str](), []
        for name in names:
            trace = self.traces.units[name]
            takes = frozenset[str]() if self.memory.offload == "inputs" and trace.inputs else trace.takes
            units.append(self._unit(name, self._bytes_of(takes & counted)))
            counted = ((counted | takes) - trace.changes) | trace.keeps
        self.sent.append(self._traveling() - self._bytes_of(counted))
        return units

    def _unit(self, name: str, shared: int = 0) -> UnitMemory:
        trace, word = self.traces.units[name], self.words.get(name, "none")
        moved = {"inputs": trace.inputs, "attention": trace.kept, "none": 0}[self.memory.offload]
        owner, ranks = {"stem": "first", "head": "last"}.get(name, name), self.weights.ranks
        of = self.weights.of(owner)
        gathered = reduced = 0
        if self.weights.sharded:
            groups = [own for group, own in self.weights.groups(owner).items() if group]  # not the root's
            gathered = max((sum(weight.whole(ranks) for weight in own) for own in groups), default=0)
            reduced = max((sum(weight.to_reduce(ranks) for weight in own) for own in groups), default=0)
        whole = sum(weight.whole(ranks if weight.group is not None else 1) for weight in of)
        gradients = sum(weight.bytes(ranks) for weight in of if weight.trained)
        return UnitMemory(
            name, word, trace.saved - moved - shared, shared, moved, whole, gathered, reduced, gradients, trace
        )

    def measure(self) -> RankMemory:
        ranks = self.weights.ranks
        parameters = sum(weight.bytes(ranks) for weight in self.own)
        trained = [weight for weight in self.own if weight.trained]
        gradients = sum(weight.bytes(ranks) for weight in trained)
        moments = sum(map(self._moments_of, trained))
        average = gradients if self.average else 0
        on_host = 0
        if self.memory.offload_params:
            sharded = sum(weight.bytes(ranks) for weight in self.own if weight.group is not None)
            sharded_trained = sum(weight.bytes(ranks) for weight in trained if weight.group is not None)
            moved = sum(self._moments_of(weight) for weight in trained if weight.group is not None)
            on_host = sharded + moved + self.average * sharded_trained
        on_host += self.waiting
        fixed = parameters + moments + average - on_host + self.buffers
        off = sharded_trained if self.memory.offload_params else 0
        moments_seen = self._moments(gradients - off)
        top = max(moments_seen, key=lambda moment: moment.total)
        saved, stream, host, in_flight = self._most_waiting()
        head = max(self.head.trace.forward, self.head.trace.backward) if self.is_last else 0
        every = [*([self.stem] if self.is_first else []), *(u for own in self.inner.values() for u in own)]
        every += [unit for chunk in self.chunks for unit in chunk] + ([self.head] if self.is_last else [])
        return RankMemory(
            self.rank,
            parameters,
            gradients,
            moments,
            average,
            top.gathered + self.buffers,
            saved,
            stream,
            self.waiting,
            head,
            top.transient,
            host + on_host + off,
            fixed + top.total,
            top.name,
            in_flight,
            tuple(every),
        )

    def _moments_of(self, weight: Weight) -> int:
        if self.states is None:
            return 2 * weight.bytes(self.weights.ranks) + 4  # and the number of steps
        return self.states(weight.name, weight.local(self.weights.ranks))

    # What waits

    def _held(self, virtual: int) -> tuple[int, int, int]:
        """Of one micro-batch of one virtual stage between its forward and its backward: (saved, stream, host)."""
        units = list(self.chunks[virtual])
        saved = stream = 0
        if virtual == 0 and self.is_first:
            units += [self.stem, *(unit for own in self.inner.values() for unit in own)]
            stream += self._constants(virtual) + self._called_with(self.stem.trace.holds)
        if virtual == len(self.chunks) - 1 and self.is_last:
            units.append(self.head)
            saved -= self.head.trace.output
        elif self.layout.pp > 1:
            stream += self.sent[virtual]  # until its gradient comes
        return saved + sum(unit.saved for unit in units), stream, sum(unit.host for unit in units)

    def _constants(self, virtual: int) -> int:
        """Of what the stem makes for all layers, what these refer to until their backward."""
        names = [unit.name for unit in self.chunks[virtual]]
        if self.layout.pp > 1:  # they are sent
            return self._all_constants()
        total = self.traces.constants("", [*names, "head"])
        return total + sum(self.traces.constants(p, [unit.name for unit in own]) for p, own in self.inner.items())

    def _traveling(self, prefix: str = "") -> int:
        return self._bytes_of(self.units.travels[prefix], prefix)

    def _bytes_of(self, fields: Iterable[str], prefix: str = "") -> int:
        """Of the stream."""
        return sum(size for name, (size, _) in self.traces.stream[prefix].items() if name in fields)

    def _called_with(self, names: Iterable[str] | None = None) -> int:
        """Bytes of these arguments of the model; None: of all."""
        values = self.units.example if names is None else {name: self.units.example[name] for name in names}
        return sum(x.numel() * x.element_size() for x in values.values() if isinstance(x, Tensor))

    def _always(self) -> int:
        """The losses of all micro-batches. In a pipeline, buffers to receive into, made once for all of them, what is
        being sent of one, and the arguments of the first, which all ranks look at.
        """
        losses = self.head.trace.output * self.count if self.is_last else 0
        if self.layout.pp == 1:
            return losses
        sent = self.traces.stream[""].values()
        forward, backward = sum(size for size, _ in sent), sum(size for size, trained in sent if trained)
        last = len(self.chunks) - 1
        into = sum(not (virtual == 0 and self.is_first) for virtual in range(len(self.chunks)))
        back = sum(not (virtual == last and self.is_last) for virtual in range(len(self.chunks)))
        sending = 0 if self._keeps_sent else max(forward if back else 0, backward if into else 0)
        return losses + self.count * (into * forward + back * backward) + sending + self._called_with()

    @property
    def _keeps_sent(self) -> bool:
        """torch's schedules of virtual stages, and those that split a backward, wait for what was sent at the end."""
        return len(self.layout.stages) > 1 or self.layout.schedule == "zero_bubble"

    def _keeps(self, turn: Turn) -> int:
        """Bytes of what was sent that live until the end of the step, though with this turn nothing else needs them."""
        if self.layout.pp == 1 or not self._keeps_sent:
            return 0
        is_first = self.is_first and turn.virtual == 0
        kept = 0
        if turn.kind == "B" and not is_first:
            kept += sum(size for size, trained in self.traces.stream[""].values() if trained)
        if turn.kind == self._ends:
            kept += self._all_constants() if is_first else 0
            kept += 0 if self.is_last and turn.virtual == len(self.chunks) - 1 else self._traveling()
        return kept

    @property
    def _ends(self) -> str:
        """The kind of turn after which a micro-batch waits no longer."""
        return "W" if self.layout.schedule == "zero_bubble" and self.layout.pp > 1 else "B"

    def _most_waiting(self) -> tuple[int, int, int, int]:
        """(saved, stream, host, micro-batches), each when it is most."""
        most = [0, 0, 0, 0]
        for waiting, sent in self._waiting():
            now = [len(waiting), *map(sum, zip(*(self._held(turn) for turn in waiting), strict=True))]
            now[2] += sent
            most = [max(a, b) for a, b in zip(most, now, strict=True)]
        in_flight, saved, stream, host = most
        return saved, stream + self._always(), host, in_flight

    def _waiting(self) -> Iterator[tuple[list[int], int]]:
        """After each forward: the virtual stages of which something waits, and bytes that were sent and are kept."""
        waiting: list[tuple[int, int]] = []
        sent = 0
        for turn in turns(self.layout, self.rank, self.count):
            if turn.kind == "F":
                waiting.append(turn[1:])
                yield [virtual for virtual, _ in waiting], sent
            elif turn.kind == self._ends:
                waiting.remove(turn[1:])
            sent += self._keeps(turn)

    # What comes and goes

    def _moments(self, gradients: int) -> list[_Moment]:
        """The fullest moment of every kind of turn. gradients: of all parameters, on the device."""
        found = []
        always = self._always()
        others: dict[tuple, int] = {}
        waiting: list[tuple[int, int]] = []
        splits = self._ends == "W"
        sent = 0
        held = [sum(self._held(virtual)[:2]) for virtual in range(len(self.chunks))]
        # Between its halves, a backward keeps the gradients from which those of weights will come: modelled, about as
        # much as was saved. The first stage is not split.
        split = [self._held(virtual)[0] for virtual in range(len(self.chunks))]
        split[0] = 0 if self.is_first else split[0]
        first_backward = True
        halves: list[int] = []
        for turn in turns(self.layout, self.rank, self.count):
            place = turn[1:]
            if turn.kind == self._ends:
                waiting.remove(place)
            if turn.kind == "W":
                halves.remove(turn.virtual)
                sent += self._keeps(turn)
                continue
            besides = sent + sum(held[virtual] for virtual, _ in waiting) + sum(split[virtual] for virtual in halves)
            if turn.kind == "B" and splits:
                besides -= held[turn.virtual]
            # a step begins without gradients
            made = 0 if first_backward else gradients
            key = (turn.kind, turn.virtual, first_backward)
            others[key] = max(others.get(key, 0), besides + made)
            if turn.kind == "F":
                waiting.append(place)
            else:
                first_backward = False
                halves += [turn.virtual] * splits
            sent += self._keeps(turn)
        for (kind, virtual, first), besides in others.items():
            walk = self._forward(virtual) if kind == "F" else self._backward(virtual, first)
            if kind == "B" and splits and split[virtual]:
                whole = self._root() + sum(unit.gathered for unit in self.chunks[virtual])
                walk = [*walk, _Moment("a split backward", held[virtual], whole, split[virtual], 0)]
            top = max(walk, key=lambda moment: moment.total)
            found.append(top._replace(saved=top.saved + besides + always))
        found.append(self._update(gradients))
        return found

    def _update(self, gradients: int) -> _Moment:
        """AdamW, clipping, and what `finish_gradients` makes."""
        replicated = sum(w.bytes(1) for w in self.own if w.trained and w.group is None)
        flat = replicated if self.layout.dp_replicate * self.weights.ranks > 1 else 0
        temporary = gradients if self.optimizer == "foreach" else 0
        return _Moment("the optimizer", 0, 0, max(flat, temporary), gradients)

    def _sequence(self, virtual: int) -> list[tuple[UnitMemory, str]]:
        """The units of a virtual stage in the order in which they run, with the prefix of the inner ladder or ""."""
        units: list[tuple[UnitMemory, str]] = []
        if virtual == 0 and self.is_first:
            units += [(unit, prefix) for prefix, own in self.inner.items() for unit in own]
            units.append((self.stem, ""))
        units += [(unit, "") for unit in self.chunks[virtual]]
        if virtual == len(self.chunks) - 1 and self.is_last:
            units.append((self.head, ""))
        return units

    def _root_weights(self) -> list[Weight]:
        """What FSDP gathers at the beginning of the forward and of the backward, and drops at their end."""
        owners = ["first"] * self.is_first + ["last"] * self.is_last
        of = [weight for owner in owners for weight in self.weights.of(owner)]
        return [weight for weight in of if weight.group == ""]

    def _tower(self, prefix: str) -> int:
        """Of an inner ladder's own weights, gathered while its layers run; 0 for the main ladder and without FSDP."""
        own = self.weights.groups("first").get(prefix.removesuffix("."), ()) if prefix else ()
        return sum(weight.whole(self.weights.ranks) for weight in own)

    def _root(self) -> int:
        return sum(weight.whole(self.weights.ranks) for weight in self._root_weights())

    def _reduce_root(self) -> int:
        return sum(weight.to_reduce(self.weights.ranks) for weight in self._root_weights())

    def _forward(self, virtual: int) -> Iterator[_Moment]:
        root, alive, kept, before = self._root(), 0, 0, None
        sequence = self._sequence(virtual)
        if virtual == 0 and self.is_first:
            alive += self._called_with()
        for place, (unit, prefix) in enumerate(sequence):
            around = self.traces.around[prefix].forward - self._traveling(prefix) if prefix else -unit.shared
            ahead = sum(other.gathered for other, _ in sequence[place + 1 : place + 1 + self.memory.prefetch])
            buffer = unit.gathered or (before.gathered if before else 0)  # until the next comes
            gathered = root + self._tower(prefix) + kept + unit.gathered + buffer + ahead
            leaving = before.host if before else 0
            run = unit.trace.forward - (unit.trace.output if unit.name == "head" else 0)
            yield _Moment(f"forward of {unit.name}", alive + around, gathered, run + leaving, 0)
            alive += unit.saved + (self._all_constants() if unit.name == "stem" else 0)
            kept += 0 if self.memory.reshard else unit.gathered
            before = unit if unit.gathered else before

    def _all_constants(self, prefix: str = "") -> int:
        """The forward itself refers to all of them."""
        return sum(size for size, _ in self.traces.stream[prefix].values()) - self._traveling(prefix)

    def _idle(self, unit: UnitMemory) -> int:
        """Of a layer whose companion alone is trained: its own weights, where no gradient passes them. FSDP gathers
        them ahead all the same, and has them until the end.
        """
        if not self.weights.sharded or unit.name not in self.units.companions:
            return 0
        if self.units.plan.residual in self.units.trained[unit.name]:
            return 0
        frozen = [own for own in self.weights.groups(unit.name).values() if not any(w.trained for w in own)]
        return sum(weight.whole(self.weights.ranks) for own in frozen for weight in own)

    def _backward(self, virtual: int, first: bool) -> Iterator[_Moment]:
        """first: no gradients are there yet, of any parameter."""
        sequence = self._sequence(virtual)
        alive = sum(unit.saved for unit, _ in sequence)
        alive -= self.head.trace.output if sequence[-1][0].name == "head" else 0
        if virtual == 0 and self.is_first:
            alive += self._constants(virtual) + self._called_with(self.stem.trace.holds)
        constant = sum(
            size
            for name, (size, trained) in self.traces.stream[""].items()
            if trained and name not in self.units.travels[""]
        )
        sharded = self.weights.sharded
        still = 0 if self.memory.reshard else sum(unit.gathered for unit, _ in sequence)
        pending = buffer = done = 0  # gradients of the root; the buffer of the unit before; gradients that are there
        idle = 0  # weights that were gathered ahead for a backward that never comes
        for place in reversed(range(len(sequence))):
            unit, prefix = sequence[place]
            trace = unit.trace
            around = self.traces.around[prefix].backward if prefix else -unit.shared
            root = self._root() + self._tower(prefix)
            alive -= unit.saved - (trace.output if unit.name == "head" else 0)
            given = self.traces.returned if unit.name == "head" and self.layout.pp > 1 else 0
            following = next((u.gathered for u, _ in reversed(sequence[:place]) if u.gathered), 0)
            ahead = following if self.memory.reshard else 0
            if self.memory.prefetch > 1 and self.memory.reshard:
                ahead = sum(u.gathered for u, _ in sequence[max(0, place - self.memory.prefetch) : place])
            idle += self._idle(unit) if self.memory.reshard else 0
            weights = root + (unit.gathered + ahead + idle if self.memory.reshard else still)
            returned = sequence[place - 1][0].host if place else 0
            # the layer that runs first makes them itself
            grads = 0 if unit.name in ("stem", "head") or unit is self.chunks[virtual][-1] else constant
            new = (trace.backward if sharded or first else trace.again) - (trace.output if unit.name == "head" else 0)
            run = new + returned + grads
            yield _Moment(f"backward of {unit.name}", alive + around, weights + pending + buffer, run, done)
            if sharded and unit.name not in ("stem", "head"):
                through = trace.gradients + trace.output + grads
                weights = root + (ahead + idle if self.memory.reshard else still - unit.gathered)
                reducing = weights + pending + unit.reduced
                yield _Moment(f"gradients of {unit.name}", alive + around, reducing, through, done)
                buffer = unit.reduced or buffer
            elif sharded:
                pending += trace.gradients
            still -= unit.gathered if not self.memory.reshard else 0
            alive += given  # from the head's backward on: before, it is among what the head saves
            # those of stem and head are reduced at the end
            reduced = not sharded or unit.name not in ("stem", "head")
            done += unit.gradients if reduced and first and not self.memory.offload_params else 0
        if sharded:
            yield _Moment("gradients of the root", 0, pending + self._reduce_root(), 0, done)
