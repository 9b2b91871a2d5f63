import math

import pytest
import torch
from torch import nn

from mm_parallel import ParallelConfig, clip_grad_norm, make_mesh, parallelize
from mm_parallel.testing import TinyLadder, assert_same_grads, gradients, spawn


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
