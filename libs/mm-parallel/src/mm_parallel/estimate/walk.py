"""A step of training on one pipeline rank: which bytes come and go.

Of each unit, what it saves and what it needs while it runs is counted (`mm_parallel.estimate.units`). Here a step walks
over the units in the order in which they run, forward and backward, and adds what is there besides:

    always            parameters, moments, average; gradients as soon as a micro-batch has made them
    with FSDP         the weights of the unit that runs, and as many again in the buffer in which they came; those of
                      the next in the backward; gradients before they are reduced, and the buffer in which they are
    the root's        (embeddings, head) from the first layer to the last, and their gradients until the end
    in a pipeline     what waits of other micro-batches, and buffers for what is received, of all micro-batches;
                      of virtual stages and zero_bubble also all that was sent, until the end of the step
    zero_bubble       what the first half of a backward leaves for the second, counted by torch's own functions; with
                      FSDP all weights, and whole gradients, also those that are not yet added to others

That is what torch's FSDP2 and its pipelines do; it is modelled, and compared with runs in tests.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.estimate.flight import Turn, turns
from mm_parallel.estimate.sizes import RankMemory, UnitMemory
from mm_parallel.estimate.traces import Traces
from mm_parallel.estimate.units import Units
from mm_parallel.estimate.weights import Weight, Weights


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


class _Made(NamedTuple):
    """Which gradients of a virtual stage are there (`UnitMemory`). Where FSDP adds up nothing apart, either is all."""

    summed: bool
    fresh: bool


class Rank:
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
        self.is_first, self.is_last = rank == 0, rank == layout.pp - 1
        self.splits = [layout.splits and not (self.is_first and virtual == 0) for virtual in range(len(stages))]
        """Of each virtual stage, whether its backwards are in halves."""
        self.gathers_once = layout.splits and weights.sharded
        """Whether FSDP gathers all weights when a step begins, and reduces all gradients when it ends."""
        names = units.layers[""]
        split = [[names[i] for i in part] for part, splits in zip(stages, self.splits, strict=True) if splits]
        if split and self.is_last:
            split[-1].append("head")
        self.traces: Traces = units.trace(layout, words, split)
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
        self.sent.append(0 if units[-1].name == "head" else self._traveling() - self._bytes_of(counted))
        return units

    def _unit(self, name: str, shared: int = 0) -> UnitMemory:
        trace, word = self.traces.units[name], self.words.get(name, "none")
        moved = {"inputs": trace.inputs, "attention": trace.kept, "none": 0}[self.memory.offload]
        owner, ranks = {"stem": "first", "head": "last"}.get(name, name), self.weights.ranks
        of = self.weights.of(owner)
        gathered = reduced = 0
        if self.weights.sharded and not self.gathers_once:
            groups = [own for group, own in self.weights.groups(owner).items() if group]  # not the root's
            gathered = max((sum(weight.whole(ranks) for weight in own) for own in groups), default=0)
            reduced = max((sum(weight.to_reduce(ranks) for weight in own) for own in groups), default=0)
        whole = sum(weight.whole(ranks if weight.group is not None else 1) for weight in of)
        trained = [w for w in of if w.trained and (w.group is None or not self.memory.offload_params)]
        gradients = sum(
            w.to_reduce(ranks) if self.gathers_once and w.group is not None else w.bytes(ranks) for w in trained
        )
        apart = [w for w in trained if self.gathers_once and w.group is not None and w.gathered != w.reduced]
        summed, fresh = sum(w.to_reduce(ranks) for w in apart), sum(w.whole(ranks) for w in apart)
        sizes = shared, moved, whole, gathered, reduced, gradients, summed, fresh
        return UnitMemory(name, word, trace.saved - moved - shared, *sizes, trace)

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

    def _held(self, virtual: int, halfway: bool) -> tuple[int, int, int]:
        """Of one micro-batch of one virtual stage between its forward and its backward, or between the halves of this:
        (saved, stream, host).
        """
        units = list(self.chunks[virtual])
        saved = stream = 0
        if virtual == 0 and self.is_first:
            units += [self.stem, *(unit for own in self.inner.values() for unit in own)]
            stream += self._constants(virtual) + self._called_with(self.stem.trace.holds)
        if virtual == len(self.chunks) - 1 and self.is_last:
            units.append(self.head)
            saved -= self.head.trace.output
        elif self.layout.pp > 1:
            stream += self.sent[virtual]  # torch's stage refers to it until the backward has ended
        if halfway:
            saved += sum(unit.trace.halves.between - unit.trace.saved for unit in units)
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
        return len(self.layout.stages) > 1 or self.layout.splits

    def _keeps(self, turn: Turn) -> int:
        """Bytes of what was sent that live until the end of the step, though with this turn nothing else needs them."""
        if self.layout.pp == 1 or not self._keeps_sent:
            return 0
        is_first = self.is_first and turn.virtual == 0
        kept = 0
        if turn.kind == "B" and not is_first:
            kept += sum(size for size, trained in self.traces.stream[""].values() if trained)
        if turn.kind == ("W" if self.splits[turn.virtual] else "B"):
            kept += self._all_constants() if is_first else 0
            kept += 0 if self.is_last and turn.virtual == len(self.chunks) - 1 else self._traveling()
        return kept

    def _turns(self) -> Iterator[tuple[Turn, list[tuple[int, bool]], int]]:
        """Every turn of a step, with what waits of other micro-batches: virtual stages, and whether halfway through a
        backward; and with bytes of what was sent and is kept.
        """
        waiting: dict[tuple[int, int], bool] = {}
        sent = 0
        for turn in turns(self.layout, self.rank, self.count):
            waiting.pop(turn[1:], None)
            yield turn, [(virtual, halfway) for (virtual, _), halfway in waiting.items()], sent
            if turn.kind == "F" or (turn.kind == "B" and self.splits[turn.virtual]):
                waiting[turn[1:]] = turn.kind == "B"
            sent += self._keeps(turn)

    def _most_waiting(self) -> tuple[int, int, int, int]:
        """(saved, stream, host, micro-batches), each when it is most."""
        most = [0, 0, 0, 0]
        for turn, others, sent in self._turns():
            waiting = [*others, (turn.virtual, False)] if turn.kind == "F" else others
            now = [
                len(waiting),
                *(sum(of) for of in zip((0, 0, 0), *(self._held(*one) for one in waiting), strict=True)),
            ]
            now[2] += sent
            most = [max(a, b) for a, b in zip(most, now, strict=True)]
        in_flight, saved, stream, host = most
        return saved, stream + self._always(), host, in_flight

    # What comes and goes

    def _moments(self, gradients: int) -> list[_Moment]:
        """The fullest moment of every kind of turn. gradients: of all parameters, on the device."""
        found = []
        always = self._always()
        besides: dict[tuple[str, int, _Made], int] = {}  # most bytes, by turn and what gradients are there
        made = [_Made(False, False)] * len(self.chunks)  # a step begins without
        for turn, others, sent in self._turns():
            kind, virtual, _ = turn
            waits = sum(sum(self._held(*one)[:2]) for one in others)
            there = sum(self._gradients(*one) for one in enumerate(made))
            key = (kind, virtual, made[virtual])
            besides[key] = max(besides.get(key, 0), waits + sent + there)
            if kind == "W":
                made[virtual] = _Made(made[virtual].summed, True)
            elif kind == "B":
                made[virtual] = _Made(not self.splits[virtual] or any(made[virtual]), False)
        for (kind, virtual, own), other in besides.items():
            match kind:
                case "F":
                    walk = self._forward(virtual)
                case "B" if self.splits[virtual]:
                    walk = self._first_half(virtual, own)
                case "B":
                    walk = self._backward(virtual, not own.summed)
                case "W":
                    walk = self._second_half(virtual, own)
            top = max(walk, key=lambda moment: moment.total)
            found.append(top._replace(saved=top.saved + other + always))
        if self.gathers_once:
            sizes: dict[str, int] = defaultdict(int)
            for weight in self._root_weights():
                sizes[weight.group] += weight.to_reduce(self.weights.ranks)
            there = sum(self._gradients(*one) for one in enumerate(made))
            found.append(_Moment("gradients of a step", always, self._root() + max(sizes.values()), 0, there))
        found.append(self._update(gradients))
        return found

    def _gradients(self, virtual: int, made: _Made) -> int:
        """Of a virtual stage."""
        of = [unit for unit, _ in self._sequence(virtual)]
        total = sum(unit.gradients - unit.summed for unit in of) if any(made) else 0
        return total + sum(made.summed * unit.summed + made.fresh * unit.fresh for unit in of)

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

    @staticmethod
    def _output(unit: UnitMemory) -> int:
        """Of what a unit saves, the losses, which are there always."""
        return unit.trace.output if unit.name == "head" else 0

    def _root_weights(self) -> list[Weight]:
        """What FSDP gathers at the beginning of the forward and of the backward, and drops at their end; all, where it
        gathers once for a step.
        """
        if self.gathers_once:
            return [weight for weight in self.own if weight.group is not None]
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
            run = unit.trace.forward - self._output(unit)
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

    def _constant_gradients(self, unit: UnitMemory, virtual: int) -> int:
        """Of what the stem makes for all layers, those that other units have made: there are none before the first."""
        if unit.name in ("stem", "head") or unit is self.chunks[virtual][-1]:
            return 0
        stream, travels = self.traces.stream[""], self.units.travels[""]
        return sum(size for name, (size, trained) in stream.items() if trained and name not in travels)

    def _first_half(self, virtual: int, made: _Made) -> Iterator[_Moment]:
        """Of a backward: until it has ended, all of the graph is there."""
        sequence = [unit for unit, _ in self._sequence(virtual)]
        alive = self.sent[virtual] + sum(unit.saved - self._output(unit) for unit in sequence)
        for unit in reversed(sequence):
            run = unit.trace.backward - unit.trace.saved + self._constant_gradients(unit, virtual)
            yield _Moment(f"gradients of what enters {unit.name}", alive, self._root(), run, 0)
            alive += unit.trace.halves.after - unit.trace.saved
            if made.fresh and unit.name != "head":  # FSDP adds them up; those of the root at the end
                alive += (0 if made.summed else unit.summed) - unit.fresh

    def _second_half(self, virtual: int, made: _Made) -> Iterator[_Moment]:
        sequence = [unit for unit, _ in self._sequence(virtual)]
        first = not made.fresh and not (made.summed and not any(unit.fresh for unit in sequence))
        alive, done = self.sent[virtual] + sum(unit.saved - self._output(unit) for unit in sequence), 0
        alive += sum(unit.trace.halves.between - unit.trace.saved for unit in sequence)
        for unit in sequence:
            halves = unit.trace.halves
            run = (halves.weights if first else halves.again) - halves.between
            yield _Moment(f"gradients of weights of {unit.name}", alive, self._root(), run, done)
            alive += halves.left - halves.between
            done += unit.trace.gradients * first

    def _backward(self, virtual: int, first: bool) -> Iterator[_Moment]:
        """first: no gradients are there yet, of any parameter."""
        sequence = self._sequence(virtual)
        alive = sum(unit.saved - self._output(unit) for unit, _ in sequence)
        if virtual == 0 and self.is_first:
            alive += self._constants(virtual) + self._called_with(self.stem.trace.holds)
        sharded = self.weights.sharded
        still = 0 if self.memory.reshard else sum(unit.gathered for unit, _ in sequence)
        pending = buffer = done = 0  # gradients of the root; the buffer of the unit before; gradients that are there
        idle = 0  # weights that were gathered ahead for a backward that never comes
        for place in reversed(range(len(sequence))):
            unit, prefix = sequence[place]
            trace = unit.trace
            around = self.traces.around[prefix].backward if prefix else -unit.shared
            root = self._root() + self._tower(prefix)
            alive -= unit.saved - self._output(unit)
            given = self.traces.returned if unit.name == "head" and self.layout.pp > 1 else 0
            following = next((u.gathered for u, _ in reversed(sequence[:place]) if u.gathered), 0)
            ahead = following if self.memory.reshard else 0
            if self.memory.prefetch > 1 and self.memory.reshard:
                ahead = sum(u.gathered for u, _ in sequence[max(0, place - self.memory.prefetch) : place])
            idle += self._idle(unit) if self.memory.reshard else 0
            weights = root + (unit.gathered + ahead + idle if self.memory.reshard else still)
            returned = sequence[place - 1][0].host if place else 0
            grads = self._constant_gradients(unit, virtual)
            new = (trace.backward if sharded or first else trace.again) - self._output(unit)
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
            done += unit.gradients if reduced and first else 0
        if sharded and not self.gathers_once:
            yield _Moment("gradients of the root", 0, pending + self._reduce_root(), 0, done)
