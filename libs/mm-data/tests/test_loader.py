"""The stream of samples is one stream: for every number of ranks and workers, and from every cursor."""

import itertools
import threading
import warnings
from collections import Counter
from fractions import Fraction
from functools import partial
from math import gcd, lcm

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_data import Captions, FeatureCache, FeatureDataset, Order
from mm_data import build_loader as build

build_loader = partial(build, small_buckets="repeat")

SHAPES = {"a": (4, 2, 2, 2), "b": (4, 1, 2, 2), "c": (4, 3, 2, 2)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("features")
    with FeatureCache(path, shard_bytes=1000) as cache:
        for i in range(29):
            shape = SHAPES["aaabbc"[i % 6]]
            texts = {f"text.{n}": torch.full((2 + n, 3), float(10 * i + n + 1)) for n in range(1 + i % 3)}
            tensors = {"latents": torch.full(shape, float(i)), "image": torch.full((5,), float(i)), **texts}
            cache.put(f"key{i}", tensors, {"id": f"v{i}"})
        cache.put_empty_text(torch.full((1, 3), -1.0))
    cache.finish()
    return path


@pytest.fixture(scope="module")
def dataset(path):
    return FeatureDataset(path)


def take(loader, n):
    return list(itertools.islice(loader, n))


def flat(steps):
    """(id, epoch, caption shown) of every sample."""
    return [
        (id_, epoch, float(text[0, 0]))
        for step in steps
        for batch in step.micro
        for id_, epoch, text in zip(batch.ids, batch.epochs, batch.tensors["text"], strict=True)
    ]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def keys(sizes):
    """The bucket of each sample."""
    return [(b,) for b, n in enumerate(sizes) for _ in range(n)]


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 12), st.integers(0, 3), st.sampled_from(["repeat", "drop"]))
def test_order_is_exact(sizes, global_batch, seed, small_buckets):
    buckets = keys(sizes)
    kept = [i for i, (b,) in enumerate(buckets) if small_buckets == "repeat" or sizes[b] >= global_batch]
    make = partial(Order, buckets, global_batch, seed, small_buckets)
    if not kept:
        with pytest.raises(ValueError, match=rf"all {len(sizes)} .*\({global_batch}\), the largest has {max(sizes)}"):
            make()
        return
    order = make()
    rounds = global_batch  # after G rounds every bucket has given exactly G epochs
    steps = [order.step(s) for s in range(order.batches_before(rounds))]
    assert all(len({buckets[i] for i, _ in step}) == 1 for step in steps)  # one step, one bucket
    assert all(len(step) == global_batch for step in steps)
    seen = Counter(pick for step in steps for pick in step)
    assert seen == Counter((i, e) for i in kept for e in range(rounds))  # nothing left over, nothing twice
    if small_buckets == "drop":
        assert all(len({i for i, _ in step}) == global_batch for step in steps)
    # from any place, in any order, without what came before
    assert [make().step(s) for s in reversed(range(len(steps)))] == steps[::-1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 10**6), st.integers(0, 3))
def test_dropped_buckets_leave_the_stream_of_the_others_distinct_far_away(extra, global_batch, step, seed):
    """Also where an epoch is hardly longer than a step, so that what is moved goes on from epoch to epoch."""
    order = Order(keys([global_batch + extra % global_batch, 40, 1]), global_batch, seed, "drop")
    for s in range(step, step + 6):
        picks = order.step(s)
        assert len({pick.index for pick in picks}) == global_batch
        assert picks == Order(keys([global_batch + extra % global_batch, 40, 1]), global_batch, seed, "drop").step(s)


weighted = st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.5, 1.0, 1.3, 2.0, 3.7])), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(weighted, st.integers(1, 9), st.integers(0, 3), st.integers(0, 50))
def test_weights_are_exact_in_closed_form(sets, global_batch, seed, far):
    """A set of n has n w places in an epoch, and goes through all its samples before one comes again."""
    sets = [(n, w) for n, w in sets if round(n * w)]
    if not sets:
        return
    numbers = [number for number, (n, _) in enumerate(sets) for _ in range(n)]
    make = partial(Order, [0] * len(numbers), global_batch, seed, sets=sets)
    exact = [n * Fraction(str(w)) for n, w in sets]
    epochs = global_batch * lcm(*(places.denominator for places in exact))  # so many hold whole places and whole steps
    order = make()
    steps = [order.step(s) for s in range(order.batches_before(epochs))]
    seen = Counter(pick for step in steps for pick in step)
    for number, (n, _) in enumerate(sets):
        own = Counter({pick: count for pick, count in seen.items() if numbers[pick.index] == number})
        shown = exact[number] * epochs
        first = next(i for i, one in enumerate(numbers) if one == number)
        whole = {(first + i, e) for i in range(n) for e in range(shown // n)}
        assert own.total() == shown
        assert set(own.values()) <= {1}
        assert whole <= set(own)
        assert all(e == shown // n for i, e in set(own) - whole)
    assert sum(map(len, steps)) == sum(exact) * epochs
    assert make().step(far) == order.step(far)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 3])), min_size=1, max_size=3),
    st.data(),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_repeats_are_exact_in_every_epoch_of_every_bucket(sets, data, global_batch, seed):
    """Each sample exactly `repeats` times, by other draws each time; ranks see a partition, from any step on."""
    count = sum(n for n, _ in sets)
    buckets = data.draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    repeats = [times for n, times in sets for _ in range(n)]
    make = partial(Order, buckets, global_batch, seed, sets=sets)
    order = make()
    steps = [order.step(s) for s in range(order.batches_before(global_batch))]
    seen = Counter(pick for step in steps for pick in step)  # so many rounds are whole steps
    assert seen == Counter((i, e) for i in range(count) for e in range(repeats[i] * global_batch))
    for key in set(buckets):  # and so is every epoch, by the places of its bucket
        own = next(number for number, one in enumerate(order.buckets) if buckets[one.shares[0].members[0]] == key)
        members = Counter({i: repeats[i] for i in range(count) if buckets[i] == key})
        for epoch in range(3):
            places = range(epoch * members.total(), (epoch + 1) * members.total())
            assert Counter(order.pick(own, place).index for place in places) == members
    start = data.draw(st.integers(0, len(steps) - 1))
    assert [make().step(s) for s in range(start, len(steps))] == steps[start:]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.04, 0.3, 1.0, 2.5])), min_size=2, max_size=4),
    st.data(),
    st.integers(1, 6),
)
def test_a_set_keeps_its_share_however_few_of_its_samples_a_bucket_has(sets, data, global_batch):
    sets = [(n, w) for n, w in sets if round(n * w)]
    count = sum(n for n, _ in sets)
    if not count:
        return
    buckets = data.draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
    order = Order(buckets, global_batch, 0, sets=sets)
    rounds = 10
    seen = Counter(pick.index for s in range(order.batches_before(rounds)) for pick in order.step(s))
    first = 0
    for n, weight in sets:
        shown = sum(seen[i] for i in range(first, first + n))
        left = len(set(buckets)) * (global_batch + 1)  # a step that is not full yet, and a place, of every bucket
        assert abs(shown - rounds * n * weight) <= left
        first += n


def test_sets_of_weight_one_are_no_sets():
    plain, sets = Order([0] * 30, 4, 1), Order([0] * 30, 4, 1, sets=[(10, 1.0), (20, 1.0)])
    assert [plain.step(s) for s in range(20)] == [sets.step(s) for s in range(20)]


def test_weights_over_buckets():
    """Each bucket is a mixture of its own; a set may have samples in all."""
    order = Order(["a", "b"] * 10, 2, 0, sets=[(8, 2.0), (12, 1.0)])
    steps = [order.step(s) for s in range(order.batches_before(1))]
    seen = Counter(pick.index for step in steps for pick in step)
    assert seen == Counter({i: 2 if i < 8 else 1 for i in range(20)})


def test_a_weight_with_which_nothing_is_shown_is_refused():
    with pytest.raises(ValueError, match=r"a weight of 0.01 for a set of 10 samples.* of more than 0.05"):
        Order([0] * 30, 4, 0, sets=[(20, 1.0), (10, 0.01)])


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 12))
def test_small_buckets_are_described_with_their_numbers(sizes, global_batch):
    small = Order(keys(sizes), global_batch, 0).small
    few = [n for n in sizes if n < global_batch]
    if not few:
        assert small is None
        return
    # all ways in which a step can lie over epochs of n samples: how often the sample that is there most often can be
    most = 0
    for n in few:
        for before in range(0, n, gcd(n, global_batch)):
            whole, rest = divmod(global_batch - before, n)
            most = max(most, (before > 0) + whole + (rest > 0))
    assert (small.sizes, small.buckets, small.samples, small.most_repeats) == (few, len(sizes), sum(sizes), most)
    order = Order(keys(sizes), global_batch, 1)
    shown = [Counter(pick.index for pick in order.step(s)).most_common(1)[0][1] for s in range(100)]
    assert max(shown) <= max(most, 2)


def test_what_is_said_of_small_buckets():
    assert Order(keys([40, 30]), 4, 0).small is None
    assert Order(keys([6, 1, 1, 3]), 4, 0).small.describe() == (
        "3 of 4 buckets have fewer samples than a step takes (4): their 5 samples of 11 are repeated, a sample up to 4 "
        "times in one step. small_buckets=drop leaves them out; global_batch=1 is small enough for all of them."
    )
    assert Order(keys([6, 3]), 4, 0, "drop").small.describe("--small_buckets ", "--global_batch ") == (
        "1 of 2 buckets has fewer samples than a step takes (4): its 3 samples of 9 are left out. --small_buckets "
        "repeat shows them too, a sample up to 2 times in one step; --global_batch 3 is small enough for all of them."
    )
    with pytest.raises(ValueError, match=r"small_buckets='keep' must be repeat or drop"):
        Order(keys([6]), 4, 0, "keep")


class Numbers:
    """A data set of its own kind: neither clips nor text, and what it makes of samples is their numbers."""

    def __init__(self, sizes):
        self.buckets = keys(sizes)
        self.ids = [str(i) for i in range(len(self.buckets))]

    def batch(self, picks):
        return [pick.index for pick in picks]


def test_any_data_set_is_loaded_and_small_buckets_are_said_once_unless_chosen():
    with pytest.warns(UserWarning, match="1 of 2 buckets has fewer samples") as said:
        loader = build(Numbers([8, 3]), global_batch=4, num_workers=0)
    assert len(said) == 1
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(Numbers([8, 4]), global_batch=4)
        repeated = build(Numbers([8, 3]), global_batch=4, num_workers=0, small_buckets="repeat")
        dropped = build(Numbers([8, 3]), global_batch=4, num_workers=0, small_buckets="drop")
    assert take(repeated, 9) == take(loader, 9)
    assert sorted(i for step in take(dropped, 2) for (i,) in step.micro) == list(range(8))
    with pytest.raises(ValueError, match=r"no bucket is left: all 2 .* global batch of 8 or less"):
        build(Numbers([8, 3]), global_batch=9, small_buckets="drop")


def test_the_stream_is_the_one_that_it_was():
    """Written down from the first version: a run that is continued years later goes on with the same samples."""
    order = Order(keys([5, 2, 9]), 4, seed=7)
    assert [order.step(s) for s in (0, 1, 2, 1000)] == [
        [(14, 0), (13, 0), (15, 0), (10, 0)],
        [(3, 0), (1, 0), (4, 0), (2, 0)],
        [(7, 0), (8, 0), (11, 0), (12, 0)],
        [(8, 250), (7, 250), (12, 250), (10, 250)],
    ]


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 12), st.integers(0, 10**9))
def test_order_far_away(sizes, global_batch, step):
    order = Order(keys(sizes), global_batch, 0)
    epochs = [epoch for _, epoch in order.step(step)]
    expected = step * global_batch / sum(sizes)
    assert all(abs(epoch - expected) <= 2 * global_batch / min(sizes) + 2 for epoch in epochs)


def test_epochs_differ_and_buckets_mix():
    order = Order([(i % 2,) for i in range(40)], 4, seed=0)
    first, second = ([order.step(s) for s in range(e * 10, e * 10 + 10)] for e in (0, 1))
    assert [i for step in first for i, _ in step] != [i for step in second for i, _ in step]
    assert len({tuple(step[0][0] % 2 for step in steps) for steps in (first, second)}) == 2


@settings(max_examples=25, deadline=None)
@given(
    layout=st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (4, 3), (6, 2), (12, 1)]),
    start=st.integers(0, 12),
    seed=st.integers(0, 2),
    workers=st.sampled_from([0, 1, 3]),
)
def test_one_stream_for_every_layout_and_resume(path, layout, start, seed, workers):
    dp_size, micro = layout
    dataset = FeatureDataset(path, Captions(seed, dropout=0.3))
    common = {"global_batch": 12, "seed": seed}
    whole = take(build_loader(dataset, micro_batch=12, num_workers=0, **common), start + 3)
    cursor = whole[start - 1].cursor_after if start else 0
    ranks = [
        take(
            build_loader(
                dataset, micro_batch=micro, dp_rank=r, dp_size=dp_size, cursor=cursor, num_workers=workers, **common
            ),
            3,
        )
        for r in range(dp_size)
    ]
    for steps, reference in zip(zip(*ranks, strict=True), whole[start:], strict=True):
        assert flat(steps) == flat([reference])
        assert {(step.index, step.cursor_after) for step in steps} == {(reference.index, reference.cursor_after)}
        assert all(len(batch.ids) == micro for step in steps for batch in step.micro)


def test_batches_hold_the_samples_they_name(dataset):
    for step in take(build_loader(dataset, global_batch=6, micro_batch=3), 20):
        for batch in step.micro:
            numbers = torch.tensor([float(name[1:]) for name in batch.ids])
            assert set(batch.tensors) == {"latents", "text", "text_mask", "image"}
            assert torch.equal(batch.tensors["latents"][:, 0, 0, 0, 0], numbers)
            assert torch.equal(batch.tensors["image"][:, 0], numbers)
            assert torch.equal(batch.tensors["text"][:, 0, 0] // 10, numbers)
            assert batch.tensors["text_mask"].dtype == torch.bool
            for row, mask in zip(batch.tensors["text"], batch.tensors["text_mask"], strict=True):
                length = 1 + int(row[0, 0] - row[0, 0] // 10 * 10)
                assert (row[:length] == row[0, 0]).all()
                assert (row[length:] == 0).all()
                assert mask.tolist() == [True] * length + [False] * (len(row) - length)


def test_the_mask_of_a_dropped_caption_is_that_of_the_empty_prompt(path):
    dataset = FeatureDataset(path, Captions(seed=1, dropout=0.5))
    seen = set()
    for step in take(build_loader(dataset, global_batch=6, micro_batch=3), 5):
        for batch in step.micro:
            for row, mask in zip(batch.tensors["text"], batch.tensors["text_mask"], strict=True):
                seen.add(dropped := bool(row[0, 0] == -1))
                assert mask.sum() == (1 if dropped else 1 + int(row[0, 0] % 10))
                assert mask[0]
    assert seen == {True, False}


def test_without_captions_there_is_no_text(path, tmp_path):
    (step,) = take(build_loader(FeatureDataset(path, captions=None), global_batch=4), 1)
    assert set(step.micro[0].tensors) == {"latents", "image"}
    with FeatureCache(tmp_path) as cache:
        cache.put("k", {"latents": torch.ones(1, 1, 1, 1)}, {"id": "a"})
        cache.finish()
    with pytest.raises(ValueError, match="sample a has no caption"):
        FeatureDataset(tmp_path)
    assert FeatureDataset(tmp_path, captions=None)[0]["latents"].item() == 1


def test_captions_are_chosen_and_dropped_as_often_as_asked(path, dataset):
    shown = flat(take(build_loader(FeatureDataset(path, Captions(dropout=0.25)), global_batch=10), 300))
    dropped = [text == -1 for *_, text in shown]
    assert sum(dropped) / len(dropped) == pytest.approx(0.25, abs=0.03)
    chosen = Counter(text for name, _, text in shown if name == "v2" and text > 0)  # has three captions
    assert set(chosen) == {21.0, 22.0, 23.0}
    assert min(chosen.values()) > 0.2 * sum(chosen.values())
    assert not any(text == -1 for *_, text in flat(take(build_loader(dataset, global_batch=10), 50)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_raised_at_its_step(dataset, workers, monkeypatch):
    loader = build_loader(dataset, global_batch=4, num_workers=workers)
    reference = take(loader, 6)
    bad = reference[4].micro[0].ids[0]
    good = [s.index for s in reference if all(bad not in batch.ids for batch in s.micro)]
    original = FeatureDataset.__getitem__

    def getitem(self, index):
        if self.ids[index] == bad:
            raise OSError(5, "Input/output error", bad)
        return original(self, index)

    monkeypatch.setattr(FeatureDataset, "__getitem__", getitem)
    seen = []
    with pytest.raises(OSError, match="Input/output"):  # noqa: PT012
        for step in loader:
            seen.append(step.index)
    assert seen == good[: len(seen)]
    assert len(seen) == next(s.index for s in reference if any(bad in batch.ids for batch in s.micro))


def test_threads_end_with_the_iterator(dataset):
    iterator = iter(build_loader(dataset, global_batch=4, num_workers=3))
    next(iterator)
    iterator.close()
    for thread in threading.enumerate():
        if thread.name.startswith("mm_data loader"):
            thread.join(timeout=5)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 10, "dp_size": 4}, r"multiple of 4 x 1 = 4, e\.g\. 8 or 12"),
        ({"global_batch": 8, "micro_batch": 3}, r"e\.g\. 6 or 9"),
        ({"global_batch": 4, "cursor": 6}, "begin at cursor 4 or 8"),
        ({"global_batch": 4, "dp_rank": 2, "dp_size": 2}, r"in 0\.\.1"),
        ({"global_batch": 0}, "at least 1"),
        ({"global_batch": 4, "num_workers": -1}, "negative"),
    ],
)
def test_impossible_sizes_are_refused_with_the_way_out(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        build_loader(dataset, **options)


def test_dropout_needs_the_empty_prompt(tmp_path):
    with FeatureCache(tmp_path) as cache:
        cache.put("k", {"latents": torch.zeros(1, 1, 1, 1), "text.0": torch.ones(1, 1)}, {"id": "a"})
    cache.finish()
    with pytest.raises(ValueError, match=r"text dropout 0\.1 needs the encoding of the empty prompt"):
        FeatureDataset(tmp_path, Captions(dropout=0.1))
    with pytest.raises(ValueError, match="must be a probability"):
        Captions(dropout=1.5)
