"""The stream of samples is one stream: for every number of ranks and workers, and from every cursor."""

import itertools
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_data import FeatureCache, FeatureDataset, build_loader
from mm_data.order import Order

SHAPES = {"a": (4, 2, 2, 2), "b": (4, 1, 2, 2), "c": (4, 3, 2, 2)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("features")
    with FeatureCache(path, shard_bytes=1000) as cache:
        for i in range(29):
            shape = SHAPES["aaabbc"[i % 6]]
            texts = {f"text.{n}": torch.full((2 + n, 3), float(10 * i + n + 1)) for n in range(1 + i % 3)}
            tensors = {"latents": torch.full(shape, float(i)), "image": torch.full((5,), float(i)), **texts}
            cache.put(f"key{i}", tensors, {"id": f"v{i}"})
        cache.put_empty_text(torch.full((1, 3), -1.0))
    cache.finish()
    return FeatureDataset(path)


def take(loader, n):
    return list(itertools.islice(loader, n))


def flat(steps):
    """(id, epoch, caption shown) of every sample."""
    return [
        (id_, epoch, float(text[0, 0]))
        for step in steps
        for batch in step.micro
        for id_, epoch, text in zip(batch.ids, batch.epochs, batch.text, strict=True)
    ]


buckets = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(buckets, st.integers(1, 12), st.integers(0, 3))
def test_order_is_exact(sizes, global_batch, seed):
    shapes = [(b,) for b, n in enumerate(sizes) for _ in range(n)]
    order = Order(shapes, global_batch, seed)
    rounds = global_batch  # after G rounds every bucket has given exactly G epochs
    steps = [order.step(s) for s in range(order.batches_before(rounds))]
    assert all(len({shapes[i] for i, _ in step}) == 1 for step in steps)  # one step, one shape
    assert all(len(step) == global_batch for step in steps)
    seen = Counter(pick for step in steps for pick in step)
    assert seen == Counter((i, e) for i in range(len(shapes)) for e in range(rounds))  # nothing dropped, nothing twice
    assert [Order(shapes, global_batch, seed).step(s) for s in reversed(range(len(steps)))] == steps[::-1]


@settings(max_examples=40, deadline=None)
@given(buckets, st.integers(1, 12), st.integers(0, 10**9))
def test_order_far_away(sizes, global_batch, step):
    order = Order([(b,) for b, n in enumerate(sizes) for _ in range(n)], global_batch, 0)
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
def test_one_stream_for_every_layout_and_resume(dataset, layout, start, seed, workers):
    dp_size, micro = layout
    common = {"global_batch": 12, "seed": seed, "text_dropout": 0.3}
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
            assert torch.equal(batch.latents[:, 0, 0, 0, 0], numbers)
            assert torch.equal(batch.extras["image"][:, 0], numbers)
            assert torch.equal(batch.text[:, 0, 0] // 10, numbers)
            for row in batch.text:
                length = 1 + int(row[0, 0] - row[0, 0] // 10 * 10)
                assert (row[:length] == row[0, 0]).all()
                assert (row[length:] == 0).all()


def test_captions_are_chosen_and_dropped_as_often_as_asked(dataset):
    shown = flat(take(build_loader(dataset, global_batch=10, text_dropout=0.25), 300))
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
        ({"global_batch": 4, "text_dropout": 1.5}, "probability"),
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
    with pytest.raises(ValueError, match="needs the encoding of the empty prompt"):
        build_loader(FeatureDataset(tmp_path), global_batch=1, text_dropout=0.1)
