"""Every way to cut, alone and together, on a ladder that is nobody's: the numbers of one device."""

import os

import pytest
import torch
from torch import Tensor

from mm_parallel.testing import TinyLadder, spawn
from mm_parallel.testing.equivalence import SAMPLES, Case, Subject, check, combine, every_case

CASES = every_case(seed=int(os.environ.get("RANDOM_SEED", 0)), larger=int(os.environ.get("RANDOM_LAYOUTS", 4)))
CHUNK = 10


def build() -> TinyLadder:
    torch.manual_seed(0)
    return TinyLadder(layers=4).double()


def batch() -> dict[str, Tensor]:
    """7 tokens: no number of ranks divides them."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"tokens": (SAMPLES, 7, 5), "t": (SAMPLES, 3), "target": (SAMPLES, 7, 5)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def ladder(rank: int, world: int, cases: list[Case]) -> None:
    check(rank, world, Subject(build, lambda model: TinyLadder.plan, batch), cases)


@pytest.mark.parametrize("case", CASES[1], ids=lambda case: case.name)
def test_one_rank(case):
    check(0, 1, Subject(build, lambda model: TinyLadder.plan, batch), [case])


@pytest.mark.parametrize(
    ("world", "first"),
    [(world, first) for world in sorted(CASES) if world > 1 for first in range(0, len(CASES[world]), CHUNK)],
)
def test_several_ranks(world, first):
    spawn(world, ladder, CASES[world][first : first + CHUNK], timeout=120)


def masked_batch() -> dict[str, Tensor]:
    """Each sample has other keys. Some are seen on one rank of two alone, and of the last sample on the last rank."""
    mask = torch.ones(SAMPLES, 7, dtype=torch.bool)
    for sample, hidden in enumerate(((), (6,), (4, 5, 6), (0, 2, 4, 6), (1, 2, 3, 4, 5), (3,), (), (0, 1, 2, 3, 4, 5))):
        mask[sample, list(hidden)] = False
    return batch() | {"mask": mask}


def masked_ladder(rank: int, world: int, cases: list[Case]) -> None:
    check(rank, world, Subject(build, lambda model: TinyLadder.plan, masked_batch), cases)


MASKED = every_case(larger=0, all_of=1)
for together in (
    ("ring", "ulysses", "but-attention"),
    ("ring", "virtual", "offload-attention"),
    ("ulysses", "zero-bubble", "meta"),
    ("shards", "ring", "tensor", "some-recompute", "accumulate"),
):
    case = combine(together)
    MASKED.setdefault(case.ranks, []).append(case)


@pytest.mark.parametrize("world", sorted(MASKED))
def test_masked_keys(world):
    if world == 1:
        masked_ladder(0, 1, MASKED[1])
    else:
        spawn(world, masked_ladder, MASKED[world], timeout=120)


def build_language() -> TinyLadder:
    """As a language model's: packed samples that are causal, and two heads of queries to one of keys."""
    torch.manual_seed(0)
    return TinyLadder(layers=4, causal=True, segments=(0, 1, 5, 7), shared=2).double()


def language_ladder(rank: int, world: int, cases: list[Case]) -> None:
    check(rank, world, Subject(build_language, lambda model: TinyLadder.plan, batch), cases)


PACKED = every_case(larger=0, all_of=1)
for together in (
    ("ring", "ulysses", "but-attention"),
    ("ring", "tensor", "virtual", "offload-attention"),
    ("ulysses", "tensor", "zero-bubble", "meta"),
    ("shards", "ring", "ulysses", "some-recompute", "accumulate"),
):
    case = combine(together)
    PACKED.setdefault(case.ranks, []).append(case)


@pytest.mark.parametrize("world", sorted(PACKED))
def test_packed_samples_and_shared_heads(world):
    if world == 1:
        language_ladder(0, 1, PACKED[1])
    else:
        spawn(world, language_ladder, PACKED[world], timeout=120)


def test_the_mask_matters():
    inputs = masked_batch()
    inputs.pop("target")
    model, masked = build(), inputs.pop("mask")
    with torch.no_grad():
        differ = (model(**inputs) != model(**inputs, mask=masked)).flatten(1).any(1)
    assert differ.tolist() == (~masked).any(1).tolist()
