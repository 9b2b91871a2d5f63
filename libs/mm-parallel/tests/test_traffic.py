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

COUNT, TOKENS = 4, 9  # micro-batches of two samples


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


def sent_in_a_step(rank: int, world: int, build: Callable, cases: list[tuple[ParallelConfig, MemoryConfig]]) -> list:
    """For each case: (pipeline rank, index of the rank on all other axes, what it sent)."""
    found = []
    for parallel, memory in cases:
        mesh = make_mesh(parallel, "cpu")
        torch.manual_seed(0)
        model = build()
        cut = (model.plan, mesh, parallel, memory, model.compute_dtype)
        run = Pipeline(model, *cut) if parallel.pp > 1 else parallelize(model, *cut)
        for _ in range(2):  # in a first step FSDP finds out what follows what
            with count_sent(mesh) as sent:
                forward_backward(run, COUNT, lambda number: arguments(build), losses, 2 * COUNT * world, mesh)
                finish_gradients(model, mesh)
                clip_grad_norm(model, 1.0, mesh)
        places = [rank_in(mesh, axis) for axis in ("dp_replicate", "dp_shard", "ring", "ulysses", "tp")]
        found.append((rank_in(mesh, "pp"), places, sent))
    return found


def expected(build: Callable, layout: ParallelConfig, memory: MemoryConfig) -> list[Counter]:
    with torch.device("meta"):
        model = build()
    units = Units(model, model.plan, model.compute_dtype, arguments(build, "meta"))
    return [by_axes(sends, layout) for sends in count_sends(units, layout, memory, COUNT)]


CASES = {
    2: [
        (ParallelConfig(dp_shard=2), MemoryConfig()),
        (ParallelConfig(dp_replicate=2), MemoryConfig("full")),
        (ParallelConfig(dp_shard=2), MemoryConfig("full", reshard=False)),
        (ParallelConfig(dp_shard=2), MemoryConfig(prefetch=2)),
        (ParallelConfig(ulysses=2), MemoryConfig("but_attention")),
        (ParallelConfig(ring=2), MemoryConfig("but_attention")),
        (ParallelConfig(tp=2), MemoryConfig(2)),
        (ParallelConfig(pp_layers=(1, 3)), MemoryConfig("full")),
        (ParallelConfig(pp_layers=((1, 1), (1, 1))), MemoryConfig()),
        (ParallelConfig(pp_layers=(2, 2), schedule="zero_bubble"), MemoryConfig()),
    ],
    4: [
        (ParallelConfig(dp_replicate=2, ulysses=2), MemoryConfig("full")),
        (ParallelConfig(ring=2, ulysses=2), MemoryConfig(1, but_attention=1)),
        (ParallelConfig(dp_shard=2, tp=2), MemoryConfig("full")),
        (ParallelConfig(ulysses=2, pp_layers=(1, 3)), MemoryConfig(reshard=False)),
        (ParallelConfig(ring=2, pp_layers=((1, 1), (1, 1))), MemoryConfig("full", reshard=False)),
        (ParallelConfig(dp_shard=2, pp_layers=(2, 2), schedule="zero_bubble"), MemoryConfig()),
        (ParallelConfig(dp_shard=2, pp_layers=(2, 2), schedule="zero_bubble"), MemoryConfig(reshard=False)),
    ],
    8: [
        (ParallelConfig(dp_replicate=2, ulysses=2, tp=2), MemoryConfig("but_attention")),
        (ParallelConfig(ring=2, tp=2, pp_layers=(3, 1)), MemoryConfig("full")),
    ],
}
RUNS = [
    (2, plain),
    (2, low),
    (4, low),
    (4, shared),
    (2, frozen),
    (4, frozen),
    (4, packed),
    (2, two),
    (4, two),
    (8, low),
]


@pytest.mark.parametrize(("world", "build"), RUNS, ids=lambda given: getattr(given, "__name__", given))
def test_a_step_sends_what_is_expected(world: int, build: Callable) -> None:
    cases = [(parallel.resolve(world), memory) for parallel, memory in CASES[world]]
    if build is frozen:  # what goes down such a pipeline for nothing is not counted
        cases = [case for case in cases if case[0].schedule != "zero_bubble"]
    ranks = spawn(world, sent_in_a_step, build, cases)
    for number, (layout, memory) in enumerate(cases):
        stages = expected(build, layout, memory)
        checked = set()
        for case in (found[number] for found in ranks):
            stage, places, sent = case
            if any(places):
                continue  # what does not divide is with the first ranks
            assert by_axes(sent, layout) == stages[stage], (layout, memory, stage)
            checked.add(stage)
        assert len(checked) == layout.pp
