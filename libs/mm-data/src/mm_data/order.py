"""The order of samples, in closed form: the samples of step s are a pure function of (buckets, global batch, seed, s).

A *bucket* holds the samples of one key, e.g. of one shape; it is an endless concatenation of permutations, one per
epoch. Its batch j takes the places [jG, (j+1)G). In *round* e, bucket b with n samples gives its batches
floor(e n / G) ... floor((e + 1) n / G) - 1, and the batches of all buckets are shuffled. So every step has one key,
nothing is left over (the rest of a round comes first in the next), buckets are seen in proportion to their size, and
no rank, worker or restart enters into it.

Several sets in one bucket may have weights: a set of m samples and weight w then has m w of the bucket's places in an
epoch. Where that is no whole number, epochs differ by a place: the first E have m w E of them, rounded. So a set keeps
its weight however few of its samples a bucket has. These places, epoch after epoch, go through the set's own
permutations, one after another: a weight of 2 shows each sample twice in an epoch, one of 0.5 half of the set in one
epoch and the other half in the next.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
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
    """The part of one set in a bucket."""

    members: np.ndarray  # the set's samples in this bucket
    places: Fraction  # in an epoch, on average
    name: str  # its own permutations are drawn by it

    def before(self, epoch: int) -> int:
        """Its places in all epochs before this one: the average so many times, rounded."""
        over, under = self.places.as_integer_ratio()
        return (2 * epoch * over + under) // (2 * under)


class _Bucket:
    """The samples of one key, as places of epochs."""

    def __init__(self, shares: list[_Share]):
        self.shares = shares
        self.whole = sum(share.places.numerator for share in shares if share.places.denominator == 1)
        self.broken = [share for share in shares if share.places.denominator != 1]
        self.size = max(1, round(sum(share.places for share in shares)))  # of an epoch, on average

    def before(self, epoch: int) -> int:
        """Places in all epochs before this one."""
        whole = epoch * self.whole
        return whole + sum([share.before(epoch) for share in self.broken]) if self.broken else whole

    def epoch(self, place: int) -> int:
        """In which epoch a place lies, counted from the first."""
        return place // self.whole if not self.broken else _last(self.before, place)


def _last(before: Callable[[int], int], value: int) -> int:
    """The last number n with before(n) <= value; before(0) is 0, and it grows without end."""
    low, high = 0, 1
    while before(high) <= value:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if before(middle) <= value else (low, middle)
    return low


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
    step, and counts as often as its weight says. Raises ValueError if no sample is left, and for a weight with which a
    set has no place in an epoch.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        global_batch: int,
        seed: int,
        small_buckets: SmallBuckets = "repeat",
        sets: Sequence[tuple[int, float | Fraction]] = (),
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
        _check_weights(sets)
        # of each bucket, the sets that are in it
        self.buckets = [
            _Bucket(_share(np.array(found.pop(key)), sets, f"bucket {number}")) for number, key in enumerate(keys)
        ]
        self.global_batch = global_batch
        self.seed = seed
        self.distinct = small_buckets == "drop"
        sizes = [bucket.size for bucket in self.buckets]
        few = [size for size in sizes if size < global_batch]
        self.small = Small(few, len(sizes), sum(sizes), global_batch, self.distinct) if few else None
        most = max(sizes)
        self.buckets = [one for one in self.buckets if one.size >= (global_batch if self.distinct else 1)]
        if not self.buckets:
            raise ValueError(
                f"no bucket is left: all {len(sizes)} have fewer samples than a step takes ({global_batch}), the "
                f"largest has {most}. Take a global batch of {most} or less, or repeat samples in a step: "
                "small_buckets repeat"
            )
        # A few permutations stay at hand: a batch lies in one epoch or two, and steps go through the buckets in turn.
        self._permutation = lru_cache(maxsize=2 * len(self.buckets) + 2)(self._permutation)
        # A step of a set in two epochs of the bucket lies in so many of its own.
        shares = [share for bucket in self.buckets for share in bucket.shares]
        own = sum(ceil(2 * share.places / len(share.members)) + 1 for share in shares)
        self._own_permutation = lru_cache(maxsize=own)(self._own_permutation)
        self._round = lru_cache(maxsize=2)(self._round)

    def batches_before(self, round_: int) -> int:
        """The number of steps in all rounds before `round_`."""
        return sum(bucket.before(round_) // self.global_batch for bucket in self.buckets)

    def step(self, step: int) -> list[Pick]:
        """The samples of a step, in the order in which ranks take them."""
        assert step >= 0
        round_ = _last(self.batches_before, step)
        number, batch = self._round(round_)[step - self.batches_before(round_)]
        return [self.pick(number, batch * self.global_batch + i) for i in range(self.global_batch)]

    def pick(self, number: int, place: int) -> Pick:
        """The sample at a place of a bucket."""
        bucket = self.buckets[number]
        epoch = bucket.epoch(place)
        place = int(self._permutation(number, epoch)[place - bucket.before(epoch)])
        for share in bucket.shares:
            first = share.before(epoch)
            own = share.before(epoch + 1) - first
            if place < own:
                break
            place -= own
        size = len(share.members)
        if share.places != size:
            epoch, place_in_set = divmod(first + place, size)
            place = self._own_permutation(share.name, size, epoch)[place_in_set]
        return Pick(int(share.members[place]), epoch)

    def _round(self, round_: int) -> list[tuple[int, int]]:
        """(bucket, batch) of each step of a round."""
        batches = [
            (number, batch)
            for number, bucket in enumerate(self.buckets)
            for batch in range(
                bucket.before(round_) // self.global_batch, bucket.before(round_ + 1) // self.global_batch
            )
        ]
        return [batches[i] for i in permutation(len(batches), self.seed, round_, "round")]

    def _permutation(self, number: int, epoch: int) -> np.ndarray:
        """Of the places of a bucket in an epoch. Where their number changes, samples may stand twice in any case."""
        is_distinct = self.distinct and not self.buckets[number].broken
        return self._distinct(number, epoch) if is_distinct else self._drawn(number, epoch)

    def _drawn(self, number: int, epoch: int) -> np.ndarray:
        bucket = self.buckets[number]
        size = bucket.before(epoch + 1) - bucket.before(epoch)
        return permutation(size, self.seed, epoch, f"bucket {number}")

    def _own_permutation(self, name: str, size: int, epoch: int) -> np.ndarray:
        return permutation(size, self.seed, epoch, name)

    def _distinct(self, number: int, epoch: int) -> np.ndarray:
        """A permutation that begins with other samples than those that its first step has of the epoch before.

        Only the first G places are reordered. In a bucket of 2G samples or more these do not reach to the last step,
        so the end of the epoch before is as drawn. In a smaller one its order is followed from the last epoch that
        began with a step of its own: less than G epochs.
        """
        size, step = self.buckets[number].whole, self.global_batch
        period = step // gcd(size, step)
        first = epoch // period * period if size < 2 * step else max(0, epoch - 1)
        order = self._drawn(number, first)
        for later in range(first + 1, epoch + 1):
            left = later * size % step  # places that the epoch before has in the first step of this one
            drawn = self._drawn(number, later)
            taken = np.isin(drawn[:step], order[size - left :])
            order = np.concatenate((drawn[:step][~taken], drawn[:step][taken], drawn[step:]))
        return order


def _check_weights(sets: Sequence[tuple[int, float | Fraction]]) -> None:
    for count, weight in sets:
        if not round(count * weight):
            raise ValueError(
                f"a weight of {float(weight):g} for a set of {count} samples: it would never be shown in an epoch. "
                f"Give it a weight of more than {0.5 / count:g}, or leave it out"
            )


def _share(members: np.ndarray, sets: Sequence[tuple[int, float | Fraction]], bucket: str) -> list[_Share]:
    """The sets that have samples in a bucket, with their places."""
    shares: list[_Share] = []
    first = 0
    for number, (count, weight) in enumerate(sets):
        begin, end = np.searchsorted(members, (first, first + count))
        if end > begin:
            own = members[begin:end]
            shares.append(_Share(own, len(own) * Fraction(weight), f"set {number} of {bucket}"))
        first += count
    return shares


def _most_repeats(size: int, global_batch: int) -> int:
    """How often one of `size` samples can stand among `global_batch` places of one permutation after another."""
    if global_batch % size == 0:
        return global_batch // size
    first = gcd(size, global_batch)  # the fewest places that a step can have of an epoch that ends in it
    return 1 - (first - global_batch) // size
