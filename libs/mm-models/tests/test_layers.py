"""What several families share."""

from itertools import pairwise

import pytest
import torch

from mm_models.layers import Sequence, attention, core


@pytest.mark.parametrize("causal", [False, True])
def test_packed_samples_attend_as_apart(causal):
    q, k, v, weight = torch.randn(4, 2, 9, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ends = (0, 1, 5, 9)
    together = core(*inputs, Sequence(9, causal, ends))
    apart = torch.cat([attention(*(x[:, a:b] for x in inputs), causal) for a, b in pairwise(ends)], 1)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (together, apart)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(together, core(*inputs, Sequence(9, causal)))  # who sees whom matters


def test_causal_attention_sees_nothing_that_comes_later():
    q, k, v = torch.randn(3, 1, 6, 2, 4, generator=torch.Generator().manual_seed(0))
    before = core(q, k, v, Sequence(6, causal=True))
    k[:, 4:], v[:, 4:] = 0, 0
    after = core(q, k, v, Sequence(6, causal=True))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])
