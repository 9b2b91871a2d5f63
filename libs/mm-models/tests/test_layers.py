"""What several families share."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mm_models import layers, varlen
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ends", [None, (0, 9), (0, 1, 2, 5, 8, 9), (0, 3, 6, 9)])
@pytest.mark.parametrize("shared", [1, 2, 6])
def test_heads_of_keys_are_shared(causal, ends, shared):
    """As though every head of queries had its own: values, and gradients summed over those that share."""
    generator = torch.Generator().manual_seed(shared)
    shapes = ((2, 9, heads, 5) for heads in (6, shared, shared, 6))
    q, k, v, weight = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = core(*inputs, Sequence(9, causal, ends))
    whole = [x.repeat_interleave(6 // shared, 2) for x in (k, v)]
    samples = [[x[:, a:b].transpose(1, 2) for x in (q, *whole)] for a, b in pairwise(ends or (0, 9))]
    apart = [F.scaled_dot_product_attention(*sample, is_causal=causal).transpose(1, 2) for sample in samples]
    wanted = torch.cat(apart, 1)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-14)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), inputs) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("head_dim", [64, 12])
def test_a_pack_on_cuda_is_one_call_of_flash(head_dim, shared):
    """On fake tensors: how it is called, and the shape of its result. Not its values, and without a backward."""
    with FakeTensorMode():
        shapes = ((2, 40, heads, head_dim) for heads in (6, shared, shared))
        inputs = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        with Calls() as calls:
            out = core(*inputs, Sequence(40, True, (0, 3, 4, 40)))
    assert (out.shape, out.dtype) == (inputs[0].shape, torch.bfloat16)
    assert calls.attention == ["torch_attn._varlen_attn.default"]


def declared(q, k, v, ends, ends_k, longest, longest_k, *, scale, window_size, **shared):
    """As torch describes its kernel: T H h, samples part at `ends`."""
    assert ends is ends_k
    assert (ends.dtype, longest, longest_k, shared) == (torch.int32, ends.diff().max(), longest, varlen.SHARED_HEADS)
    assert window_size in ((-1, 0), (-1, -1))
    assert q.shape[-1] % 8 == 0
    outs = []
    for a, b in pairwise(ends.tolist()):
        sample = (x[a:b].transpose(0, 1) for x in (q, k, v))
        how = {"scale": scale, "is_causal": window_size == (-1, 0), "enable_gqa": True}
        outs.append(F.scaled_dot_product_attention(*sample, **how).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("causal", [False, True])
def test_a_pack_goes_to_the_kernel_of_cuda_and_back(causal, monkeypatch):
    """Two rows of samples, a head of 5 elements: a stand-in with the kernel's declaration gives what was asked for."""
    monkeypatch.setattr(varlen, "varlen_attn", declared)
    q, k, v = (torch.randn(2, 9, heads, 5, dtype=torch.float64) for heads in (6, 2, 2))
    sequence = Sequence(9, causal, (0, 1, 5, 9))
    wanted = core(q, k, v, sequence)
    monkeypatch.setattr(layers, "_has_flash", lambda q: True)
    torch.testing.assert_close(core(q, k, v, sequence), wanted, rtol=1e-12, atol=1e-14)


class Calls(TorchDispatchMode):
    """Notes what computes attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "att" in str(func):
            self.attention.append(str(func))
        return func(*args, **(kwargs or {}))


def test_shared_heads_with_a_mask():
    q, k = torch.randn(2, 4, 6, 5), torch.randn(2, 7, 2, 5)
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    whole = k.repeat_interleave(3, 2)
    torch.testing.assert_close(attention(q, k, k, mask=mask), attention(q, whole, whole, mask=mask))
    with pytest.raises(ValueError, match="attention of 6 heads of queries and 4 of keys"):
        attention(q, torch.randn(2, 7, 4, 5), torch.randn(2, 7, 4, 5))


@pytest.mark.parametrize("ends", [None, (0,)])
def test_no_token_at_all(ends):
    q, k, v = (torch.randn(1, 0, heads, 5).requires_grad_() for heads in (6, 2, 2))
    out = core(q, k, v, Sequence(0, True, ends))
    out.sum().backward()
    assert [x.shape for x in (out, k.grad)] == [(1, 0, 6, 5), (1, 0, 2, 5)]


def test_causal_attention_sees_nothing_that_comes_later():
    q, k, v = torch.randn(3, 1, 6, 2, 4, generator=torch.Generator().manual_seed(0))
    before = core(q, k, v, Sequence(6, causal=True))
    k[:, 4:], v[:, 4:] = 0, 0
    after = core(q, k, v, Sequence(6, causal=True))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_masked_keys_are_left_out():
    """As though they were not there: sample by sample, values and gradients."""
    q, k, v, weight = torch.randn(4, 3, 9, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.tensor([[True] * 5 + [False] * 4, [False, True, True] * 3, [True] * 9])
    together = core(*inputs, Sequence(9), mask)
    samples = [(q[i : i + 1], k[i : i + 1, mask[i]], v[i : i + 1, mask[i]]) for i in range(3)]
    apart = torch.cat([attention(*sample) for sample in samples])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-14)
    grads, wanted = (torch.autograd.grad((out * weight).sum(), inputs) for out in (together, apart))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert not any(grad[~mask].any() for grad in grads[1:])
    assert torch.equal(core(*inputs, Sequence(9), mask), attention(*inputs, mask=mask))


def test_a_query_that_sees_nothing_gives_zero():
    q, k, v = torch.randn(3, 2, 6, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[False] * 6, [True] * 6])
    out = attention(q, k, v, mask=mask)
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    assert not out[0].any()
    assert not grad[0].any()
    assert grad.isfinite().all()


def test_a_mask_is_not_combined():
    q, k, v = torch.randn(3, 1, 6, 2, 4)
    mask = torch.ones(1, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="causal attention with a mask of keys"):
        core(q, k, v, Sequence(6, causal=True), mask)
    with pytest.raises(ValueError, match="packed samples with a mask of keys"):
        core(q, k, v, Sequence(6, segments=(0, 3, 6)), mask)


PAIRS = {"neighbours": ((-1, 2), -1), "halves": ((2, -1), -2), "halves of thirds": ((3, 2, -1), -2)}


@pytest.mark.parametrize(("shape", "dim"), PAIRS.values(), ids=PAIRS)
def test_pairs_are_turned(shape, dim):
    """As complex numbers are, by code that is run and by code that is compiled; and back by the backward."""
    x = torch.randn(2, 5, 3, 12, dtype=torch.float64, requires_grad=True)
    a, b = x.unflatten(-1, shape).unbind(dim)
    angles = torch.randn(5, 1, *a.shape[3:], dtype=torch.float64)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.stack((turned.real, turned.imag), dim).flatten(3)

    def turn(x):
        return layers.rotate(x, angles.cos(), angles.sin(), shape, dim)

    for function in (turn, torch.compile(turn, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(function(x), wanted, rtol=1e-14, atol=1e-14)
        (grad,) = torch.autograd.grad(function(x), x, torch.ones_like(x))
        torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), x, retain_graph=True)[0])
    assert torch.autograd.gradcheck(turn, x)
    low = turn(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(
        low, layers.rotate(x.bfloat16().double(), angles.cos(), angles.sin(), shape, dim).bfloat16()
    )


@pytest.mark.parametrize("shape", [(2, 1, 8), (2, 5, 8)], ids=["of a sample", "of a token"])
def test_modulation_and_gate_have_the_gradients_of_autograd(shape):
    """Of several samples, where their backward is our own; in float32 they keep x, y and numbers of rows alone."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 5, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    a, b = (torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    norm = layers.LayerNorm(8, 1e-6, elementwise_affine=False)
    wanted = F.layer_norm(x, (8,), eps=1e-6) * (1 + b) + a
    torch.testing.assert_close(layers.modulate(norm, x, a, b), wanted, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x, a, b: layers.modulate(norm, x, a, b), (x, a, b))
    torch.testing.assert_close(layers.gated(x, a, y), x + a * y, rtol=1e-15, atol=1e-15)
    assert torch.autograd.gradcheck(layers.gated, (x, a, y))


def test_norm_in_bfloat16_is_rounded_once():
    """Statistics and product are float32; masters give what rounded weights give, and get a gradient in float32."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = layers.RMSNorm(32, 1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    rounded = norm.weight.detach().bfloat16()
    y = x.double()
    wanted = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * rounded.double()
    torch.testing.assert_close(norm(x), wanted.bfloat16(), rtol=2**-8, atol=0)
    assert (norm(x) == wanted.bfloat16()).float().mean() > 0.999
    assert torch.equal(norm(x), layers._RMSNorm.apply(x, rounded, 1e-6))
    norm(x).sum().backward()
    torch.testing.assert_close(norm.weight.grad, (wanted / rounded.double()).sum(0).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("word", ["none", "checkpoint"])
def test_what_is_made_again_is_not_kept_and_changes_no_gradient(word):
    """Also where other hooks are around it, which a second pair would hide; and where the graph is walked twice."""
    torch.manual_seed(0)
    down, x = torch.nn.Linear(6, 3), torch.randn(2, 5, 6, requires_grad=True)
    wanted = torch.autograd.grad(down(F.gelu(x)).square().sum(), (x, *down.parameters()))
    kept: dict[int, Tensor] = {}

    def run(x: Tensor) -> Tensor:
        return layers.remake(F.gelu, (x * 1,), down)

    def pack(y: Tensor) -> Tensor:
        kept[y.untyped_storage()._cdata] = y.detach()
        return y.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        loss = (checkpoint(run, x, use_reentrant=False) if word == "checkpoint" else run(x)).square().sum()
    sizes = sorted(y.numel() for y in kept.values() if y.numel())
    inner = [] if word == "checkpoint" else [18]  # the weight
    assert sizes == sorted([*inner, 30, 60]), "the output, and x or x * 1"
    found = torch.autograd.grad(loss, (x,), retain_graph=True)
    found += torch.autograd.grad(loss, tuple(down.parameters()))
    assert all(map(torch.equal, found, wanted))
