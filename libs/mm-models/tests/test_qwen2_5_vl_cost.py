"""What Qwen2.5-VL costs, against torch's own count and against a table of the released sizes."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mm_models import build, preset
from mm_models.qwen2_5_vl.cost import Cost, Trained, Work, forward_flops, measure, train_flops

# 1024 tokens in one sample, with an image of 504 x 504 pixels: TFLOPs of the tower, of the layers' products, of their
# attention (the whole square), of the head for every token, and of a step whose tower and merger are frozen, with the
# whole square.
RELEASED = {
    "3b": (1.71, 5.68, 0.31, 0.64, 21.59),
    "7b": (1.71, 13.36, 0.42, 1.12, 46.41),
    "32b": (1.73, 63.91, 1.37, 1.59, 202.36),
    "72b": (1.74, 143.80, 2.75, 2.55, 449.03),
}
FROZEN = Trained(tower=0, merger=0, tower_flows=False, merger_flows=False)


@pytest.mark.parametrize("size", RELEASED)
def test_released(size):
    config = preset(f"qwen2.5-vl-{size}")
    work = Work(1024, 1024**2 / 2, 1296, 1296**2, 1024)
    forward = forward_flops(config, work)
    step = train_flops(config, work._replace(pairs=1024**2), FROZEN)
    tower = forward.tower + forward.tower_attention + forward.merger
    found = (tower, forward.layers, 2 * forward.layers_attention, forward.head, step)
    assert [number / 1e12 for number in found] == pytest.approx(RELEASED[size], abs=0.006, rel=2e-4)


def test_as_torch_counts():
    """Of whole windows, and of squares where torch counts causal attention as such."""
    model = build("qwen2.5-vl-tiny", device="meta")
    grids, length = ((1, 16, 8), (2, 8, 8)), 80
    patches = 256
    with FlopCounterMode(display=False) as counter:
        model(
            torch.zeros(1, length, dtype=torch.long, device="meta"),
            torch.zeros(3, 1, length, dtype=torch.long, device="meta"),
            torch.zeros(patches, 1176, device="meta"),
            grids,
        )
    work = measure((0, length), grids, rows=length)
    assert work == Work(length, length**2 / 2, patches, 128**2 + 2 * 64**2, length)
    forward = forward_flops(model.config, work)
    assert counter.get_total_flops() == sum(forward) + forward.layers_attention


def batch(*lengths: int, grids=((1, 4, 4),)) -> dict[str, torch.Tensor]:
    ends = torch.tensor([[0, *lengths]]).cumsum(1)
    labels = torch.full((1, sum(lengths)), -100)
    labels[:, :5] = 1
    return {"segments": ends, "grid_thw": torch.tensor([grids]).reshape(1, -1, 3), "labels": labels}


def test_of_a_pack():
    """Each sample attends to itself alone; the head works where there are labels; an empty pack costs nothing."""
    model = build("qwen2.5-vl-tiny", device="meta")
    cost = Cost(model)
    tokens, flops = cost(batch(30, 10))
    assert tokens == 40
    assert flops == 3 * sum(forward_flops(model.config, Work(40, (900 + 100) / 2, 16, 256, 5)))
    assert cost(batch(40))[1] > flops
    assert cost(batch(40, grids=()))[1] < flops
    assert cost(batch(grids=())) == (0, 0)


def test_of_a_conversation_by_its_size():
    """As a pack of it alone; where labels were not counted, the head works on every token."""
    cost = Cost(build("qwen2.5-vl-tiny", device="meta"))
    size = SimpleNamespace(tokens=40, patches=16, label_tokens=5, squares=256)
    assert cost.weigh(size) == cost(batch(40))[1]
    head = forward_flops(cost.config, Work(0, 0, rows=1)).head
    assert cost.weigh(SimpleNamespace(**vars(size) | {"label_tokens": None})) == cost(batch(40))[1] + 3 * 35 * head


def test_what_is_frozen_costs_less():
    """Parts, then layers: those below the first trained one have no backward."""
    model = build("qwen2.5-vl-tiny", device="meta")
    config, work, tensors = model.config, measure((0, 40), ((1, 4, 4),), 5), batch(40)
    f = forward_flops(config, work)
    tower = f.tower + f.tower_attention + f.merger
    language = f.layers + f.layers_attention + f.head

    def cost() -> float:
        return Cost(model)(tensors)[1]

    model.visual.patch_embed.requires_grad_(False)
    model.visual.blocks.requires_grad_(False)
    assert cost() == pytest.approx(f.tower + f.tower_attention + 3 * f.merger + 3 * language)
    model.visual.merger.requires_grad_(False)
    assert cost() == pytest.approx(tower + 3 * language)
    model.lm_head.requires_grad_(False)
    assert cost() == pytest.approx(tower + 3 * (f.layers + f.layers_attention) + 2 * f.head)
    model.model.embed_tokens.requires_grad_(False)
    model.layers[:3].requires_grad_(False)
    assert cost() == pytest.approx(tower + 1.5 * (f.layers + f.layers_attention) + 2 * f.head)
    model.requires_grad_(False)
    model.visual.requires_grad_(True)
    assert cost() == pytest.approx(3 * tower + 2 * f.layers + 3 * f.layers_attention + 2 * f.head)


def test_adapters_are_left_out():
    pytest.importorskip("peft")
    from mm_models.lora import LoRAConfig, add_lora

    model = add_lora(build("qwen2.5-vl-tiny", device="meta"), LoRAConfig(rank=2))
    f = forward_flops(model.config, measure((0, 40), ((1, 4, 4),), 5))
    expected = f.tower + f.tower_attention + f.merger + 2 * (f.layers + f.head) + 3 * f.layers_attention
    assert Cost(model)(batch(40))[1] == pytest.approx(expected)
