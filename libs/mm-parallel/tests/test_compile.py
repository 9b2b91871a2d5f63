"""Compiled layers: loss and every gradient as without, in every layout; few codes; and nothing falls back in silence."""

from dataclasses import replace

import torch
from torch import Tensor

from mm_parallel import MemoryConfig, ParallelConfig
from mm_parallel.testing import TinyLadder, spawn
from mm_parallel.testing.equivalence import Case, Subject, check


def build() -> TinyLadder:
    torch.manual_seed(0)
    return TinyLadder(4).double()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"tokens": (8, 6, 5), "t": (8, 3), "target": (8, 6, 5)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


SUBJECT = Subject(build, lambda model: TinyLadder.plan, batch)
ALONE = [
    Case("plain"),
    Case("full", memory=MemoryConfig("full")),
    Case("but-attention", memory=MemoryConfig("but_attention")),
    Case("some", memory=MemoryConfig(1, but_attention=1)),
    Case("offload", memory=MemoryConfig("but_attention", offload="attention")),
    Case("inputs", memory=MemoryConfig("full", offload="inputs")),
]
TWO = [
    Case("shards", ParallelConfig(dp_shard=2)),
    Case("kept", ParallelConfig(dp_shard=2), MemoryConfig("but_attention", reshard=False, prefetch=2), meta=True),
    Case("ulysses", ParallelConfig(dp_shard=1, ulysses=2)),
    Case("ulysses, full", ParallelConfig(dp_shard=1, ulysses=2), MemoryConfig("full")),
    Case("ring", ParallelConfig(dp_shard=1, ring=2), micro_batches=2),
    Case("ring, but-attention", ParallelConfig(dp_shard=1, ring=2), MemoryConfig("but_attention", offload="attention")),
    Case("tensor", ParallelConfig(dp_shard=1, tp=2)),
    Case("tensor, but-attention", ParallelConfig(dp_shard=1, tp=2), MemoryConfig("but_attention")),
    Case("pipeline", ParallelConfig(dp_shard=1, pp_layers=(1, 3)), MemoryConfig("full"), micro_batches=2),
    Case("zero-bubble", ParallelConfig(dp_shard=1, pp_layers=(2, 2), schedule="zero_bubble"), micro_batches=2),
]


def compiled(rank: int, world: int, cases: list[Case]) -> None:
    check(rank, world, SUBJECT, [replace(case, compile="aot_eager", steps=1) for case in cases])


def test_alone():
    compiled(0, 1, ALONE)


def test_on_two_ranks():
    spawn(2, compiled, TWO, timeout=300)


def test_x():
    import torch._dynamo.utils as u
    for c in ALONE:
        compiled(0, 1, [c])
        print(c.name, u.counters["stats"], u.counters["frames"])
