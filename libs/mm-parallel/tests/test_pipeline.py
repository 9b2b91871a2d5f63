"""A model in stages against one device: losses and every gradient, forwards, steps, checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from mm_parallel import MemoryConfig, ParallelConfig, Pipeline, data_rank, finish_gradients
from mm_parallel.testing import TinyLadder, assert_same_grads, gradients, spawn

SHORT, LONG = 6, 9


def build(layers: int = 7) -> TinyLadder:
    torch.manual_seed(0)
    return TinyLadder(layers).double()


def freeze_stem(model: TinyLadder) -> None:
    for module in (model.embed, model.read, model.time, model.blocks[0], model.blocks[1]):
        module.requires_grad_(False)


def freeze_one_of_the_stem(model: TinyLadder) -> None:
    model.embed.requires_grad_(False)


@dataclass
class Case:
    pp_layers: tuple
    count: int = 4
    parallel: dict = field(default_factory=dict)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    freeze: Callable[[TinyLadder], None] | None = None
    lengths: tuple[int, ...] = (SHORT,)


def micro_batch(number: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * length + number)
    shapes = {"tokens": (2, length, 5), "t": (2, 3), "target": (2, length, 5)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def losses(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


@cache
def alone(layers: int, freeze, lengths: tuple[int, ...], numbers: int) -> tuple[list[Tensor], dict, Tensor]:
    """Losses of every micro-batch by length, the gradient of their mean summed over lengths, an output."""
    model = build(layers)
    if freeze:
        freeze(model)
    every = []
    for length in lengths:
        parts = []
        for number in range(numbers):
            batch = micro_batch(number, length)
            parts.append(losses(model(batch["tokens"], batch["t"]), batch["target"]))
            (parts[-1].mean() / numbers).backward()
        every.append(torch.cat(parts).detach())
    batch = micro_batch(0, LONG)
    with torch.no_grad():
        return every, gradients(model), model(batch["tokens"], batch["t"])


def run(case: Case) -> None:
    layers = sum(map(sum, case.pp_layers)) if isinstance(case.pp_layers[0], tuple) else sum(case.pp_layers)
    parallel = ParallelConfig(pp_layers=case.pp_layers, **case.parallel)
    mesh = parallel.mesh("cpu")
    rank, parts = data_rank(mesh)
    every, grads, output = alone(layers, case.freeze, case.lengths, case.count * parts)
    model = build(layers)
    if case.freeze:
        case.freeze(model)
    names = set(model.state_dict())
    pipeline = Pipeline(model, TinyLadder.plan, mesh, parallel, case.memory)
    held = set(model.state_dict())
    assert held | pipeline.elsewhere == names
    assert not held & pipeline.elsewhere

    for length, expected in zip(case.lengths, every, strict=True):
        batches = [micro_batch(rank * case.count + number, length) for number in range(case.count)]
        own = pipeline.step(
            case.count,
            lambda i, batches=batches: {"tokens": batches[i]["tokens"], "t": batches[i]["t"]},
            lambda output, i, batches=batches: losses(output, batches[i]["target"]),
        )
        if mesh.get_local_rank("pp") == mesh["pp"].size() - 1:
            torch.testing.assert_close(torch.cat(own), expected.chunk(parts)[rank], rtol=1e-12, atol=0)
        else:
            assert own == []
    finish_gradients(pipeline.model, mesh)
    actual = gradients(pipeline.model)
    everyone = [{} for _ in range(mesh["pp"].size())]
    dist.all_gather_object(everyone, set(actual), group=mesh.get_group("pp"))
    assert sum(map(len, everyone)) == len(grads), "a weight is on two stages, or on none"
    assert_same_grads(actual, {name: grads[name] for name in set.union(*everyone) & set(actual)}, 1e-10)

    batch = micro_batch(0, LONG)
    assert pipeline.training
    assert not pipeline.eval().model.training
    torch.testing.assert_close(pipeline(batch["tokens"], t=batch["t"]), output, rtol=1e-12, atol=1e-14)


def run_all(rank: int, world: int, cases: list[Case]) -> None:
    for case in cases:
        try:
            run(case)
        except BaseException as error:
            raise AssertionError(f"{case}") from error


FULL = MemoryConfig("full")
TWO = [
    *(Case((1, 3), count) for count in (1, 2, 4, 5)),
    *(Case(((2, 1), (1, 3)), count) for count in (1, 2, 4)),
    Case(((1, 1), (1, 1), (2, 1)), 4),
    Case((2, 2), lengths=(SHORT, LONG, SHORT)),
    Case(((1, 1), (1, 1)), lengths=(SHORT, LONG, SHORT), memory=FULL),
    Case((3, 1), memory=FULL),
    Case((2, 2), memory=MemoryConfig(("none", "full", "full", "none"))),
    Case((2, 2), freeze=freeze_stem),
    Case(((1, 1), (1, 1)), freeze=freeze_stem),
    Case((2, 2), freeze=freeze_one_of_the_stem),
]
ZERO = [
    Case((1, 3), 4, {"schedule": "zero_bubble"}),
    Case(((1, 1), (2, 1)), 4, {"schedule": "zero_bubble"}),
    Case(((1, 1), (1, 1)), 4, {"schedule": "zero_bubble"}, freeze=freeze_stem),
    Case(((1, 1), (1, 1)), 1, {"schedule": "zero_bubble"}, lengths=(SHORT, LONG)),
]


def test_two_stages():
    spawn(2, run_all, TWO)


def test_zero_bubble():
    spawn(2, run_all, ZERO)


FOUR = [
    Case((1, 1, 2, 1), 4),
    Case((1, 1, 2, 1), 2),
    Case((1, 1, 1, 1), 5, memory=FULL),
    Case(((1, 1, 1, 1), (1, 1, 1, 1)), 4),
    *(
        Case(layers, 4, {**data, **schedule}, memory, lengths=lengths)
        for data in ({"dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 1})
        for layers, lengths in (((1, 3), (SHORT, LONG, SHORT)), (((2, 1), (1, 1)), (SHORT, LONG)))
        for schedule, memory in (
            ({}, MemoryConfig()),
            ({}, MemoryConfig("full", reshard=False)),
            ({"schedule": "zero_bubble"}, MemoryConfig()),
        )
    ),
    Case(((1, 1), (1, 1)), 2, {"dp_shard": 2}, freeze=freeze_stem),
]


def test_four_ranks_stages_and_shards():
    spawn(4, run_all, FOUR)
