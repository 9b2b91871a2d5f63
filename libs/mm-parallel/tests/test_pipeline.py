"""A model in stages against one device: losses and every gradient, forwards, steps, checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    Pipeline,
    clip_grad_norm,
    data_rank,
    finish_gradients,
    forward_backward,
    full_tensors,
    load_parameters,
    make_mesh,
    parallelize,
)
from mm_parallel.grads import by_layout
from mm_parallel.pipeline.prune import prune
from mm_parallel.pipeline.recent import Recent
from mm_parallel.plan import Sequence
from mm_parallel.testing import TinyLadder, TwoLadders, assert_same_grads, gradients, spawn
from mm_parallel.testing.ladder import Stream

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


@cache
def mesh_of(stages: int, replicate: int, shard: int) -> DeviceMesh:
    """One for all cases of a layout: groups take longer to make than a step takes to run."""
    return make_mesh(ParallelConfig(replicate, shard, pp_layers=(1,) * stages), "cpu")


def run(case: Case) -> None:
    layers = sum(map(sum, case.pp_layers)) if isinstance(case.pp_layers[0], tuple) else sum(case.pp_layers)
    parallel = ParallelConfig(pp_layers=case.pp_layers, **case.parallel)
    whole = parallel.resolve(dist.get_world_size())
    mesh = mesh_of(whole.pp, whole.dp_replicate, whole.dp_shard)
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
            share=2 * case.count,
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
    assert set.union(*everyone) == set(grads)
    assert_same_grads(actual, {name: grads[name] for name in actual}, 1e-10)

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
    *(Case(((1, 1), (1, 2)), count) for count in (1, 2, 4)),
    Case(((1, 1), (1, 1), (1, 1)), 4),
    Case(((1, 1), (1, 1)), 2, memory=FULL, lengths=(SHORT, LONG, SHORT)),
    Case((2, 2), 2, memory=MemoryConfig(("none", "full", "but_attention", "none"))),
    Case((2, 2), 2, freeze=freeze_stem),
    Case(((1, 1), (1, 1)), 2, freeze=freeze_stem),
    Case((2, 2), 2, freeze=freeze_one_of_the_stem),
]
ZERO = [
    Case((1, 3), 4, {"schedule": "zero_bubble"}),
    Case(((1, 1), (2, 1)), 4, {"schedule": "zero_bubble"}),
    Case(((1, 1), (1, 1)), 4, {"schedule": "zero_bubble"}, freeze=freeze_stem),
    Case(((1, 1), (1, 1)), 1, {"schedule": "zero_bubble"}, lengths=(SHORT, LONG)),
]


def test_two_stages():
    spawn(2, run_all, TWO, timeout=120)


def test_zero_bubble():
    spawn(2, run_all, ZERO)


SHARDS, COPIES = {"dp_shard": 2}, {"dp_shard": 1, "dp_replicate": 2}
FOUR = [
    Case((1, 1, 1, 1), 5, memory=FULL),
    Case((1, 1, 2, 1), 2),
    Case(((1, 1, 1, 1), (1, 1, 1, 1)), 4),
    Case((1, 2), 4, SHARDS, lengths=(SHORT, LONG, SHORT)),
    Case((1, 2), 4, SHARDS | {"schedule": "zero_bubble"}, lengths=(SHORT, LONG)),
    Case(((1, 1), (1, 1)), 4, SHARDS, MemoryConfig("full", reshard=False)),
    Case(((1, 1), (1, 1)), 2, SHARDS, freeze=freeze_stem),
    Case(((1, 1), (1, 1)), 2, SHARDS | {"schedule": "zero_bubble"}, freeze=freeze_stem),
    Case((1, 2), 2, COPIES, FULL, lengths=(SHORT, LONG)),
    Case((1, 2), 2, COPIES | {"schedule": "zero_bubble"}),
]


def test_four_ranks_stages_and_shards():
    spawn(4, run_all, FOUR, timeout=120)


OPTIONS = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)  # those of mm_train


class Trainer:
    """AdamW on the same eight samples, whatever the layout."""

    def __init__(self, parallel: ParallelConfig, seed: int = 0) -> None:
        self.mesh = make_mesh(parallel, "cpu")
        torch.manual_seed(seed)
        model = TinyLadder(7).double()
        cut = (TinyLadder.plan, self.mesh, parallel)
        self.run = Pipeline(model, *cut) if parallel.pp > 1 else parallelize(model, *cut)
        self.model = model
        groups = by_layout(model.parameters())
        self.optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.01, eps=1e-4)

    def step(self) -> None:
        rank, parts = data_rank(self.mesh)
        batches = [micro_batch(number, SHORT) for number in range(4)][rank * 4 // parts : (rank + 1) * 4 // parts]
        forward_backward(
            self.run,
            len(batches),
            lambda i: {"tokens": batches[i]["tokens"], "t": batches[i]["t"]},
            lambda output, i: losses(output, batches[i]["target"]),
            2 * 4,
            self.mesh,
        )
        finish_gradients(self.model, self.mesh)
        clip_grad_norm(self.model, 0.1, self.mesh)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=OPTIONS)
        return {"model": get_model_state_dict(self.model, options=OPTIONS), "optimizer": optimizer}

    def load(self, folder: str) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=OPTIONS)

    def weights(self) -> dict:
        return {name: tensor.numpy() for name, tensor in full_tensors(self.model)}


def train(rank: int, world: int, layouts: list[ParallelConfig], folder: str) -> list[dict]:
    """Two steps in the first layout; then from there, one more in each. The weights that this rank holds."""
    first = Trainer(layouts[0])
    first.step()
    first.step()
    dcp.save(first.state(), checkpoint_id=folder)
    results = []
    for layout in layouts:
        trainer = Trainer(layout, seed=1)
        trainer.load(folder)
        trainer.step()
        results.append(trainer.weights())
    return results


def test_three_steps_and_a_checkpoint_from_any_layout_to_any(tmp_path: Path):
    alone = Trainer(ParallelConfig())
    for _ in range(3):
        alone.step()
    expected = alone.weights()
    layouts = [
        ParallelConfig(pp_layers=(3, 4), dp_shard=2),
        ParallelConfig(pp_layers=(1, 2, 2, 2)),
        ParallelConfig(pp_layers=((2, 2), (2, 1)), dp_replicate=2),
        ParallelConfig(dp_shard=4),
    ]
    results = spawn(4, train, layouts, str(tmp_path / "step"), timeout=120)
    back = Trainer(ParallelConfig(), seed=1)
    back.load(str(tmp_path / "step"))
    back.step()
    for held in [[back.weights()], *zip(*results, strict=True)]:
        assert set().union(*held) == set(expected)
        for part in held:
            for name, values in part.items():
                assert abs(values - expected[name]).max() <= 1e-11, name


def from_meta(rank: int, world: int) -> None:
    source = build(4).state_dict()
    parallel = ParallelConfig(pp_layers=(2, 2), dp_shard=1)
    with torch.device("meta"):
        model = TinyLadder(4).double()
    pipeline = Pipeline(model, TinyLadder.plan, make_mesh(parallel, "cpu"), parallel)
    load_parameters(model, source, torch.device("cpu"), pipeline.elsewhere)
    batch = micro_batch(0, SHORT)
    torch.testing.assert_close(
        pipeline(batch["tokens"], batch["t"]), build(4)(batch["tokens"], batch["t"]), rtol=1e-12, atol=1e-14
    )


def test_a_meta_model_is_filled_stage_by_stage():
    spawn(2, from_meta)


def bf16(rank: int, world: int) -> None:
    """What crosses has the dtypes that the weights are gathered in, but for what stays in fp32."""
    parallel = ParallelConfig(pp_layers=(2, 2), dp_shard=2)
    torch.manual_seed(0)
    model = TinyLadder(4, torch.bfloat16)
    mesh = make_mesh(parallel, "cpu")
    pipeline = Pipeline(model, TinyLadder.plan, mesh, parallel, dtype=torch.bfloat16)
    batch = {name: tensor.float() for name, tensor in micro_batch(0, SHORT).items()}
    pipeline.step(
        2,
        lambda i: {"tokens": batch["tokens"], "t": batch["t"]},
        lambda output, i: losses(output, batch["target"]),
        share=2 * 2,
    )
    finish_gradients(model, mesh)
    torch.manual_seed(0)
    alone = TinyLadder(4, torch.bfloat16)
    losses(alone(batch["tokens"], batch["t"]), batch["target"]).mean().backward()
    actual, expected = gradients(model), gradients(alone)
    assert_same_grads(actual, {name: expected[name] for name in actual}, 1e-2)


def test_bf16_with_fp32_parameters():
    spawn(4, bf16)


def same_error(call: Callable[[], object], message: str) -> None:
    """On every rank, and nobody waits."""
    with pytest.raises(ValueError, match=message):
        call()
    dist.barrier()


def refusals(rank: int, world: int) -> None:
    def make(layers: tuple, schedule: str = "1f1b", memory: MemoryConfig = MemoryConfig()) -> Pipeline:  # noqa: B008
        parallel = ParallelConfig(pp_layers=layers, schedule=schedule)
        return Pipeline(build(4), TinyLadder.plan, make_mesh(parallel, "cpu"), parallel, memory)

    def step(count: int, length: int, odd: int | None = None) -> None:
        batches = [micro_batch(i, length + (i == odd)) for i in range(count)]
        pipeline.step(
            count,
            lambda i: {"tokens": batches[i]["tokens"], "t": batches[i]["t"]},
            lambda output, i: losses(output, batches[i]["target"]),
            share=2 * count,
        )

    same_error(lambda: make((2, 3)), r"are 5 layers, but the model has 4: .*\[2, 2\]")
    for memory in (MemoryConfig("full"), MemoryConfig(1), MemoryConfig(("none", "none", "full", "none"))):
        same_error(lambda memory=memory: make((2, 2), "zero_bubble", memory), "splits a backward in two")
    wide = ParallelConfig(pp_layers=(2, 1, 1))
    mesh = make_mesh(ParallelConfig(pp_layers=(2, 2)), "cpu")
    same_error(lambda: Pipeline(build(4), TinyLadder.plan, mesh, wide), "stages for 3 ranks, the mesh has 2")
    tied = replace(TinyLadder.plan, vocabulary=("embed",))
    two = ParallelConfig(pp_layers=(2, 2))
    same_error(
        lambda: Pipeline(build(4), tied, mesh, two), "tied head: embed is used by the first stage and by the last"
    )

    pipeline = make(((1, 1), (1, 1)))
    same_error(lambda: step(5, SHORT), r"5 micro-batches cannot go in 2 equal rounds .* use 4 or 6")
    same_error(lambda: step(0, SHORT), "at least 1")
    same_error(
        lambda: step(2, SHORT + rank),
        r"rank 0: a step of 2 x \(tokens 2x6x5 float64, t 2x3 float64\); rank 1: a step of 2 x \(tokens 2x7x5",
    )
    same_error(lambda: step(2 + rank, SHORT), "rank 1: a step of 3 x")
    batch = micro_batch(0, SHORT + rank)
    same_error(lambda: pipeline(batch["tokens"], batch["t"]), "rank 0: a forward of tokens 2x6x5")
    step(2, SHORT)  # and still works


def test_what_cannot_be_is_refused_on_every_rank():
    spawn(2, refusals)


def odd_micro_batch(rank: int, world: int) -> None:
    parallel = ParallelConfig(pp_layers=(2, 2))
    pipeline = Pipeline(build(4), TinyLadder.plan, make_mesh(parallel, "cpu"), parallel)
    batches = [micro_batch(i, SHORT + i) for i in range(2)]
    pipeline.step(2, lambda i: {"tokens": batches[i]["tokens"], "t": batches[i]["t"]}, lambda output, i: output, 1)


def test_micro_batches_of_one_step_have_one_shape():
    with pytest.raises(RuntimeError, match=r"micro-batch 1 is tokens 2x7x5 float64, .* began with tokens 2x6x5"):
        spawn(2, odd_micro_batch)


def freeze_too_late(rank: int, world: int) -> None:
    parallel = ParallelConfig(pp_layers=(2, 2))
    pipeline = Pipeline(build(4), TinyLadder.plan, make_mesh(parallel, "cpu"), parallel)
    pipeline.model.requires_grad_(rank == 1)
    batch = micro_batch(0, SHORT)
    pipeline.step(1, lambda i: {"tokens": batch["tokens"], "t": batch["t"]}, lambda output, i: output, 1)


def test_what_was_not_announced_is_not_sent():
    with pytest.raises(RuntimeError, match=r"x of the stream is 2x6x12 float64, but was .* that requires a gradient"):
        spawn(2, freeze_too_late)


def test_pruning_keeps_names():
    whole, model = build(4), build(4)
    gone = prune(model, ("out",), {}, {0, 2, "first"})
    assert gone == {n for n in whole.state_dict() if n.startswith(("blocks.1.", "blocks.3.", "out."))}
    assert set(model.state_dict()) == set(whole.state_dict()) - gone
    assert len(model.blocks) == 4


def test_a_weight_on_two_stages_is_refused():
    model = build(4)
    model.out.weight = model.embed.weight
    with pytest.raises(ValueError, match="embed and out share a weight, but not a pipeline stage"):
        prune(model, ("out",), {}, {0})
    with pytest.raises(ValueError, match=r"plan.last: blocks holds layers"):
        prune(build(4), ("out", "blocks"), {}, {0})


class Deep(nn.Module):
    """Layers inside other modules, beside which there is something; and a table that holds no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.language = nn.Module()
        self.language.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.language.embed, self.language.norm = nn.Embedding(3, 2), nn.LayerNorm(2)
        self.language.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.act = nn.GELU()

    @property
    def layers(self) -> nn.ModuleList:
        return self.language.layers


def test_layers_may_lie_deeper():
    model = Deep()
    assert prune(model, ("language.norm", "language.scale"), {}, {1, 2, "last"}) == {
        "language.embed.weight",
        "language.layers.0.weight",
        "language.layers.0.bias",
    }
    assert model.language.layers[0] is model.language.embed is None
    assert model.table is not None
    assert model.act is not None


def with_and_without_a_mask(rank: int, world: int) -> None:
    """Forwards and steps of one pipeline, whose ranks share the tokens, too: a mask comes, goes, and comes again."""
    parallel = ParallelConfig(ring=2, pp_layers=((2, 1), (1, 1)))
    mesh = make_mesh(parallel, "cpu")
    alone, model = build(5), build(5)
    pipeline = Pipeline(model, TinyLadder.plan, mesh, parallel)
    mask = torch.tensor([[True] * 2 + [False] * 4, [False, True, True] * 2])
    for case, seen in enumerate((mask, None, ~mask)):
        batches = [micro_batch(2 * case + number, SHORT) | {"mask": seen} for number in range(2)]
        targets = [batch.pop("target") for batch in batches]
        with torch.no_grad():
            expected = [alone(**batch) for batch in batches]
        torch.testing.assert_close(pipeline(**batches[0]), expected[0], rtol=1e-12, atol=1e-14)
        own = pipeline.step(2, batches.__getitem__, lambda output, i, targets=targets: losses(output, targets[i]), 4)
        for got, output, target in zip(own, expected, targets, strict=bool(own)):
            torch.testing.assert_close(got, losses(output, target), rtol=1e-12, atol=0)
        for batch, target in zip(batches, targets, strict=True):
            (losses(alone(**batch), target).sum() / 4).backward()
    finish_gradients(model, mesh)
    actual, whole = gradients(model), gradients(alone)
    assert_same_grads(actual, {name: whole[name] for name in actual}, 1e-10)


def test_masks_come_and_go():
    spawn(4, with_and_without_a_mask)


GRIDS = (((2, 4), (1, 8)), (), ((1, 6),), ((3, 2), (1, 2), (1, 4)))
SEGMENTS = {SHORT: ((0, 6), (0, 2, 6), (0, 1, 3, 6), (0, 5, 6)), LONG: ((0, 9), (0, 2, 9), (0, 1, 3, 9), (0, 4, 5, 9))}


def pack(number: int, length: int) -> dict:
    """One sample's worth of tokens, packed and illustrated unlike those of other numbers."""
    grids = GRIDS[number]
    generator = torch.Generator().manual_seed(100 * length + number)
    shapes = {"tokens": (1, length, 5), "t": (1, 3), "image": (sum(map(prod, grids)), 5)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return tensors | {"grids": grids, "owner": (0,) * len(grids), "segments": SEGMENTS[length][number]}


def outline(number: int, length: int) -> dict:
    """The same without values."""
    return {
        name: value.to("meta") if isinstance(value, Tensor) else value for name, value in pack(number, length).items()
    }


def two_ladders() -> TwoLadders:
    torch.manual_seed(0)
    return TwoLadders(4).double()


def unlike_micro_batches(rank: int, world: int, layouts: list[dict]) -> None:
    single = two_ladders()
    for length in (SHORT, LONG, SHORT):
        for number in range(len(GRIDS)):
            (single(**pack(number, length)).square().sum() / 4).backward()
    expected = gradients(single)
    for layout in layouts:
        memory = layout.get("memory", MemoryConfig())
        parallel = ParallelConfig(**{name: value for name, value in layout.items() if name != "memory"})
        mesh = make_mesh(parallel, "cpu")
        index, parts = data_rank(mesh)
        model, asked = two_ladders(), []
        pipeline = Pipeline(model, TwoLadders.plan, mesh, parallel, memory)
        count = len(GRIDS) // parts

        def inputs(i: int, length: int, first=index * count, asked=asked) -> dict:
            asked.append(i)
            return pack(first + i, length)

        for length in (SHORT, LONG, SHORT):
            forward_backward(
                pipeline,
                count,
                partial(inputs, length=length),
                lambda y, i: y.square().flatten(1).sum(1),
                total=4,
                mesh=mesh,
                outlines=lambda i, length=length, first=index * count: outline(first + i, length),
            )
        finish_gradients(model, mesh)
        actual = gradients(model)
        assert_same_grads(actual, {name: expected[name] for name in actual}, 1e-10)
        assert asked == list(range(count)) * 3 * (mesh.get_local_rank("pp") == 0)
        with torch.no_grad():
            torch.testing.assert_close(pipeline(**pack(3, LONG)), single(**pack(3, LONG)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (
            2,
            [
                {"pp_layers": (1, 3)},
                {"pp_layers": ((1, 1), (1, 1))},
                {"pp_layers": (2, 2), "schedule": "zero_bubble"},
                {"pp_layers": ((1, 1), (1, 1)), "memory": MemoryConfig("full")},
            ],
        ),
        (
            4,
            [
                {"pp_layers": (2, 2), "dp_shard": 2, "memory": MemoryConfig(1)},
                {"pp_layers": ((1, 1), (1, 1)), "ulysses": 2},
                {"pp_layers": (3, 1), "tp": 2},
            ],
        ),
    ],
)
def test_micro_batches_may_differ_in_what_does_not_travel(world, layouts):
    spawn(world, unlike_micro_batches, layouts)


def unlike_refusals(rank: int, world: int) -> None:
    parallel = ParallelConfig(pp_layers=(2, 2))
    mesh = make_mesh(parallel, "cpu")
    pipeline = Pipeline(two_ladders(), TwoLadders.plan, mesh, parallel)

    def step(lengths: tuple[int, int] = (SHORT, SHORT), told: Callable = outline) -> list[Tensor]:
        outlines = [told(i, length) for i, length in enumerate(lengths)]
        batches = [pack(i, length) for i, length in enumerate(lengths)]
        return pipeline.step(2, batches.__getitem__, lambda y, i: y.square().mean(), 1, outlines.__getitem__)

    same_error(
        lambda: step((SHORT, LONG)),
        r"micro-batch 1 would send x 1x9x12 float64, .* began with x 1x6x12 float64, .* pad the micro-batches",
    )
    same_error(
        lambda: step(told=lambda i, length: outline(i, length) | {"segments": (0, 1 + rank, length)}),
        r"rank 0: a step of \(tokens 1x6x5 .* segments \(0, 1, 6\)\); rank 1: .* segments \(0, 2, 6\)\)",
    )
    step()  # and still works


def test_micro_batches_that_do_not_fit_are_refused():
    spawn(2, unlike_refusals)


def announced_otherwise(rank: int, world: int) -> None:
    parallel = ParallelConfig(pp_layers=(2, 2))
    pipeline = Pipeline(two_ladders(), TwoLadders.plan, make_mesh(parallel, "cpu"), parallel)
    told = outline(1, SHORT) | {"segments": (0, 3, 6)}
    pipeline.step(1, lambda i: pack(1, SHORT), lambda y, i: y.square().mean(), 1, lambda i: told)


def test_inputs_are_as_announced():
    with pytest.raises(RuntimeError, match=r"segments \(0, 2, 6\), but was announced as .* segments \(0, 3, 6\)"):
        spawn(2, announced_otherwise)


class Forgetful(TinyLadder):
    def layer(self, i: int, stream: Stream) -> Stream:
        return super().layer(i, stream)._replace(sequence=Sequence(stream.sequence.tokens, causal=i > 0))


def changes_facts(rank: int, world: int) -> None:
    parallel = ParallelConfig(pp_layers=(2, 2))
    pipeline = Pipeline(Forgetful(4).double(), TinyLadder.plan, make_mesh(parallel, "cpu"), parallel)
    batch = micro_batch(0, SHORT)
    same_error(lambda: pipeline(batch["tokens"], batch["t"]), r"layer 1 made .* only the stem makes shapes")


def test_only_the_stem_makes_facts():
    spawn(2, changes_facts)


def test_only_what_was_asked_for_last_is_kept():
    made, recent = [], Recent(2)
    for name in "abacab":
        assert recent.get(name, lambda name=name: made.append(name) or name.upper()) == name.upper()
    assert "".join(made) == "abcb"
