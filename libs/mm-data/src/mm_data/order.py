"""The order of samples, in closed form: the samples of step s are a pure function of (shapes, global batch, seed, s).

A *bucket* holds the samples of one shape; it is an endless concatenation of permutations, one per epoch. Its batch j
takes the places [jG, (j+1)G). In *round* e, bucket b with n samples gives its batches floor(e n / G) ... floor((e + 1)
n / G) - 1, and the batches of all buckets are shuffled. So every step has one shape, nothing is ever dropped (what is
left over in a round comes first in the next), buckets are seen in proportion to their size, and no rank, worker or
restart enters into it.
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

from mm_data.random import permutation


class Pick(NamedTuple):
    """A sample to show."""

    index: int
    epoch: int
    caption: int | None  # which of its captions; None: the empty prompt


class Order:
    """`order.step(s)` gives the G (sample index, epoch) of step s, for every s >= 0. Epochs count per bucket."""

    def __init__(self, shapes: Sequence[Hashable], global_batch: int, seed: int):
        if not shapes:
            raise ValueError("the data set has no samples")
        if global_batch < 1:
            raise ValueError(f"global_batch={global_batch} must be at least 1")
        members: dict[Hashable, list[int]] = {}
        for index, shape in enumerate(shapes):
            members.setdefault(shape, []).append(index)
        self.buckets = [members[shape] for shape in sorted(members, key=repr)]
        self.global_batch = global_batch
        self.seed = seed
        # A few permutations stay at hand: a batch lies in one epoch or two, and steps go through the buckets in turn.
        self._permutation = lru_cache(maxsize=2 * len(self.buckets) + 2)(self._permutation)
        self._round = lru_cache(maxsize=2)(self._round)

    def batches_before(self, round_: int) -> int:
        """The number of steps in all rounds before `round_`."""
        return sum(round_ * len(bucket) // self.global_batch for bucket in self.buckets)

    def step(self, step: int) -> list[tuple[int, int]]:
        """The (sample index, epoch) pairs of a step, in the order in which ranks take them."""
        assert step >= 0
        low, high = 0, 1  # the round: batches_before(low) <= step < batches_before(high)
        while self.batches_before(high) <= step:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.batches_before(middle) <= step else (low, middle)
        bucket, batch = self._round(low)[step - self.batches_before(low)]
        size = len(self.buckets[bucket])
        places = range(batch * self.global_batch, (batch + 1) * self.global_batch)
        return [
            (self.buckets[bucket][self._permutation(bucket, place // size)[place % size]], place // size)
            for place in places
        ]

    def _round(self, round_: int) -> list[tuple[int, int]]:
        """(bucket, batch) of each step of a round."""
        counts = [len(bucket) for bucket in self.buckets]
        batches = [
            (b, j)
            for b, n in enumerate(counts)
            for j in range(round_ * n // self.global_batch, (round_ + 1) * n // self.global_batch)
        ]
        return [batches[i] for i in permutation(len(batches), self.seed, round_, "round")]

    def _permutation(self, bucket: int, epoch: int):
        return permutation(len(self.buckets[bucket]), self.seed, epoch, f"bucket {bucket}")
