"""Loss and every gradient of the sharded model against one device."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from mm_parallel import MemoryConfig, ParallelConfig, data_rank, finish_gradients, make_mesh, parallelize
from mm_parallel.testing import TinyLadder, assert_same_grads, gradients, spawn


def build(dtype: torch.dtype, compute_dtype: torch.dtype | None = None) -> TinyLadder:
    torch.manual_seed(0)
    return TinyLadder(compute_dtype=compute_dtype).to(dtype)


def batch(samples: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((samples, 6, 5), (samples, 3), (samples, 6, 5))
    tokens, t, target = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return tokens, t, target


def step(model: TinyLadder, data: tuple[Tensor, Tensor, Tensor], micro_batches: int = 1) -> Tensor:
    """Mean loss of the batch; gradients are left in the model."""
    total = torch.zeros((), dtype=data[0].dtype)
    for tokens, t, target in zip(*(part.chunk(micro_batches) for part in data), strict=True):
        loss = (model(tokens, t) - target).square().mean() / micro_batches
        loss.backward()
        total += loss.detach()
    return total


def compare(rank: int, world: int, replicate: int, recompute: str | int, micro_batches: int, dtype, gathered, rtol):
    compute = None if gathered is None or gathered == dtype else gathered
    data = batch(16, dtype)
    single = build(dtype, compute)
    expected = step(single, data, micro_batches * world)
    mesh = make_mesh(ParallelConfig(dp_replicate=replicate), "cpu")
    model = parallelize(build(dtype, compute), TinyLadder.plan, mesh, memory=MemoryConfig(recompute), dtype=gathered)
    index, size = data_rank(mesh)
    assert (index, size) == (rank, world)
    loss = step(model, tuple(part.chunk(size)[index] for part in data), micro_batches)
    finish_gradients(model, mesh)
    dist.all_reduce(loss, dist.ReduceOp.AVG)
    assert abs(loss / expected - 1) <= rtol, (loss, expected)
    assert set(dict(model.named_parameters())) == set(dict(single.named_parameters()))
    assert_same_grads(gradients(model), gradients(single), rtol)
    finish_gradients(model, mesh)  # a second call changes nothing
    assert_same_grads(gradients(model), gradients(single), rtol)


CASES = [  # world, replicate, recompute, micro-batches
    (2, 1, "none", 1),
    (2, 2, "none", 1),
    (2, 1, "full", 2),
    (4, 1, "none", 1),
    (4, 4, 1, 1),
    (4, 2, "none", 1),
    (4, 2, "full", 2),
]


def compare_all(rank: int, world: int) -> int:
    done = 0
    for ranks, replicate, recompute, micro_batches in CASES:
        if ranks == world:
            compare(rank, world, replicate, recompute, micro_batches, torch.float32, None, 1e-6)
            compare(rank, world, replicate, recompute, micro_batches, torch.float64, None, 1e-13)
            done += 1
    return done


def test_two_ranks_equal_one_device():
    assert spawn(2, compare_all) == [3, 3]


def test_four_ranks_equal_one_device():
    assert spawn(4, compare_all) == [4] * 4


def bf16_with_fp32_parameters(rank: int, world: int) -> None:
    compare(rank, world, 1, "none", 1, torch.float32, torch.bfloat16, 5e-3)  # sums of bf16 gradients in another order
    mesh = make_mesh(ParallelConfig(), "cpu")
    model = parallelize(build(torch.float32, torch.bfloat16), TinyLadder.plan, mesh, dtype=torch.bfloat16)
    seen = {}
    model.time[0].register_forward_pre_hook(lambda m, _: seen.update(time=m.weight.dtype))
    model.time[0].register_forward_hook(lambda m, _, out: seen.update(out=out.dtype))
    step(model, batch(2, torch.float32))
    assert seen == {"time": torch.float32, "out": torch.float32}
    for block in model.blocks:
        in_fp32 = {name for name, read in block.read.items() if read == torch.float32}
        assert in_fp32 == {"table", "norm.weight"}
        assert {read for name, read in block.read.items() if name not in in_fp32} == {torch.bfloat16}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_fp32_parameters_stay_so_inside_a_bf16_forward():
    spawn(2, bf16_with_fp32_parameters)


def collectives(rank: int, world: int, layers: int) -> dict[str, int]:
    torch.manual_seed(0)
    mesh = make_mesh(ParallelConfig(), "cpu")
    model = parallelize(TinyLadder(layers), TinyLadder.plan, mesh)
    tokens, t, target = batch(2, torch.float32)
    with warnings.catch_warnings(), CommDebugMode() as communication:
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # CommDebugMode's own
        (model(tokens, t) - target).square().mean().backward()
        finish_gradients(model, mesh)
    return {str(op).split(".")[-1]: count for op, count in communication.get_comm_counts().items()}


@pytest.mark.parametrize("layers", [2, 5])
def test_each_group_is_gathered_twice_and_reduced_once(layers):
    """For the forward and for the backward. A group: each layer, the time embedding, and the root's own."""
    groups = layers + 2
    counts = {"_allgather_base_": 2 * groups, "_reduce_scatter_base_": groups, "allreduce_": 1}
    assert spawn(2, collectives, layers) == [counts, counts]


def swapped(rank: int, world: int) -> None:
    model = parallelize(build(torch.float64), TinyLadder.plan, make_mesh(ParallelConfig(), "cpu"))
    tokens, t, _ = batch(2, torch.float64)
    parameters = list(model.parameters())  # as an optimizer or an EMA holds them
    with torch.no_grad():
        before = model(tokens, t)
        assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
        for parameter in parameters:
            parameter.mul_(2)
        after = model(tokens, t)
        torch.testing.assert_close(after, build(torch.float64).apply(double_own)(tokens, t), rtol=1e-12, atol=0)
    assert not torch.allclose(before, after)


def double_own(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.mul_(2)


def test_weights_written_between_evaluations_are_seen():
    spawn(2, swapped)


def unequal_weights(rank: int, world: int) -> None:
    torch.manual_seed(rank)
    parallelize(TinyLadder(), TinyLadder.plan, make_mesh(ParallelConfig(), "cpu"))


def test_ranks_with_different_weights_are_refused():
    with pytest.raises(
        RuntimeError, match=r"49 parameters differ between ranks \(first: embed.weight\): build the model"
    ):
        spawn(2, unequal_weights)


def unused_fp32(rank: int, world: int) -> tuple:
    mesh = make_mesh(ParallelConfig(), "cpu")
    model = parallelize(build(torch.float32), TinyLadder.plan, mesh)
    first, second, third = (block.table for block in model.blocks)
    first.grad = torch.full_like(first, 3.0) if rank == 0 else None
    second.grad = torch.full_like(second, float(rank))
    finish_gradients(model, mesh)
    return first.grad.mean().item(), second.grad.mean().item(), third.grad


def test_a_gradient_that_only_one_rank_has_counts_as_zero_elsewhere():
    assert spawn(2, unused_fp32) == [(1.5, 0.5, None)] * 2


def test_one_device_needs_no_process_group():
    plain, cut = build(torch.float64), build(torch.float64)
    mesh = make_mesh(ParallelConfig(), "cpu")
    assert mesh is None
    assert data_rank(mesh) == (0, 1)
    assert parallelize(cut, TinyLadder.plan, mesh, memory=MemoryConfig("full")) is cut
    assert list(cut.state_dict()) == list(plain.state_dict())
    data = batch(3, torch.float64)
    assert torch.equal(step(plain, data), step(cut, data))
    finish_gradients(cut, None)
    assert_same_grads(gradients(cut), gradients(plain), 0.0)
