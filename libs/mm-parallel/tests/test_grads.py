import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mm_parallel import ParallelConfig, clip_grad_norm, finish_gradients, forward_backward, make_mesh, parallelize
from mm_parallel.grads import by_layout
from mm_parallel.testing import TinyLadder, assert_same_grads, gradients, spawn
from mm_parallel.weights import allocate


def filled(model: nn.Module) -> nn.Module:
    """Every gradient has known values: of parameter i, all entries are i + 1."""
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, i + 1.0)
    return model


def double() -> TinyLadder:
    torch.manual_seed(0)
    return TinyLadder().double()


def clip_everywhere(rank: int, world: int, replicate: int, max_norm: float) -> None:
    single = filled(double())
    expected = nn.utils.clip_grad_norm_(single.parameters(), max_norm)
    model = filled(parallelize(double(), TinyLadder.plan, make_mesh(ParallelConfig(replicate), "cpu")))
    norm = clip_grad_norm(model, max_norm)
    assert type(norm) is torch.Tensor
    assert norm.item() == pytest.approx(expected.item(), rel=1e-14)
    assert_same_grads(gradients(model), gradients(single), 1e-14)


@pytest.mark.parametrize(("world", "replicate"), [(2, 1), (2, 2), (4, 2)])
def test_the_norm_over_sharded_and_replicated_is_that_of_one_device(world, replicate):
    spawn(world, clip_everywhere, replicate, 1.5)


def test_one_device_equals_torch():
    single, ours = filled(double()), filled(double())
    expected = nn.utils.clip_grad_norm_(single.parameters(), 0.25)
    assert clip_grad_norm(list(ours.parameters()), 0.25).item() == pytest.approx(expected.item(), rel=1e-14)
    assert_same_grads(gradients(ours), gradients(single), 1e-14)


def test_small_gradients_and_infinite_bounds_leave_gradients_alone():
    for bound in (1e9, math.inf):
        model = filled(double())
        assert 0 < clip_grad_norm(model, bound) < 1e4
        assert_same_grads(gradients(model), gradients(filled(double())), 0.0)


def test_no_gradient_is_norm_zero_and_nan_is_nan():
    model = double()
    assert clip_grad_norm(model, 1.0) == 0
    filled(model).embed.weight.grad[0, 0] = math.nan
    assert clip_grad_norm(model, 1.0).isnan()


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_a_bound_that_is_not_positive_is_refused(bound):
    with pytest.raises(ValueError, match="must be more than 0"):
        clip_grad_norm(filled(double()), bound)


def batch(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, 7, 5, generator=generator), torch.randn(samples, 3, generator=generator)


def test_losses_of_equal_weight_give_the_bits_of_their_mean():
    """Micro-batches of 2 samples: what a trainer without weights would do."""
    torch.manual_seed(0)
    ours, plain = TinyLadder(), TinyLadder()
    plain.load_state_dict(ours.state_dict())
    tokens, t = (x.split(2) for x in batch(8))
    found = forward_backward(
        ours, 4, lambda i: {"tokens": tokens[i], "t": t[i]}, lambda y, i: y.square().flatten(1).mean(1), total=8
    )
    for i in range(4):
        losses = plain(tokens[i], t[i]).square().flatten(1).mean(1)
        (losses.mean() / 4).backward()
        assert torch.equal(found[i], losses)
    assert_same_grads(gradients(ours), gradients(plain), 0.0)


LABELS = ((1, 6, 2), (7, 3, 1))  # label tokens of the conversations of each rank, one a micro-batch


def count_label_tokens(rank: int, world: int, replicate: int) -> None:
    """Every token's loss counts alike, though ranks and micro-batches have different numbers of them."""

    def losses(output: torch.Tensor, labels: int) -> torch.Tensor:
        return output[:, :labels].square().mean(2)  # one for each label token

    single, (tokens, t) = double(), (x.double() for x in batch(6))
    flat = [count for own in LABELS for count in own]
    every = [losses(single(tokens[i : i + 1], t[i : i + 1]), count) for i, count in enumerate(flat)]
    torch.cat(every, 1).mean().backward()
    mesh = make_mesh(ParallelConfig(replicate), "cpu")
    model, first = parallelize(double(), TinyLadder.plan, mesh), 3 * rank
    own = forward_backward(
        model,
        3,
        lambda i: {"tokens": tokens[first + i : first + i + 1], "t": t[first + i : first + i + 1]},
        lambda output, i: losses(output, LABELS[rank][i]),
        sum(flat),
        mesh,
    )
    finish_gradients(model, mesh)
    torch.testing.assert_close(torch.cat(own, 1), torch.cat(every[first : first + 3], 1), rtol=1e-12, atol=0)
    assert_same_grads(gradients(model), gradients(single), 1e-10)


@pytest.mark.parametrize("replicate", [1, 2])
def test_every_token_counts_alike(replicate):
    spawn(2, count_label_tokens, replicate)


def test_a_step_without_weight_is_refused():
    with pytest.raises(ValueError, match=r"the losses of this step weigh 0 together"):
        forward_backward(double(), 1, lambda i: {}, lambda output, i: output, total=0)


class Lists(TorchDispatchMode):
    """Counts the numbers of the host that become tensors: on a device the host would wait until they are there."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += "lift_fresh" in str(op)
        return op(*args, **(kwargs or {}))


def without_values(rank: int, world: int) -> int:
    """On tensors that have no values: whoever asks for one raises DataDependentOutputException."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    mesh = make_mesh(ParallelConfig(dp_replicate=2), "cpu")
    with torch.device("meta"):
        model = TinyLadder()
    parallelize(model, TinyLadder.plan, mesh)
    with FakeTensorMode(allow_non_fake_inputs=True):
        allocate(model, torch.device("cpu"))
        tokens, t = torch.randn(4, 7, 5), torch.randn(4, 3)
        forward_backward(model, 1, lambda i: {"tokens": tokens, "t": t}, lambda y, i: y.square(), 16.0, mesh)
        with Lists() as lists:
            finish_gradients(model, mesh)
            norm = clip_grad_norm(model, 1.0, mesh)
            groups = [{"params": parameters} for parameters in by_layout(model.parameters())]
            optimizer = torch.optim.AdamW(groups, fused=True)
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()
        with pytest.raises(DataDependentOutputException):
            float(norm)
        return lists.count


def test_between_backward_and_optimizer_the_host_waits_for_nothing():
    assert spawn(1, without_values) == [0]
