"""A ladder inside another's stem, with a plan of its own: the numbers of one device in every layout."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    ParallelPlan,
    finish_gradients,
    forward_backward,
    make_mesh,
    parallelize,
)
from mm_parallel.mesh import data_rank
from mm_parallel.recompute import Recomputed
from mm_parallel.testing import TinyLadder, TwoLadders, assert_same_grads, gradients, spawn
from mm_parallel.testing.equivalence import SAMPLES, Case, Subject, check, every_case

CASES = every_case(8 + int(os.environ.get("RANDOM_SEED", 0)), int(os.environ.get("RANDOM_LAYOUTS", 4)), all_of=1)
CHUNK = 10


def build(dtype: torch.dtype = torch.float64) -> TwoLadders:
    torch.manual_seed(0)
    return TwoLadders(layers=4).to(dtype)


def batch() -> dict[str, Tensor]:
    """7 tokens and 5 patches: no number of ranks divides either."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"tokens": (SAMPLES, 7, 5), "t": (SAMPLES, 3), "image": (SAMPLES, 5, 5), "target": (SAMPLES, 7, 5)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def two_ladders(rank: int, world: int, cases: list[Case]) -> None:
    check(rank, world, Subject(build, lambda model: TwoLadders.plan, batch), cases)


@pytest.mark.parametrize("case", CASES[1], ids=lambda case: case.name)
def test_one_rank(case):
    check(0, 1, Subject(build, lambda model: TwoLadders.plan, batch), [case])


@pytest.mark.parametrize(
    ("world", "first"),
    [(world, first) for world in sorted(CASES) if world > 1 for first in range(0, len(CASES[world]), CHUNK)],
)
def test_several_ranks(world, first):
    spawn(world, two_ladders, CASES[world][first : first + CHUNK], timeout=120)


OWNERS = ([0, 3, 3, 1], [])  # whose the images of each data rank are: the last has none


def without_images(rank: int, world: int, layout: dict, memory: MemoryConfig) -> None:
    mesh = make_mesh(ParallelConfig(**layout), "cpu")
    index, parts = data_rank(mesh)
    assert parts == len(OWNERS)
    data = batch()
    shares = [slice(i * SAMPLES // parts, (i + 1) * SAMPLES // parts) for i in range(parts)]
    micro = [
        {"tokens": data["tokens"][share], "t": data["t"][share], "image": data["image"][: len(owner)]}
        | {"owner": torch.tensor(owner, dtype=torch.long)}
        for share, owner in zip(shares, OWNERS, strict=True)
    ]
    single, model = build(), parallelize(build(), TwoLadders.plan, mesh, ParallelConfig(**layout), memory)
    for part in micro:
        (single(**part).square().flatten(1).mean(1).sum() / SAMPLES).backward()
    forward_backward(
        model, 1, lambda i: micro[index], lambda y, i: y.square().flatten(1).mean(1), total=SAMPLES, mesh=mesh
    )
    finish_gradients(model, mesh)
    assert_same_grads(gradients(model), gradients(single), 1e-10)


@pytest.mark.parametrize(
    ("world", "layout", "memory"),
    [
        (2, {}, MemoryConfig()),
        (2, {"dp_replicate": 2}, MemoryConfig("full")),
        (4, {"tp": 2}, MemoryConfig("full", offload="inputs")),
        (4, {"ulysses": 2}, MemoryConfig("but_attention", offload="attention")),
        (4, {"ring": 2}, MemoryConfig(1, but_attention=1)),
    ],
)
def test_ranks_without_images(world, layout, memory):
    spawn(world, without_images, layout, memory)


@pytest.mark.parametrize(
    ("memory", "tower", "outer"),
    [
        (MemoryConfig("full"), ["full"] * 2, ["full"] * 4),
        (MemoryConfig(1, but_attention=2), ["full", "but_attention"], ["full", "but_attention", "but_attention"]),
        (MemoryConfig(3), ["full"] * 2, ["full"] * 3),
        (MemoryConfig(("none", "full", "none", "none")), [], ["full"]),
    ],
)
def test_what_is_recomputed_in_which_ladder(memory, tower, outer):
    model = parallelize(build(), TwoLadders.plan, memory=memory)

    def words(ladder: TinyLadder) -> list[str]:
        return [block.forward.word for block in ladder.blocks if isinstance(block.forward, Recomputed)]

    assert (words(model.tower), words(model)) == (tower, outer)


def test_the_outer_plan_says_nothing_of_what_the_inner_ladder_holds():
    model, both = build(), TwoLadders.plan
    prefixes = [prefix for prefix, _, _ in both.ladders(model)]
    assert prefixes == ["tower.", ""]
    assert not any(name.startswith("tower.") for name in both.fp32_parameters(model))
    inner = replace(TinyLadder.plan, keep_fp32=())
    own = replace(both, keep_fp32=("*",), inner={"tower": inner}).fp32_parameters(model)
    assert set(own) == {name for name, _ in model.named_parameters() if not name.startswith("tower.")}


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"towre": TinyLadder.plan}, "plan.inner: the model has no module 'towre'"),
        ({"tower": ParallelPlan(("block.*",))}, r"plan.layers: no module is named like 'block\.\*'"),
        ({"tower": replace(TinyLadder.plan, keep_fp32=("tower.time.*",))}, r"no parameter is named like 'tower.time"),
    ],
)
def test_misspelt_names_are_refused(inner, message):
    with pytest.raises(ValueError, match=message):
        parallelize(build(), replace(TwoLadders.plan, inner=inner))
