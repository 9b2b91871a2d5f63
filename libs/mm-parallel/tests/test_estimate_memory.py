"""What an estimate says of memory, against ranks that train."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel import MemoryConfig, ParallelConfig, Pipeline, make_mesh
from mm_parallel import parallelize as cut
from mm_parallel.attention import core
from mm_parallel.estimate import RankMemory, estimate_memory
from mm_parallel.estimate.peak import PeakMemory
from mm_parallel.mesh import rank_in, size
from mm_parallel.testing import TinyLadder, TwoLadders, spawn
from mm_parallel.testing.memory import measure_memory


@dataclass(frozen=True)
class Case:
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(dp_shard=1))
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    dtype: torch.dtype | None = None
    micro_batches: int = 1
    model: type[TinyLadder] = TinyLadder
    frozen: bool = False
    causal: bool = False

    @property
    def ranks(self) -> int:
        p = self.parallel
        return p.dp_replicate * p.dp_shard * (p.ulysses or 1) * (p.ring or 1) * p.tp * p.pp

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        more = {} if self.model is TwoLadders else {"causal": self.causal}
        model = self.model(4, self.dtype, **more)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not self.frozen or ".q." in name or "out" in name
        for ladder in (model, *((model.tower,) if self.model is TwoLadders else ())):
            ladder.core = core  # the estimate's
        return model

    def batch(self) -> dict[str, Any]:
        batch = {"tokens": torch.randn(2, 37, 5), "t": torch.rand(2, 3)}
        if self.model is TwoLadders:
            batch |= {"image": torch.randn(66, 5), "grids": ((1, 20), (2, 14), (1, 18)), "owner": (0, 1, 1)}
        return batch


def estimate(case: Case) -> tuple[RankMemory, ...]:
    with torch.device("meta"):
        model = case.build()
    example = {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in case.batch().items()}
    layout = case.parallel.resolve(case.ranks)
    return estimate_memory(
        model, model.plan, layout, case.memory, case.dtype, example, micro_batches=case.micro_batches, losses=loss
    )


def loss(output: Tensor) -> Tensor:
    return output.float().square()


def measure(rank: int, world: int, cases: list[Case]) -> list[dict[str, int]]:
    return [measure_one(case, make_mesh(case.parallel, "cpu")) for case in cases]


def measure_one(case: Case, mesh: DeviceMesh | None) -> dict[str, int]:
    model = case.build()
    how = (model.plan, mesh, case.parallel, case.memory, case.dtype)
    run = Pipeline(model, *how) if size(mesh, "pp") > 1 else cut(model, *how)
    found = measure_memory(run, model, case.micro_batches, lambda _: case.batch(), lambda y, _: loss(y), mesh)
    return found | {"pp": rank_in(mesh, "pp")}


P, M = ParallelConfig, MemoryConfig
BF16 = torch.bfloat16
TWO = [
    Case(P(dp_shard=2)),
    Case(P(dp_shard=2), M("full")),
    Case(P(dp_shard=2), M("but_attention"), BF16, micro_batches=2),
    Case(P(dp_shard=2), M(reshard=False)),
    Case(P(dp_shard=2), M("full", prefetch=2)),
    Case(P(dp_shard=2), M(1, 1), BF16, frozen=True),
    Case(P(dp_shard=1, ulysses=2)),
    Case(P(dp_shard=1, ring=2)),
    Case(P(dp_shard=1, tp=2)),
    Case(P(dp_shard=2), model=TwoLadders),
    Case(P(dp_shard=1, ulysses=2), M("full"), model=TwoLadders),
    Case(P(dp_shard=1, pp_layers=(2, 2)), micro_batches=4),
    Case(P(dp_shard=1, pp_layers=((1, 1), (1, 1))), M("full"), micro_batches=4),
    Case(P(dp_shard=1, pp_layers=((1, 1), (1, 1))), micro_batches=8),
    Case(P(dp_shard=1, pp_layers=(3, 1)), M(1, 1), BF16, micro_batches=3, frozen=True),
]
FOUR = [
    Case(P(dp_replicate=2, dp_shard=2), M("but_attention")),
    Case(P(dp_shard=1, ulysses=2, ring=2), M("full"), causal=True),
    Case(P(dp_shard=2, tp=2), M("full"), BF16),
    Case(P(dp_shard=2, pp_layers=(2, 2)), M("full"), micro_batches=4),
    Case(P(dp_shard=4), dtype=BF16),
]
EXACT = "parameters", "gradients", "moments"


def fullest(found: list[dict[str, int]], rank: int) -> dict[str, int]:
    own = [one for one in found if one["pp"] == rank]
    return {name: max(one[name] for one in own) for name in own[0]}


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["two-ranks", "four-ranks"])
def test_bytes_are_those_of_ranks_that_train(cases: list[Case]) -> None:
    found = spawn(cases[0].ranks, measure, cases, timeout=300)
    peaks = []
    for i, case in enumerate(cases):
        for said in estimate(case):
            seen = fullest([of_rank[i] for of_rank in found], said.rank)
            assert {name: getattr(said, name) for name in EXACT} == {name: seen[name] for name in EXACT}, case
            made = said.peak - said.parameters - said.moments
            assert made == pytest.approx(seen["peak"], rel=0.03), (case, said)
            peaks.append((made, seen["peak"]))
    apart = [a for a in peaks for b in peaks if a is not b and abs(a[1] / b[1] - 1) > 0.04]
    assert len(apart) > len(peaks)
    for made, seen in peaks:
        assert all((made < more) == (seen < most) for more, most in peaks if abs(seen / most - 1) > 0.04)


@pytest.mark.parametrize("word", ["none", "full", "but_attention"])
@pytest.mark.parametrize("dtype", [None, BF16], ids=["float32", "bfloat16"])
def test_saved_bytes_are_exact(word: str, dtype: torch.dtype | None) -> None:
    case = Case(memory=M(word), dtype=dtype, causal=True)
    model, batch = cut(case.build(), TinyLadder.plan, memory=case.memory, dtype=dtype), case.batch()
    with PeakMemory() as memory:
        losses = loss(model(**batch))
        total = losses.sum()
        seen = memory.now
    (said,) = estimate(case)
    called = sum(batch[name].numel() * 4 for name in said.layers[0].trace.holds)  # made before
    assert said.saved + said.stream - called == seen, total
    assert {unit.word for unit in said.layers if unit.name.startswith("blocks")} == {word}
