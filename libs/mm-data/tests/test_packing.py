"""Packs of a step: every sample once, within the limits, as few as can be, and balanced."""

import time
from functools import cache
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_data import Flops, Size
from mm_data.packing import plan

COST = Flops()
MAX_TOKENS, MAX_PATCHES = 100, 60

some_sizes = st.lists(st.tuples(st.integers(1, MAX_TOKENS), st.integers(0, MAX_PATCHES)), max_size=40).map(
    lambda pairs: [Size(tokens, patches, None, patches**2) for tokens, patches in pairs]
)


def make(sizes, ranks, packing=True):
    return plan(sizes, ranks, MAX_TOKENS, MAX_PATCHES, COST, packing=packing)


@settings(max_examples=150, deadline=None)
@given(some_sizes, st.integers(1, 6), st.booleans())
def test_every_sample_is_in_one_pack_within_the_limits(sizes, ranks, packing):
    dealt = make(sizes, ranks, packing)
    assert len(dealt) == ranks
    assert len({len(packs) for packs in dealt}) == 1
    assert dealt[0]
    packs = [pack for packs in dealt for pack in packs]
    assert sorted(i for pack in packs for i in pack) == list(range(len(sizes)))
    for pack in packs:
        assert sum(sizes[i].tokens for i in pack) <= MAX_TOKENS
        assert sum(sizes[i].patches for i in pack) <= MAX_PATCHES
        assert packing or len(pack) <= 1
    if sizes and len(sizes) % ranks == 0:
        assert all(packs)
    # first fit: of any two packs, one could not take what the other began with, so they are full in one of the limits
    tokens, patches = sum(size.tokens for size in sizes), sum(size.patches for size in sizes)
    micro = len(dealt[0])
    assert micro >= max(tokens / MAX_TOKENS, patches / MAX_PATCHES) / ranks
    if packing:
        most = 2 * (tokens / MAX_TOKENS + patches / MAX_PATCHES) + 1
        assert micro <= max(1, -(-most // ranks))
    else:
        assert micro == max(1, -(-len(sizes) // ranks))
    assert make(sizes, ranks, packing) == dealt


@cache
def fewest(tokens: tuple[int, ...]) -> int:
    """Packs of MAX_TOKENS that hold all, by trying every set that the first of them can go with."""
    if not tokens:
        return 0
    best = len(tokens)
    first, rest = tokens[0], tokens[1:]
    for chosen in range(2 ** len(rest)):
        members = [one for i, one in enumerate(rest) if chosen >> i & 1]
        if first + sum(members) <= MAX_TOKENS:
            others = tuple(one for i, one in enumerate(rest) if not chosen >> i & 1)
            best = min(best, 1 + fewest(others))
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(10, MAX_TOKENS), min_size=1, max_size=8), st.integers(1, 3))
def test_of_text_there_are_hardly_more_packs_than_must_be(tokens, ranks):
    micro = len(make([Size(one, 0) for one in tokens], ranks)[0])
    best = fewest(tuple(sorted(tokens)))
    assert -(-best // ranks) <= micro <= max(1, -(-int(11 * best / 9 + 2 / 3) // ranks))


def test_full_packs_are_found_where_cheapest_first_finds_none():
    """8 + 2, 7 + 3, 6 + 4: by cost alone 8, 7 and 6 leave no room for 4."""
    sizes = [Size(tokens * 10, 0) for tokens in (8, 2, 7, 3, 6, 4)]
    dealt = make(sizes, 3)
    assert sorted(sum(sizes[i].tokens for i in packs[0]) for packs in dealt) == [100, 100, 100]


def test_no_pack_is_empty_where_first_fit_needs_fewer():
    sizes = [Size(60, 10), Size(40, 50), Size(60, 10), Size(40, 50), Size(50, 30), Size(50, 30), Size(1, 0), Size(1, 0)]
    for ranks in (1, 2, 4, 8):
        assert all(packs for packs in make(sizes, ranks))
        assert all(pack for packs in make(sizes, ranks) for pack in packs)


def mixture(count: int, seed: int = 0) -> list[Size]:
    """As of LLaVA's set: seven of ten with a picture, a few with several, texts of log-normal length."""
    draw = np.random.default_rng(seed)
    sizes = []
    for _ in range(count):
        pictures = int(draw.choice([0, 1, 2, 5], p=[0.25, 0.65, 0.07, 0.03]))
        patches, squares = 0, 0
        for _ in range(pictures):
            rows, columns = (2 * max(2, int(side / 28)) for side in draw.uniform(224, 1100, 2))
            patches, squares = patches + rows * columns, squares + (rows * columns) ** 2
        text = int(min(4000, draw.lognormal(5.3, 0.9))) + 30
        sizes.append(Size(text + patches // 4, patches, None, squares))
    return [size for size in sizes if size.tokens <= 8192 and size.patches <= 16384]


@pytest.mark.parametrize(("ranks", "global_batch"), [(4, 64), (8, 128), (16, 512)])
def test_ranks_do_the_same_work(ranks, global_batch):
    """10,000 headers of a mixture, in steps: the dearest rank does less than 10 % more than the cheapest."""
    sizes = mixture(10_000)
    began = time.perf_counter()
    spreads, waits, fills = [], [], []
    for first in range(0, len(sizes) - global_batch + 1, global_batch):
        step = sizes[first : first + global_batch]
        dealt = plan(step, ranks, 8192, 16384, COST)
        paid = np.array([[sum(COST(step[i]) for i in pack) for pack in packs] for packs in dealt])
        totals = paid.sum(1)
        spreads.append((totals.max() - totals.min()) / totals.mean())
        waits.append(paid.max(0).sum() / totals.mean())  # packs of one number wait for one another
        fills.append(len(dealt[0]) / max(1, -(-sum(size.tokens for size in step) // (ranks * 8192))))
    assert np.quantile(spreads, 0.95) < 0.10
    assert mean(waits) < 1.06
    assert mean(fills) < 1.35
    assert time.perf_counter() - began < 30


def test_ten_thousand_at_once():
    began = time.perf_counter()
    sizes = mixture(10_000)
    dealt = plan(sizes, 16, 8192, 16384, COST)
    totals = [sum(COST(sizes[i]) for pack in packs for i in pack) for packs in dealt]
    assert max(totals) < 1.01 * min(totals)
    assert time.perf_counter() - began < 30
