"""Questions are answered token by token under every layout as on one device."""

from types import SimpleNamespace

import torch
from torch import nn

from mm_models import build, plan
from mm_models.tokens import greedy
from mm_parallel import MemoryConfig, ParallelConfig, Pipeline, make_mesh, parallelize
from mm_parallel.testing import spawn

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
