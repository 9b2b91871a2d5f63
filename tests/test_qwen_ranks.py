"""Conversations over ranks: answers under every layout, and the loss of a step, as on one device."""

from types import SimpleNamespace

import torch
from torch import nn

from mm_models import build, plan
from mm_models.tokens import IGNORED, NextToken, greedy
from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    Pipeline,
    finish_gradients,
    forward_backward,
    make_mesh,
    parallelize,
)
from mm_parallel.testing import assert_same_grads, gradients, spawn

LAYOUTS = {
    "fsdp": {"dp_shard": 2},
    "tensor": {"dp_shard": 1, "tp": 2},
    "ulysses": {"dp_shard": 1, "ulysses": 2},
    "ring": {"dp_shard": 1, "ring": 2},
    "pipeline": {"dp_shard": 1, "pp_layers": [2, 2]},
    "virtual pipeline": {"dp_shard": 1, "pp_layers": [[1, 1], [1, 1]]},
}


def model() -> nn.Module:
    """With weights that do not answer with one token for ever."""
    built = build("qwen2.5-vl-tiny", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in built.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.3 * values + name.endswith("norm.weight")
    return built.eval()


def question(length: int, patches: int, seed: int) -> SimpleNamespace:
    """An image of two rows of patches after the second token, or none."""
    draw, tokens = torch.Generator().manual_seed(seed), patches // 4
    ids = torch.randint(0, 256, (length,), generator=draw)
    ids[2 : 2 + tokens] = 268  # the mark of an image, of this preset
    columns = torch.arange(tokens)
    image = torch.stack([torch.full_like(columns, 2), torch.full_like(columns, 2), 2 + columns])
    after = torch.arange(length - 2 - tokens) + 2 + max(tokens, 0)
    positions = torch.cat([torch.arange(2).expand(3, -1), image, after.expand(3, -1)], 1)
    grids = torch.tensor([[1, 2, patches // 2]] if patches else []).view(-1, 3).long()
    pixels = torch.randn(patches, 1176, generator=draw, dtype=torch.float64)
    return SimpleNamespace(input_ids=ids, position_ids=positions, pixel_values=pixels, grid_thw=grids)


QUESTIONS = [question(7, 8, 1), question(3, 0, 2), question(12, 16, 3)]
MOST = 4


def answer(rank: int, world: int) -> None:
    free = greedy(model(), QUESTIONS, MOST, ())
    stop = {free[1][1]}
    wanted = greedy(model(), QUESTIONS, MOST, stop)
    assert len({len(one) for one in wanted}) > 1, "the answers must end at different places"
    assert len({token for one in free for token in one}) > 4, "the answers must differ"
    for name, layout in LAYOUTS.items():
        config = ParallelConfig(**layout).resolve(world)
        mesh = make_mesh(config, "cpu")
        cut = model()
        how = (plan(cut), mesh, config, MemoryConfig(), torch.float64)
        run = Pipeline(cut, *how) if config.pp_layers else parallelize(cut, *how)
        assert greedy(run, QUESTIONS, MOST, stop) == wanted, name


def test_answers_are_those_of_one_device():
    spawn(2, answer, timeout=180)


def pack(*numbers: int) -> dict[str, torch.Tensor]:
    """Conversations of these numbers. Of the last one no token is trained, and only the first has an image."""
    asked = [question(6, 8, 1), question(11, 0, 2), question(4, 0, 3), question(9, 0, 4)]
    parts, draw = [asked[number] for number in numbers], torch.Generator().manual_seed(5)
    labels = [torch.randint(0, 256, (len(one.input_ids),), generator=draw) for one in asked]
    for one, trained in zip(labels, (2, 9, 0, 4), strict=True):
        one[: len(one) - trained] = IGNORED
    lengths = torch.tensor([0, *(len(one.input_ids) for one in parts)])
    return {
        "input_ids": torch.cat([one.input_ids for one in parts])[None],
        "labels": torch.cat([labels[number] for number in numbers])[None],
        "position_ids": torch.cat([one.position_ids for one in parts], 1)[None],
        "segments": lengths.cumsum(0)[None],
        "pixel_values": torch.cat([one.pixel_values for one in parts])[None],
        "grid_thw": torch.cat([one.grid_thw for one in parts])[None],
    }


def learn(rank: int, world: int) -> None:
    """One rank with four micro-batches, and two with two, also where one has no image and other packs."""
    for objective in (NextToken(), NextToken("micro_batch"), NextToken("sample")):
        total = float(objective.weigh(pack(0, 1, 2, 3)).sum())

        def step(model: nn.Module, packs: list, mesh: object, objective=objective, total=total) -> torch.Tensor:
            losses = forward_backward(
                model,
                len(packs),
                lambda i: objective.inputs(packs[i]),
                lambda output, i: objective.losses(output, packs[i]),
                total,
                mesh,
            )
            finish_gradients(model, mesh)
            return torch.cat(losses).sum() / total

        single = model().train()
        loss = step(single, [pack(0), pack(1), pack(2), pack(3)], None)
        expected = gradients(single)
        for dealt in (((0,), (1,)), ((2,), (3,))), (((0, 3),), ((1, 2),)):
            cut, config = model().train(), ParallelConfig(dp_shard=world).resolve(world)
            mesh = make_mesh(config, "cpu")
            parallelize(cut, plan(cut), mesh, config, MemoryConfig(), torch.float64)
            own = step(cut, [pack(*numbers) for numbers in dealt[rank]], mesh)
            torch.distributed.all_reduce(own)
            torch.testing.assert_close(own, loss, rtol=1e-9, atol=0)
            assert_same_grads(gradients(cut), expected, 1e-8)


def test_a_step_is_that_of_one_device():
    spawn(2, learn, timeout=180)
