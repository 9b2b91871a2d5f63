"""A ladder inside another's stem, with a plan of its own: the numbers of one device in every layout."""

import os
from dataclasses import replace
from math import prod

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    ParallelPlan,
    context,
    finish_gradients,
    forward_backward,
    make_mesh,
    parallelize,
)
from mm_parallel.context import shard
from mm_parallel.context.items import deal
from mm_parallel.mesh import data_rank
from mm_parallel.recompute import Recomputed
from mm_parallel.testing import TinyLadder, TinyTower, TwoLadders, assert_same_grads, gradients, spawn
from mm_parallel.testing.equivalence import SAMPLES, Case, Subject, check, every_case

CASES = every_case(8 + int(os.environ.get("RANDOM_SEED", 0)), int(os.environ.get("RANDOM_LAYOUTS", 4)), all_of=1)
CHUNK = 10


def build(dtype: torch.dtype = torch.float64) -> TwoLadders:
    torch.manual_seed(0)
    return TwoLadders(layers=4).to(dtype)


def batch() -> dict[str, Tensor]:
    """7 tokens, which no number of ranks divides, and an image of 6 rows for each sample."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"tokens": (SAMPLES, 7, 5), "t": (SAMPLES, 3), "image": (SAMPLES, 6, 5), "target": (SAMPLES, 7, 5)}
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


ITEMS = (
    # of each data rank: grids, and the sample that each item is added to
    (((2, 4), (1, 8), (3, 2), (1, 2)), (0, 3, 3, 1)),
    ((), ()),
)


def uneven(rank: int, world: int, layout: dict, memory: MemoryConfig, frozen: bool) -> None:
    """The last data rank has no item; context ranks share four, or there is one item for all of them."""
    mesh = make_mesh(ParallelConfig(**layout), "cpu")
    index, parts = data_rank(mesh)
    data = batch()
    single, model = build(), build()
    for ladders in (single, model):
        ladders.tower.requires_grad_(not frozen)
    parallelize(model, TwoLadders.plan, mesh, ParallelConfig(**layout), memory)
    for items in (ITEMS[:parts], ITEMS[1:] * parts, ((((1, 6),), (2,)),) * parts):
        micro = []
        for i, (grids, owner) in enumerate(items):
            share = slice(i * SAMPLES // parts, (i + 1) * SAMPLES // parts)
            rows = data["image"].flatten(0, 1)[: sum(map(prod, grids))]
            micro.append({name: data[name][share] for name in ("tokens", "t")} | {"image": rows})
            micro[-1] |= {"grids": grids, "owner": owner}
        for part in micro:
            (single(**part).square().flatten(1).mean(1).sum() / SAMPLES).backward()
        forward_backward(
            model, 1, lambda i, own=micro[index]: own, lambda y, i: y.square().flatten(1).mean(1), SAMPLES, mesh
        )
    finish_gradients(model, mesh)
    assert_same_grads(gradients(model), gradients(single), 1e-10)


@pytest.mark.parametrize(
    ("world", "layout", "memory", "frozen"),
    [
        (2, {}, MemoryConfig(), False),
        (2, {}, MemoryConfig("full", prefetch=2), True),
        (2, {"dp_shard": 1, "dp_replicate": 2}, MemoryConfig("full"), False),
        (2, {"ring": 2}, MemoryConfig("but_attention"), False),
        (3, {"ulysses": 3}, MemoryConfig(reshard=False), False),
        (4, {"tp": 2}, MemoryConfig("full", offload="inputs", prefetch=1), False),
        (4, {"ulysses": 2}, MemoryConfig("but_attention", offload="attention"), False),
        (4, {"ring": 2}, MemoryConfig(1, but_attention=1), False),
        (4, {"ring": 2, "ulysses": 2}, MemoryConfig(("full",) * 4, offload="inputs"), True),
        (4, {"tp": 2, "ulysses": 2}, MemoryConfig("full"), False),
    ],
)
def test_items_are_shared_and_ranks_without_any(world, layout, memory, frozen):
    spawn(world, uneven, layout, memory, frozen)


def counted(rank: int, world: int) -> tuple[int, list[int]]:
    """Rows that the tower's layers see of 8 frames and an image, and numbers of each collective around it."""
    mesh = make_mesh(ParallelConfig(ulysses=2), "cpu")
    model, sent = build(), []
    context.cut(model, TwoLadders.plan, mesh)
    gather, reduce = shard.gather_rows, dist.all_reduce
    shard.gather_rows = lambda x, group: (sent.append(x.numel()), gather(x, group))[1]
    dist.all_reduce = lambda x, **named: (sent.append(x.numel()), reduce(x, **named))
    seen = []
    model.tower.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].x.shape[1]))
    try:
        y = model.tower(torch.randn(8 * 4 + 6, 5, dtype=torch.float64), ((8, 4), (1, 6)))
        y.sum().backward()
    finally:
        shard.gather_rows, dist.all_reduce = gather, reduce
    return seen[0], sent


def test_who_computes_what_and_what_is_sent():
    (first, sent), (second, also) = spawn(2, counted)
    assert (first, second) == (6 + 3 * 4, 5 * 4)  # frames of one video on both ranks
    assert sent == also == [20 // 2 * 5, 38 // 2 * 5]  # as many as the largest part; all of them


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9)), max_size=9).map(tuple),
    st.integers(1, 6),
)
def test_every_row_is_on_one_rank_and_none_has_more_than_a_part_too_much(grids, ranks):
    pieces, own = deal(grids, ranks)
    held = sorted(row for mine in pieces for start, stop in mine for row in range(start, stop))
    assert held == list(range(sum(map(prod, grids))))
    rows = [sum(map(prod, mine)) for mine in own]
    assert rows == [sum(stop - start for start, stop in mine) for mine in pieces]
    assert max(rows) - min(rows) <= max((prod(grid[1:]) for grid in grids), default=0)


def refused(rank: int, world: int) -> None:
    model = parallelize(build(), TwoLadders.plan, make_mesh(ParallelConfig(ring=2), "cpu"))
    rows = torch.zeros(6, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"6 rows for 2 items with 8 rows: grids \(1, 4\), \(2, 2\)"):
        model.tower(rows, ((1, 4), (2, 2)))
    with pytest.raises(ValueError, match=r"an item of grid \(2, 3\) has parts of 3 rows: no multiple of 2"):
        model.tower(rows, ((2, 3),))
    with pytest.raises(ValueError, match="the plan's seam 'shared' is no attribute of TinyTower"):
        parallelize(
            build(),
            replace(TwoLadders.plan, inner={"tower": replace(TinyTower.plan, share="shared")}),
            make_mesh(ParallelConfig(ring=2), "cpu"),
        )


def test_items_that_do_not_fit_are_refused():
    spawn(2, refused)


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
