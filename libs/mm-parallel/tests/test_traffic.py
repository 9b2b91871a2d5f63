"""What an estimate says that a rank sends is what it sends."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    Pipeline,
    clip_grad_norm,
    finish_gradients,
    forward_backward,
    make_mesh,
    parallelize,
)
from mm_parallel.estimate.collectives import count_sends
from mm_parallel.estimate.units import Units
from mm_parallel.mesh import rank_in
from mm_parallel.testing import TinyLadder, spawn
from mm_parallel.testing.ladder import TwoLadders
from mm_parallel.testing.sent import by_axes, count_sent

TOKENS = 9


def plain() -> nn.Module:
    return TinyLadder(4)


def low() -> nn.Module:
    return TinyLadder(4, torch.bfloat16)


def shared() -> nn.Module:
    return TinyLadder(4, causal=True, shared=2)


def packed() -> nn.Module:
    return TinyLadder(4, torch.bfloat16, segments=(0, 4, TOKENS))


def frozen() -> nn.Module:
    """As with adapters: little is trained, and nothing below."""
    model = TinyLadder(4).requires_grad_(False)
    for block in model.blocks[1:]:
        block.q.requires_grad_()
        block.down.bias.requires_grad_()
    return model


def two() -> nn.Module:
    return TwoLadders(4)


def arguments(build: Callable, device: str = "cpu") -> dict:
    given = {"tokens": torch.ones(2, TOKENS, 5, device=device), "t": torch.ones(2, 3, device=device)}
    if build is two:
        given |= {"image": torch.ones(10, 5, device=device), "grids": ((1, 4), (1, 2), (2, 2)), "owner": (0, 1, 1)}
    return given


def losses(output: torch.Tensor, number: int) -> torch.Tensor:
    return output.square().flatten(1).mean(1)


Case = tuple[Callable, ParallelConfig, MemoryConfig]


def sent_in_a_step(rank: int, world: int, cases: list[Case]) -> list:
    """For each case: (pipeline rank, index of the rank on all other axes, what it sent)."""
    found = []
    for build, parallel, memory in cases:
        mesh = make_mesh(parallel, "cpu")
        torch.manual_seed(0)
        model = build()
        cut = (model.plan, mesh, parallel, memory, model.compute_dtype)
        run = Pipeline(model, *cut) if parallel.pp > 1 else parallelize(model, *cut)
        count = micro_batches(parallel)
        for _ in range(2):  # in a first step FSDP finds out what follows what
            with count_sent(mesh) as sent:
                forward_backward(run, count, lambda _, build=build: arguments(build), losses, 2 * count * world, mesh)
                finish_gradients(model, mesh)
                clip_grad_norm(model, 1.0, mesh)
        places = [rank_in(mesh, axis) for axis in ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")]
        found.append((rank_in(mesh, "pp"), places, sent))
    return found


def micro_batches(parallel: ParallelConfig) -> int:
    return 4 if parallel.pp > 1 else 2


def expected(build: Callable, layout: ParallelConfig, memory: MemoryConfig) -> list[Counter]:
    with torch.device("meta"):
        model = build()
    units = Units(model, model.plan, model.compute_dtype, arguments(build, "meta"))
    return [by_axes(sends, layout) for sends in count_sends(units, layout, memory, micro_batches(layout))]


P, M = ParallelConfig, MemoryConfig
# Of a frozen model no zero-bubble pipeline: what goes down it for nothing is not counted.
CASES = {
    2: [
        (plain, P(dp_shard=2), M()),
        (low, P(dp_replicate=2), M("full")),
        (plain, P(dp_shard=2), M("full", reshard=False)),
        (low, P(dp_shard=2), M(prefetch=2)),
        (frozen, P(dp_shard=2), M("full")),
        (low, P(ulysses=2), M("but_attention")),
        (plain, P(ring=2), M("but_attention")),
        (low, P(tp=2), M(2)),
        (plain, P(pp_layers=(1, 3)), M("full")),
        (frozen, P(pp_layers=(1, 3)), M("full")),
        (low, P(pp_layers=((1, 1), (1, 1))), M()),
        (plain, P(pp_layers=(2, 2), schedule="zero_bubble"), M()),
        (two, P(dp_shard=2), M()),
        (two, P(tp=2), M()),
        (two, P(pp_layers=(2, 2)), M("full")),
    ],
    4: [
        (low, P(dp_replicate=2, ulysses=2), M("full")),
        (shared, P(ring=2, ulysses=2), M(1, but_attention=1)),
        (packed, P(ring=2, ulysses=2), M(1, but_attention=1)),
        (frozen, P(ring=2, ulysses=2), M()),
        (two, P(ring=2, ulysses=2), M("full")),
        (frozen, P(dp_shard=2, tp=2), M("full")),
        (packed, P(ulysses=2, pp_layers=(1, 3)), M(reshard=False)),
        (low, P(ring=2, pp_layers=((1, 1), (1, 1))), M("full", reshard=False)),
        (low, P(dp_shard=2, pp_layers=(2, 2), schedule="zero_bubble"), M()),
        (shared, P(dp_shard=2, pp_layers=(2, 2), schedule="zero_bubble"), M(reshard=False)),
        (low, P(dp_replicate=2, tp=2), M("but_attention")),
        (low, P(ring=2, tp=2), M("full")),
        (low, P(tp=2, pp_layers=(3, 1)), M("full")),
    ],
}


@pytest.mark.parametrize("world", CASES)
def test_a_step_sends_what_is_expected(world: int) -> None:
    cases = [(build, parallel.resolve(world), memory) for build, parallel, memory in CASES[world]]
    ranks = spawn(world, sent_in_a_step, cases, timeout=300)
    for number, (build, layout, memory) in enumerate(cases):
        stages = expected(build, layout, memory)
        checked = set()
        for stage, places, sent in (found[number] for found in ranks):
            if any(places):
                continue  # what does not divide is with the first ranks
            assert by_axes(sent, layout) == stages[stage], (build.__name__, layout, memory, stage)
            checked.add(stage)
        assert len(checked) == layout.pp
