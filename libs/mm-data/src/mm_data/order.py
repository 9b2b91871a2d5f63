"""The order of samples, in closed form: the samples of step s are a pure function of (buckets, global batch, seed, s).

A *bucket* holds the samples of one key, e.g. of one shape; it is an endless concatenation of permutations, one per
epoch. Its batch j takes the places [jG, (j+1)G). In *round* e, bucket b with n samples gives its batches
floor(e n / G) ... floor((e + 1) n / G) - 1, and the batches of all buckets are shuffled. So every step has one key,
nothing is left over (the rest of a round comes first in the next), buckets are seen in proportion to their size, and
no rank, worker or restart enters into it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Literal

import numpy as np

from mm_data.batch import Pick
from mm_data.random import permutation

SmallBuckets = Literal["repeat", "drop"]


@dataclass(frozen=True)
class Small:
    """The buckets that have fewer samples than a global batch."""

    sizes: list[int]  # samples of each, at least one bucket
    buckets: int  # of the whole data set
    samples: int  # of the whole data set
    global_batch: int
    dropped: bool

    @property
    def most_repeats(self) -> int:
        """How often one sample stands in a step at most, when they are repeated."""
        return max(_most_repeats(size, self.global_batch) for size in self.sizes)

    def describe(self, small_buckets: str = "small_buckets=", global_batch: str = "global_batch=") -> str:
        """What becomes of them, and what else could. The arguments are how the reader gives the two settings."""
        count, held = len(self.sizes), sum(self.sizes)
        have = f"{count} of {self.buckets} buckets {'has' if count == 1 else 'have'} fewer samples than a step takes"
        them = f"{'its' if count == 1 else 'their'} {held} sample{'s' * (held != 1)} of {self.samples}"
        repeated = f"up to {self.most_repeats} times in one step"
        smaller = f"{global_batch}{min(self.sizes)} is small enough for all of them"
        if self.dropped:
            return (
                f"{have} ({self.global_batch}): {them} are left out. "
                f"{small_buckets}repeat shows them too, a sample {repeated}; {smaller}."
            )
        return (
            f"{have} ({self.global_batch}): {them} are repeated, a sample {repeated}. "
            f"{small_buckets}drop leaves them out; {smaller}."
        )


class Order:
    """`order.step(s)` gives the G picks of step s, for every s >= 0. Epochs count per bucket.

    `buckets[i]` is the key of sample i's bucket. `small_buckets` is for buckets with fewer samples than G:

    - "repeat": they fill their steps with repeated samples. (A larger bucket shows a sample twice in a step now and
      then, where one epoch of it ends in a step and the next begins.)
    - "drop": they are left out, and no sample stands twice in a step: the first step that an epoch shares with the one
      before takes other samples than those that are in it already.

    `small` describes such buckets; None where there are none. Raises ValueError if no sample is left.
    """

    def __init__(
        self, buckets: Sequence[Hashable], global_batch: int, seed: int, small_buckets: SmallBuckets = "repeat"
    ):
        if not buckets:
            raise ValueError("the data set has no samples")
        if global_batch < 1:
            raise ValueError(f"global_batch={global_batch} must be at least 1")
        if small_buckets not in ("repeat", "drop"):
            raise ValueError(f"small_buckets={small_buckets!r} must be repeat or drop")
        found: dict[Hashable, list[int]] = {}
        for index, key in enumerate(buckets):
            found.setdefault(key, []).append(index)
        self.members = [found[key] for key in sorted(found, key=repr)]  # of each bucket
        self.global_batch = global_batch
        self.seed = seed
        self.distinct = small_buckets == "drop"
        sizes = [len(bucket) for bucket in self.members]
        few = [size for size in sizes if size < global_batch]
        self.small = Small(few, len(sizes), len(buckets), global_batch, self.distinct) if few else None
        if self.distinct:
            self.members = [bucket for bucket in self.members if len(bucket) >= global_batch]
        if not self.members:
            raise ValueError(
                f"no bucket is left: all {len(sizes)} have fewer samples than a step takes ({global_batch}), the "
                f"largest has {max(sizes)}. Take a global batch of {max(sizes)} or less, or repeat samples in a step: "
                "small_buckets repeat"
            )
        # A few permutations stay at hand: a batch lies in one epoch or two, and steps go through the buckets in turn.
        self._permutation = lru_cache(maxsize=2 * len(self.members) + 2)(self._permutation)
        self._round = lru_cache(maxsize=2)(self._round)

    def batches_before(self, round_: int) -> int:
        """The number of steps in all rounds before `round_`."""
        return sum(round_ * len(bucket) // self.global_batch for bucket in self.members)

    def step(self, step: int) -> list[Pick]:
        """The samples of a step, in the order in which ranks take them."""
        assert step >= 0
        low, high = 0, 1  # the round: batches_before(low) <= step < batches_before(high)
        while self.batches_before(high) <= step:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.batches_before(middle) <= step else (low, middle)
        bucket, batch = self._round(low)[step - self.batches_before(low)]
        size = len(self.members[bucket])
        places = range(batch * self.global_batch, (batch + 1) * self.global_batch)
        return [
            Pick(self.members[bucket][self._permutation(bucket, place // size)[place % size]], place // size)
            for place in places
        ]

    def _round(self, round_: int) -> list[tuple[int, int]]:
        """(bucket, batch) of each step of a round."""
        counts = [len(bucket) for bucket in self.members]
        batches = [
            (b, j)
            for b, n in enumerate(counts)
            for j in range(round_ * n // self.global_batch, (round_ + 1) * n // self.global_batch)
        ]
        return [batches[i] for i in permutation(len(batches), self.seed, round_, "round")]

    def _permutation(self, bucket: int, epoch: int) -> np.ndarray:
        return self._distinct(bucket, epoch) if self.distinct else self._drawn(bucket, epoch)

    def _drawn(self, bucket: int, epoch: int) -> np.ndarray:
        return permutation(len(self.members[bucket]), self.seed, epoch, f"bucket {bucket}")

    def _distinct(self, bucket: int, epoch: int) -> np.ndarray:
        """A permutation that begins with other samples than those that its first step has of the epoch before.

        Only the first G places are reordered. In a bucket of 2G samples or more these do not reach to the last step,
        so the end of the epoch before is as drawn. In a smaller one its order is followed from the last epoch that
        began with a step of its own: less than G epochs.
        """
        size, step = len(self.members[bucket]), self.global_batch
        period = step // gcd(size, step)
        first = epoch // period * period if size < 2 * step else max(0, epoch - 1)
        order = self._drawn(bucket, first)
        for later in range(first + 1, epoch + 1):
            left = later * size % step  # places that the epoch before has in the first step of this one
            drawn = self._drawn(bucket, later)
            taken = np.isin(drawn[:step], order[size - left :])
            order = np.concatenate((drawn[:step][~taken], drawn[:step][taken], drawn[step:]))
        return order


def _most_repeats(size: int, global_batch: int) -> int:
    """How often one of `size` samples can stand among `global_batch` places of one permutation after another."""
    if global_batch % size == 0:
        return global_batch // size
    first = gcd(size, global_batch)  # the fewest places that a step can have of an epoch that ends in it
    return 1 - (first - global_batch) // size
