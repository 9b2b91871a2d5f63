"""Tensor parallelism, alone and with sharded and replicated data: everything as on one device."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_parallel import (
    ParallelConfig,
    clip_grad_norm,
    data_rank,
    finish_gradients,
    load_parameters,
    make_mesh,
    parallelize,
)
from mm_parallel.grads import by_layout
from mm_parallel.testing import TinyLadder, assert_same_grads, gradients, spawn
from mm_parallel.testing.ladder import DIM, Linear
from mm_parallel.weights import full_tensors

PLAN = TinyLadder.plan


def build(dtype: torch.dtype = torch.float64, compute_dtype: torch.dtype | None = None) -> TinyLadder:
    torch.manual_seed(0)
    model = TinyLadder(2, compute_dtype)
    for block in model.blocks:
        block.up, block.down = Linear(DIM, 20), Linear(20, DIM)  # so that 4 ranks can share them
        for norm in (block.norm_q, block.norm_k):
            nn.init.normal_(norm.weight, 1, 0.3)  # ones would hide a wrong slice
    return model.to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((8, 6, 5), (8, 3), (8, 6, 5))
    tokens, t, target = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return tokens, t, target


def step(model: nn.Module, data: tuple[Tensor, Tensor, Tensor], mesh=None) -> Tensor:
    """Mean loss of the global batch; gradients are left in the model."""
    index, size = data_rank(mesh)
    tokens, t, target = (part.chunk(size)[index] for part in data)
    loss = (model(tokens, t) - target).square().mean()
    loss.backward()
    finish_gradients(model, mesh)
    loss = loss.detach()
    if mesh is not None:
        dist.all_reduce(loss, dist.ReduceOp.AVG)
    return loss


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": part} for part in by_layout(model.parameters())], lr=1e-2, eps=1e-4)


def train(model: nn.Module, data: tuple, steps: int, mesh=None) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    adam, curve = optimizer(model), []
    for _ in range(steps):
        loss = step(model, data, mesh)
        curve.append((loss.item(), clip_grad_norm(model, 0.5, mesh).item()))
        adam.step()
        adam.zero_grad()
    return curve


def whole(model: nn.Module) -> dict[str, Tensor]:
    return dict(full_tensors(model))


LAYOUTS = {
    2: [{"tp": 2}],
    4: [{"tp": 4}, {"tp": 2, "dp_shard": 2}, {"tp": 2, "dp_shard": 1, "dp_replicate": 2}],
}


def same_numbers(rank: int, world: int) -> int:
    for layout in LAYOUTS[world]:
        mesh, single, data = make_mesh(ParallelConfig(**layout), "cpu"), build(), batch()
        expected = step(single, data)
        model = parallelize(build(), PLAN, mesh)
        assert abs(step(model, data, mesh) / expected - 1) <= 1e-10
        assert_same_grads(gradients(model), gradients(single), 1e-10)
        norm = clip_grad_norm(single, 0.1)
        assert abs(clip_grad_norm(model, 0.1, mesh) / norm - 1) <= 1e-10
        assert_same_grads(gradients(model), gradients(single), 1e-10)

        single, model = build(), parallelize(build().to("meta"), PLAN, mesh)
        assert all(p.is_meta for p in model.parameters())
        load_parameters(model, single.state_dict(), torch.device("cpu"))
        assert {name: p.shape for name, p in model.named_parameters()} == shapes(single)
        torch.testing.assert_close(whole(model), whole(single), rtol=0, atol=0)
        torch.testing.assert_close(train(model, data, 3, mesh), train(single, data, 3), rtol=1e-9, atol=0)
        torch.testing.assert_close(whole(model), whole(single), rtol=1e-8, atol=1e-10)
    return len(LAYOUTS[world])


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


@pytest.mark.parametrize("world", [2, 4])
def test_loss_gradients_norm_and_three_steps_equal_one_device(world):
    assert spawn(world, same_numbers) == [len(LAYOUTS[world])] * world


def parts(rank: int, world: int) -> None:
    model = parallelize(build(), PLAN, make_mesh(ParallelConfig(tp=2), "cpu"))
    block, full = model.blocks[0], build().blocks[0]
    half = slice(6 * rank, 6 * rank + 6)
    assert torch.equal(block.q.weight.to_local(), full.q.weight[half])
    assert torch.equal(block.q.bias.to_local(), full.q.bias[half])
    assert torch.equal(block.o.weight.to_local(), full.o.weight[:, half])
    assert torch.equal(block.norm_q.weight.to_local(), full.norm_q.weight[half])
    assert not isinstance(block.o.bias, DTensor)
    held = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters() if isinstance(p, DTensor))
    assert held == 2 * 8 * (4 * DIM * DIM // 2 + 3 * DIM // 2 + 2 * DIM // 2 + DIM * 20 + 20 // 2)  # not the wholes

    heads = []
    model.core = lambda q, k, v, sequence: heads.append(q.shape[2]) or TinyLadder().core(q, k, v, sequence)
    step(model, batch())
    assert heads == [2, 2]
    for name, p in model.named_parameters():  # what is whole gets the same whole gradient, bit for bit
        if not isinstance(p, DTensor):
            both = [torch.empty_like(p.grad) for _ in range(2)]
            dist.all_gather(both, p.grad)
            assert torch.equal(*both), name


def test_each_rank_holds_its_heads_and_whole_parameters_stay_equal():
    spawn(2, parts)


def counted(rank: int, world: int) -> list[tuple[int, int]]:
    """(all-reduces, numbers in them) of a forward and of its backward."""
    model, (tokens, t, target) = parallelize(build(), PLAN, make_mesh(ParallelConfig(tp=2), "cpu")), batch()
    sums, reduce = [], dist.all_reduce
    dist.all_reduce = lambda x, **named: (sums.append(x.numel()), reduce(x, **named))
    try:
        loss = (model(tokens, t) - target).square().mean()
        forward = list(sums)
        loss.backward()
    finally:
        dist.all_reduce = reduce
    backward = sums[len(forward) :]
    return [(len(numbers), sum(numbers)) for numbers in (forward, backward)]


def test_what_is_sent_is_what_the_docstring_says():
    blocks, tokens = 2, 8 * 6
    columns, rows, norms = 4, 2, 2
    forward = (blocks * (rows + norms), blocks * tokens * (rows * DIM + norms))
    backward = (blocks * (columns + norms), blocks * tokens * (columns * DIM + norms))
    assert spawn(2, counted) == [[forward, backward]] * 2


def bf16(rank: int, world: int) -> None:
    mesh, data = make_mesh(ParallelConfig(tp=2), "cpu"), batch(torch.float32)
    plan = replace(PLAN, keep_fp32=(*PLAN.keep_fp32, "*.norm_q.weight", "*.down.*"))  # cut: FSDP leaves one replicated
    single, model = (build(torch.float32, torch.bfloat16) for _ in range(2))
    expected = step(single, data)
    parallelize(model, plan, mesh, dtype=torch.bfloat16)
    assert abs(step(model, data, mesh) / expected - 1) <= 2e-3
    assert_same_grads(gradients(model), gradients(single), 3e-2)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    if world == 4:
        assert model.blocks[0].norm_q.weight.device_mesh.mesh_dim_names == ("tp",)
        assert model.blocks[0].down.weight.device_mesh.mesh_dim_names == ("fsdp", "tp")


@pytest.mark.parametrize("world", [2, 4])
def test_bf16_is_the_same_up_to_rounding(world):
    spawn(world, bf16)


def replicated_fp32(rank: int, world: int) -> None:
    """Norms that FSDP ignores are DTensors of tp alone: `finish_gradients` averages them over the data."""
    plan, data = replace(PLAN, keep_fp32=(*PLAN.keep_fp32, "*.norm_q.weight")), batch()
    single = build()
    step(single, data)
    for layout in ({"dp_shard": 2}, {"dp_shard": 1, "dp_replicate": 2}):
        mesh = make_mesh(ParallelConfig(tp=2, **layout), "cpu")
        model = parallelize(build(), plan, mesh)
        assert model.blocks[0].norm_q.weight.device_mesh.mesh_dim_names == ("tp",)
        step(model, data, mesh)
        assert_same_grads(gradients(model), gradients(single), 1e-10)


def test_a_norm_that_is_kept_in_fp32_is_averaged_over_the_data():
    spawn(4, replicated_fp32)


def state(model: nn.Module, adam: torch.optim.Optimizer) -> dict:
    names = {p: name for name, p in model.named_parameters()}
    moments = {f"{names[p]}.{key}": value for p, kept in adam.state.items() for key, value in kept.items()}
    return model.state_dict() | moments


def saved(rank: int, world: int, folder: str) -> list[tuple[float, float]]:
    """tp 2 x dp 2 after two steps, with what two more give; then what one device made of it is loaded back."""
    mesh, data = make_mesh(ParallelConfig(tp=2), "cpu"), batch()
    model = parallelize(build(), PLAN, mesh)
    adam = optimizer(model)
    if not Path(folder, "back").exists():
        for _ in range(2):
            step(model, data, mesh)
            adam.step()
            adam.zero_grad()
        dcp.save(state(model, adam), checkpoint_id=f"{folder}/there")
    else:
        resume(model, adam, f"{folder}/back")
    return more(model, adam, data, mesh)


def more(model: nn.Module, adam: torch.optim.Optimizer, data: tuple, mesh=None) -> list[tuple[float, float]]:
    curve = []
    for _ in range(2):
        loss = step(model, data, mesh)
        curve.append((loss.item(), clip_grad_norm(model, float("inf"), mesh).item()))
        adam.step()
        adam.zero_grad()
    return curve


def resume(model: nn.Module, adam: torch.optim.Optimizer, folder: str) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()  # makes the moments
    adam.zero_grad()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    dcp.load(state(model, adam), checkpoint_id=folder, no_dist=not dist.is_initialized())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_goes_to_one_device_and_back(tmp_path):
    curves = spawn(4, saved, str(tmp_path))
    single = build()
    adam = optimizer(single)
    resume(single, adam, f"{tmp_path}/there")
    dcp.save(state(single, adam), checkpoint_id=f"{tmp_path}/back", no_dist=True)
    alone = more(single, adam, batch())
    assert curves == [curves[0]] * 4
    torch.testing.assert_close(alone, curves[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(spawn(4, saved, str(tmp_path))[0], curves[0], rtol=1e-9, atol=0)


def refused(rank: int, world: int) -> list[str]:
    mesh, said = make_mesh(ParallelConfig(tp=4), "cpu"), []
    odd, dressed = build(), build()
    odd.blocks[1].up = Linear(DIM, 10)
    dressed.blocks[0].v = nn.Identity()
    torch.manual_seed(rank)
    different = TinyLadder().to(torch.float64)
    for block in different.blocks:
        block.up, block.down = Linear(DIM, 20), Linear(20, DIM)
    cases = [
        (build(), replace(PLAN, columns=(), rows=(), norms=())),
        (build(), replace(PLAN, heads=6)),
        (odd, PLAN),
        (dressed, PLAN),
        (different, PLAN),
    ]
    for model, plan in cases:
        with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
            parallelize(model, plan, mesh)
        said.append(str(error.value))
        assert not any(isinstance(p, DTensor) for p in model.parameters())
    return said


def test_what_cannot_be_cut_is_refused_with_the_numbers_before_anything_is_cut():
    declares, heads, odd, dressed, different = spawn(4, refused)[0]
    assert declares == "tp=4: this model's plan declares no tensor parallelism; use tp=1"
    assert heads == "6 heads cannot be cut over tp=4: for this model tp can be 1, 2"
    assert odd == "10 columns of blocks.1.up cannot be cut over tp=4: for this model tp can be 1, 2"
    assert dressed == "plan: blocks.0.v is of type Identity; tp can only cut Linear there"
    assert "parameters differ between ranks (first: embed.weight)" in different
