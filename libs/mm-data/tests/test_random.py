"""Draws depend on all of their key and on nothing else, forever."""

import numpy as np
import pytest
import torch

from mm_data import random


def test_draws_never_change():
    """Written down once: a release that fails here would change what a resumed run trains on."""
    assert random.integer(1000, 1, 2, "a.mp4", "window") == 494
    assert random.uniform(1, 2, "a.mp4", "caption_drop") == pytest.approx(0.3110463492682649, abs=1e-12)
    assert random.permutation(8, 3, 1, "round").tolist() == [2, 3, 0, 4, 7, 6, 5, 1]
    assert torch.randint(1000, (3,), generator=random.generator(1, 2, "a.mp4", "noise")).tolist() == [176, 296, 243]


def test_every_part_of_the_key_counts():
    keys = [(1, 2, "a", "noise"), (2, 2, "a", "noise"), (1, 3, "a", "noise"), (1, 2, "b", "noise"), (1, 2, "a", "t")]
    keys += [(1, 2, "an", "oise"), (12, 2, "a", "noise"), (1, 22, "a", "noise")]
    assert len({random.uniform(*key) for key in keys}) == len(keys)
    assert len({random.generator(*key).initial_seed() for key in keys}) == len(keys)


def test_draws_are_even():
    draws = np.array([random.integer(5, 0, 0, str(i), "p") for i in range(5000)])
    assert np.bincount(draws, minlength=5).min() > 900
    floats = np.array([random.uniform(0, 0, str(i), "p") for i in range(5000)])
    assert 0 <= floats.min() < 0.01
    assert 0.99 < floats.max() < 1
    assert abs(floats.mean() - 0.5) < 0.02
    with pytest.raises(ValueError, match="at least 1"):
        random.integer(0, 0, 0, "a", "p")


def test_permutations_are_permutations():
    for n in (0, 1, 2, 1000):
        assert sorted(random.permutation(n, 0, 0, "p")) == list(range(n))
    assert not np.array_equal(random.permutation(1000, 0, 0, "p"), random.permutation(1000, 0, 1, "p"))
