"""Wan under tensor parallelism, with and without adapters: loss and every gradient as on one device."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_models import build, plan
from mm_models.lora import LoRAConfig, add_lora
from mm_models.wan import WanModel
from mm_parallel import (
    ParallelConfig,
    clip_grad_norm,
    data_rank,
    finish_gradients,
    load_parameters,
    make_mesh,
    parallelize,
)
from mm_parallel.testing import assert_same_grads, gradients, spawn
from mm_parallel.weights import full_tensors

TEXT_TO_VIDEO = {}
IMAGE_TO_VIDEO = {"in_channels": 36, "image_dim": 24, "image_tokens": 257}
EVERYWHERE = LoRAConfig(rank=3, alpha=6, targets=("q", "k", "v", "o", "ffn.0", "ffn.2"))
SAMPLES = 4


def tiny(variant: dict, lora: LoRAConfig | None, device: str = "cpu") -> WanModel:
    model = build(
        "wan-tiny", device="meta", dtype=torch.float64, dim=48, ffn_dim=80, num_heads=4, num_layers=2, **variant
    )
    if lora:
        add_lora(model, lora).to(torch.float64)  # adapters are float32 otherwise, and so are their gradients
    if device != "meta":
        load_parameters(model, weights(model), torch.device(device))
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Not the published initialisation, whose zeros would hide gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {
        name: 0.15 * torch.randn(shape, generator=generator, dtype=torch.float64) + name.endswith("norm.weight")
        for name, shape in shapes.items()
    }


def batch(model: WanModel) -> dict[str, Tensor]:
    generator, c = torch.Generator().manual_seed(1), model.config
    shapes = {"video": (SAMPLES, c.in_channels, 3, 4, 6), "text": (SAMPLES, 7, c.text_dim)}
    shapes["target"] = (SAMPLES, c.out_channels, 3, 4, 6)
    if c.image_dim:
        shapes["image"] = (SAMPLES, c.image_tokens, c.image_dim)
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return drawn | {"t": torch.tensor([3.0, 250.5, 600.0, 999.0])}


def step(model: WanModel, samples: dict[str, Tensor], mesh=None) -> Tensor:
    index, size = data_rank(mesh)
    inputs = {name: tensor.chunk(size)[index] for name, tensor in samples.items()}
    target = inputs.pop("target")
    loss = (model(**inputs) - target).square().mean()
    loss.backward()
    finish_gradients(model, mesh)
    loss = loss.detach()
    if mesh is not None:
        dist.all_reduce(loss, dist.ReduceOp.AVG)
    return loss


def compare(rank: int, world: int, variant: dict, lora: LoRAConfig | None) -> int:
    single = tiny(variant, lora)
    data = batch(single)
    expected = step(single, data)
    want = {name: grad.clone() for name, grad in gradients(single).items()}
    norm = clip_grad_norm(single, 0.1)
    for device in ("cpu", "meta"):
        mesh = make_mesh(ParallelConfig(tp=min(world, 4) if device == "cpu" else 2), "cpu")
        model = tiny(variant, lora, device)
        parallelize(model, plan(model), mesh)
        if device == "meta":
            load_parameters(model, weights(single), torch.device("cpu"))
        loss = step(model, data, mesh)
        assert abs(loss / expected - 1) <= 1e-10, (loss, expected)
        assert_same_grads(gradients(model), want, 1e-10)
        assert abs(clip_grad_norm(model, 0.1, mesh) / norm - 1) <= 1e-10
        for name, tensor in full_tensors(model):
            assert torch.equal(tensor, single.state_dict()[name]), name
    return len(want)


@pytest.mark.parametrize("variant", [TEXT_TO_VIDEO, IMAGE_TO_VIDEO])
def test_two_ranks_equal_one_device(variant):
    spawn(2, compare, variant, None)


def test_four_ranks_alone_and_with_sharded_data_equal_one_device():
    spawn(4, compare, IMAGE_TO_VIDEO, None)


@pytest.mark.parametrize(("world", "variant"), [(2, IMAGE_TO_VIDEO), (4, TEXT_TO_VIDEO)])
def test_adapters_on_columns_and_rows_equal_one_device(world, variant):
    pytest.importorskip("peft")
    # 2 blocks of 4 + 4 + 2 linears, A and B each
    assert spawn(world, compare, variant, EVERYWHERE, timeout=120) == [2 * 10 * 2] * world


def dropout(rank: int, world: int) -> None:
    model = add_lora(tiny(TEXT_TO_VIDEO, None), LoRAConfig(rank=3, dropout=0.1, targets=("o",)))
    parallelize(model, plan(model), make_mesh(ParallelConfig(tp=2), "cpu"))


def test_adapters_that_drop_out_are_refused():
    pytest.importorskip("peft")
    with pytest.raises(RuntimeError, match=r"adapter of blocks.0.self_attn.o has dropout, .*: use dropout 0, or tp=1"):
        spawn(2, dropout, timeout=120)
