"""What is worked out once for the same shapes is what the meta device makes each time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm_parallel.attention import attention
from mm_parallel.estimate.kernels import describe
from mm_parallel.estimate.operations import perform
from mm_parallel.estimate.peak import tensors_in


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


class Compared(TorchDispatchMode):
    """Runs each operation three times: as it is, when it is new to `perform`, and when it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        kernel = describe(op, args, kwargs, result)
        given = list(tensors_in((args, *kwargs.values())))
        for _ in range(2):
            again, same = perform(op, args, kwargs)
            assert same == kernel
            assert _facts(again, given) == _facts(result, given), op
        self.count += 1
        return result


def _facts(result, given: list[Tensor]) -> list[tuple]:
    """Of each tensor: which of those that were given it is, or in whose memory it lies."""
    storages = [x.untyped_storage() for x in given]
    return [type(result)] + [
        (
            *(x.shape, x.stride(), x.dtype, x.device, x.untyped_storage().nbytes()),
            [x is each for each in given],
            [x.untyped_storage() is each for each in storages],
        )
        for x in tensors_in(result)
    ]


def attend() -> Tensor:
    q, k = meta(2, 7, 4, 8, dtype=torch.bfloat16), meta(2, 9, 2, 8, dtype=torch.bfloat16)
    return attention(q, k, k)


@pytest.mark.parametrize(
    "make",
    [
        attend,
        lambda: F.layer_norm(meta(2, 3, 8), (8,), meta(8), meta(8)),
        lambda: F.gelu(F.linear(meta(2, 3, 8), meta(5, 8), meta(5)), approximate="tanh"),
        lambda: F.conv3d(meta(2, 3, 4, 6, 6), meta(8, 3, 1, 2, 2), stride=(1, 2, 2)).flatten(2).transpose(1, 2),
        lambda: F.cross_entropy(meta(5, 9), meta(5, dtype=torch.int64)),
        lambda: F.embedding(meta(2, 3, dtype=torch.int64), meta(9, 4)),
        lambda: torch.cat(meta(6, 4).t().contiguous().t().chunk(2)).clone().mul_(meta(4)),
        lambda: torch.where(meta(6, 1, dtype=torch.bool), meta(6, 4).to(torch.bfloat16), 1.0),
        lambda: meta(6, 4).expand(3, 6, 4) * meta(4).sin() + torch.stack((meta(6, 4),) * 3),
        lambda: (meta(6, 4).exp() / 2).masked_fill_(meta(6, 4, dtype=torch.bool), 0),
        lambda: torch.arange(3, device="cpu").to("meta") * meta(3),
        lambda: meta(3, dtype=torch.int64) * 2 + meta(3, dtype=torch.int64) * 2.0 + meta(1),
    ],
)
def test_operations_make_the_same_again(make):
    with Compared() as compared:
        make().float().square().sum().backward()
    assert compared.count > 5


def test_a_tensor_that_is_turned_in_place_is_turned():
    x = meta(6, 4).detach()
    for shape in ((4, 6), (6, 4)):
        assert perform(torch.ops.aten.t_.default, (x,), {}) == (x, None)
        assert x.shape == shape


def test_one_tensor_twice_is_not_two():
    """It is read once."""
    x, y = meta(6, 4).detach(), meta(6, 4).detach()
    twice, two = (perform(torch.ops.aten.mul.Tensor, args, {})[1] for args in ((x, x), (x, y)))
    assert (twice.bytes_read, two.bytes_read) == (96, 192)
