"""Which micro-batches of a pipeline wait for their backward, and when."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from mm_parallel.config import ParallelConfig


class Turn(NamedTuple):
    """One thing that a rank does: forward, backward, or weights' gradients of a backward that was split.

    The first stage's is not split: all of it runs in the turn that is for the weights.
    """

    kind: Literal["F", "B", "W"]
    virtual: int
    number: int


def turns(layout: ParallelConfig, rank: int, count: int) -> Iterator[Turn]:
    """All turns of a pipeline rank in a step of `count` micro-batches, in the order in which torch's schedules run.

    Without a pipeline each micro-batch goes forward and backward.
    """
    if not layout.pp_layers:
        for number in range(count):
            yield Turn("F", 0, number)
            yield Turn("B", 0, number)
        return
    ranks, virtual = layout.pp, len(layout.stages)
    splits = layout.splits
    if virtual == 1 and not splits:
        ahead = count if count < ranks else ranks - rank
        yield from _one_and_one([(0, n) for n in range(count)], [(0, n) for n in range(count)], min(ahead, count))
        return
    rounds = max(1, count // ranks)
    size = count // rounds  # micro-batches of a round
    places = [divmod(i, size * virtual) for i in range(count * virtual)]
    forwards = [(place // size, turn * size + place % size) for turn, place in places]
    backwards = [(virtual - 1 - place // size, turn * size + place % size) for turn, place in places]
    ahead = (virtual - 1) * size + (1 if splits else 2) * (ranks - 1 - rank) + 1
    order = _one_and_one(forwards, backwards, min(ahead, len(forwards)))
    if not splits:
        yield from order
        return
    waiting: list[tuple[int, int]] = []
    for turn in order:
        first = rank == 0 and turn.virtual == 0
        if turn.kind == "F" or not first:
            yield turn
        if turn.kind == "B":
            waiting.append((turn.virtual, turn.number))
            if len(waiting) > rank:
                yield Turn("B" if first else "W", *waiting.pop(0))
    for place in waiting:
        yield Turn("W", *place)


def _one_and_one(forwards: list[tuple[int, int]], backwards: list[tuple[int, int]], ahead: int) -> Iterator[Turn]:
    """`ahead` forwards, then a backward and a forward by turns."""
    for place in forwards[:ahead]:
        yield Turn("F", *place)
    for i, place in enumerate(backwards):
        yield Turn("B", *place)
        if ahead + i < len(forwards):
            yield Turn("F", *forwards[ahead + i])
