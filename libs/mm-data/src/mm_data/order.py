"""The order of samples, in closed form: the samples of step s are a pure function of (buckets, global batch, seed, s).

A *bucket* holds the samples of one key, e.g. of one shape; it is an endless concatenation of permutations, one per
epoch. Its batch j takes the places [jG, (j+1)G). In *round* e, bucket b with n samples gives its batches
floor(e n / G) ... floor((e + 1) n / G) - 1, and the batches of all buckets are shuffled. So every step has one key,
nothing is left over (the rest of a round comes first in the next), buckets are seen in proportion to their size, and
no rank, worker or restart enters into it.

Several sets in one bucket may have weights: a set of m samples and weight w then has round(m w) of the bucket's n
places in every epoch. These places, epoch after epoch, go through the set's own permutations, one after another: a
weight of 2 shows each sample twice in an epoch, one of 0.5 half of the set in one epoch and the other half in the next.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd
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


@dataclass(frozen=True)
class _Share:
    """The places of one set among those of a bucket."""

    members: np.ndarray  # the set's samples in this bucket
    places: int  # in an epoch
    before: int  # places of the sets before it
    name: str  # its own permutations are drawn by it


class Order:
    """`order.step(s)` gives the G picks of step s, for every s >= 0. Epochs count per bucket, or per set where it has a
    weight.

    `buckets[i]` is the key of sample i's bucket. `small_buckets` is for buckets with fewer samples than G:

    - "repeat": they fill their steps with repeated samples. (A larger bucket shows a sample twice in a step now and
      then, where one epoch of it ends in a step and the next begins.)
    - "drop": they are left out, and no sample stands twice in a step: the first step that an epoch shares with the one
      before takes other samples than those that are in it already.

    `small` describes such buckets; None where there are none. `sets`: (number of samples, weight) of each, in the order
    of the samples; none: all are one set of weight 1. Of a set with another weight than 1 a sample may stand twice in a
    step. Raises ValueError if no sample is left, and for a weight with which a set is never shown.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        global_batch: int,
        seed: int,
        small_buckets: SmallBuckets = "repeat",
        sets: Sequence[tuple[int, float]] = (),
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
        keys = sorted(found, key=repr)
        sets = sets or [(len(buckets), 1.0)]
        assert sum(count for count, _ in sets) == len(buckets)
        # of each bucket, the sets that are in it
        self.shares = [_share(np.array(found.pop(key)), sets, f"bucket {number}") for number, key in enumerate(keys)]
        self.global_batch = global_batch
        self.seed = seed
        self.distinct = small_buckets == "drop"
        self.sizes = [sum(share.places for share in shares) for shares in self.shares]
        few = [size for size in self.sizes if size < global_batch]
        self.small = Small(few, len(self.sizes), sum(self.sizes), global_batch, self.distinct) if few else None
        most = max(self.sizes)
        kept = [number for number, size in enumerate(self.sizes) if size >= (global_batch if self.distinct else 1)]
        if not kept:
            raise ValueError(
                f"no bucket is left: all {len(self.sizes)} have fewer samples than a step takes ({global_batch}), the "
                f"largest has {most}. Take a global batch of {most} or less, or repeat samples in a step: "
                "small_buckets repeat"
            )
        self.shares, self.sizes = [self.shares[number] for number in kept], [self.sizes[number] for number in kept]
        # A few permutations stay at hand: a batch lies in one epoch or two, and steps go through the buckets in turn.
        self._permutation = lru_cache(maxsize=2 * len(self.sizes) + 2)(self._permutation)
        # A step of a set in two epochs of the bucket lies in so many of its own.
        own = sum(ceil(2 * share.places / len(share.members)) + 1 for shares in self.shares for share in shares)
        self._own_permutation = lru_cache(maxsize=own)(self._own_permutation)
        self._round = lru_cache(maxsize=2)(self._round)

    def batches_before(self, round_: int) -> int:
        """The number of steps in all rounds before `round_`."""
        return sum(round_ * size // self.global_batch for size in self.sizes)

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
        size = self.sizes[bucket]
        places = range(batch * self.global_batch, (batch + 1) * self.global_batch)
        return [
            self._pick(bucket, place // size, int(self._permutation(bucket, place // size)[place % size]))
            for place in places
        ]

    def _pick(self, bucket: int, epoch: int, place: int) -> Pick:
        """The sample at a place of a bucket's epoch."""
        share = next(share for share in reversed(self.shares[bucket]) if share.before <= place)
        size = len(share.members)
        if share.places != size:
            epoch, place_in_set = divmod(epoch * share.places + place - share.before, size)
            return Pick(int(share.members[self._own_permutation(share.name, size, epoch)[place_in_set]]), epoch)
        return Pick(int(share.members[place - share.before]), epoch)

    def _round(self, round_: int) -> list[tuple[int, int]]:
        """(bucket, batch) of each step of a round."""
        batches = [
            (b, j)
            for b, n in enumerate(self.sizes)
            for j in range(round_ * n // self.global_batch, (round_ + 1) * n // self.global_batch)
        ]
        return [batches[i] for i in permutation(len(batches), self.seed, round_, "round")]

    def _permutation(self, bucket: int, epoch: int) -> np.ndarray:
        return self._distinct(bucket, epoch) if self.distinct else self._drawn(bucket, epoch)

    def _drawn(self, bucket: int, epoch: int) -> np.ndarray:
        return permutation(self.sizes[bucket], self.seed, epoch, f"bucket {bucket}")

    def _own_permutation(self, name: str, size: int, epoch: int) -> np.ndarray:
        return permutation(size, self.seed, epoch, name)

    def _distinct(self, bucket: int, epoch: int) -> np.ndarray:
        """A permutation that begins with other samples than those that its first step has of the epoch before.

        Only the first G places are reordered. In a bucket of 2G samples or more these do not reach to the last step,
        so the end of the epoch before is as drawn. In a smaller one its order is followed from the last epoch that
        began with a step of its own: less than G epochs.
        """
        size, step = self.sizes[bucket], self.global_batch
        period = step // gcd(size, step)
        first = epoch // period * period if size < 2 * step else max(0, epoch - 1)
        order = self._drawn(bucket, first)
        for later in range(first + 1, epoch + 1):
            left = later * size % step  # places that the epoch before has in the first step of this one
            drawn = self._drawn(bucket, later)
            taken = np.isin(drawn[:step], order[size - left :])
            order = np.concatenate((drawn[:step][~taken], drawn[:step][taken], drawn[step:]))
        return order


def _share(members: np.ndarray, sets: Sequence[tuple[int, float]], bucket: str) -> list[_Share]:
    """The sets that have samples in a bucket, with their places."""
    shares: list[_Share] = []
    first, before = 0, 0
    for number, (count, weight) in enumerate(sets):
        own = members[(members >= first) & (members < first + count)]
        places = round(len(own) * weight)
        if len(own) and not places:
            raise ValueError(
                f"a weight of {weight:g} for a set of {count} samples: it would never be shown. Give it a weight of "
                f"more than {0.5 / len(own):g}, or leave it out"
            )
        if places:
            shares.append(_Share(own, places, before, f"set {number} of {bucket}"))
        first, before = first + count, before + places
    return shares


def _most_repeats(size: int, global_batch: int) -> int:
    """How often one of `size` samples can stand among `global_batch` places of one permutation after another."""
    if global_batch % size == 0:
        return global_batch // size
    first = gcd(size, global_batch)  # the fewest places that a step can have of an epoch that ends in it
    return 1 - (first - global_batch) // size
