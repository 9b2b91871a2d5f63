"""Kernels are counted by running them: FLOPs are torch's, bytes are what must move."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mm_parallel.attention import attention
from mm_parallel.attention import core as our_core
from mm_parallel.estimate.kernels import FORMULAS, Kernel, KernelCounter
from mm_parallel.testing import TinyLadder


def count(run) -> list[Kernel]:
    with KernelCounter() as counter:
        run()
    return counter.kernels


def moved(run) -> tuple[int, int]:
    kernels = count(run)
    return sum(k.bytes_read for k in kernels), sum(k.bytes_written for k in kernels)


X = torch.randn(6, 4)  # 96 bytes


@pytest.mark.parametrize(
    ("run", "read", "written"),
    [
        (lambda: X.view(4, 6).t().detach()[1:].expand(3, 5, 4), 0, 0),
        (lambda: X.clone().unsqueeze_(0), 96, 96),
        (lambda: torch.empty(5), 0, 0),
        (lambda: torch.empty_like(X), 0, 0),
        (lambda: torch.zeros(5), 0, 20),
        (lambda: torch.zeros_like(X), 0, 96),
        (lambda: X + 1, 96, 96),
        (lambda: X * X, 96, 96),
        (lambda: X + X[:1], 96 + 16, 96),
        (lambda: X + X[:1].expand(6, 4), 96 + 16, 96),
        (lambda: X.clone().add_(X), 96 + 2 * 96, 96 + 96),
        (lambda: torch.empty(6, 4).copy_(X[:1]), 16, 96),
        (lambda: X.to(torch.bfloat16), 96, 48),
        (lambda: X.t().contiguous(), 96, 96),
        (lambda: torch.add(X, X[:1], out=torch.empty(6, 4)), 96 + 16, 96),
        (lambda: F.embedding(torch.tensor([[1, 1, 5]]), X), 3 * 8 + 3 * 16, 3 * 16),
        (lambda: X[torch.tensor([1, 3])], 2 * 8 + 2 * 16, 2 * 16),
        (lambda: X.clone().index_add_(0, torch.tensor([1, 3]), X[:2]), 96 + 16 + 2 * 32, 96 + 32),
        (lambda: torch.cat((X, X[:2])), 96 + 32, 128),
        (lambda: X.sum(0), 96, 16),
        (lambda: F.linear(X, torch.ones(2, 4), torch.zeros(2)), 96 + 32 + 8, 32 + 8 + 48),
        (lambda: torch._foreach_add_([X.clone()], [X]), 96 + 192, 192),
    ],
)
def test_bytes_are_what_must_move(run, read, written) -> None:
    assert moved(run) == (read, written)


def test_kernels_say_what_they_are() -> None:
    q = torch.randn(2, 7, 4, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    k = torch.randn(2, 9, 2, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    linear, attend, *_ = count(
        lambda: (F.linear(q, torch.empty(3, 8, dtype=q.dtype, device="meta")), attention(q, k, k))
    )
    products = 2 * 2 * 2 * 7 * 9 * 4 * 8
    assert (linear.kind, linear.dtype, linear.flops) == ("gemm", torch.bfloat16, 2 * 2 * 7 * 4 * 8 * 3)
    assert (attend.kind, attend.op, attend.flops) == ("attention", "mm_parallel.attention", products)
    assert attend.bytes_read == 2 * (2 * 7 * 4 * 8 + 2 * 9 * 2 * 8)  # k and v are one tensor here
    assert attend.bytes_written == 2 * 2 * 7 * 4 * 8 + 4 * 2 * 4 * 7  # and the log-sum-exp
    with KernelCounter() as counter:
        attention(q, q, q, True).backward(torch.empty_like(q))
    forward, backward = (kernel for kernel in counter.kernels if kernel.kind == "attention")
    assert forward.shape == backward.shape == (4, 4, 8, 7, 7, False, True)
    assert 2 * backward.flops == 5 * forward.flops
    assert backward.bytes_written == 3 * 2 * q.numel()


def test_packed_samples_count_the_pairs_within() -> None:
    q = torch.randn(1, 9, 2, 8)
    (kernel,) = [k for k in count(lambda: attention(q, q, q, segments=(0, 3, 9))) if k.kind == "attention"]
    assert kernel.flops == 2 * 2 * 2 * 8 * (3**2 + 6**2)


def run(model: nn.Module) -> None:
    model(torch.randn(2, 7, 5), torch.randn(2, 3)).sum().backward()


@pytest.mark.parametrize("seam", ["plain", "ours"])
@pytest.mark.parametrize("fields", [{}, {"causal": True, "shared": 2}, {"segments": (0, 3, 7)}])
def test_flops_are_those_of_torch(seam: str, fields: dict) -> None:
    model = TinyLadder(**fields)
    if seam == "ours":
        model.core = our_core
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as known:
        run(model)
    assert sum(kernel.flops for kernel in count(lambda: run(model))) == known.get_total_flops() > 0
    with FakeTensorMode():
        fake = TinyLadder(**fields)
        fake.core = model.core if seam == "ours" else fake.core
        assert sum(kernel.flops for kernel in count(lambda: run(fake))) == known.get_total_flops()


def test_our_formulas_are_the_products_that_plain_torch_makes() -> None:
    """As torch counts them where attention is two products and a softmax, and four in the backward, not five."""
    model = TinyLadder()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as plain:
        run(model)
    kernels = count(lambda: run(model))
    again = sum(k.flops for k in kernels if k.op.endswith("_backward") and k.kind == "attention") // 5
    assert again > 0
    assert sum(k.flops for k in kernels) - again == plain.get_total_flops()
