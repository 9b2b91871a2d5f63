"""The attention op and its backends."""

import sys
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from mm_parallel.attention import BACKENDS, KEPT, PACKED, attention, core, cuda, pick
from mm_parallel.plan import Sequence

LENGTHS = [(9, 9), (1, 1), (9, 4), (1, 7), (40, 3), (0, 3), (3, 0), (0, 0)]


def make(queries: int, keys: int, head_dim: int = 6, dtype=torch.float64, heads: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = ((2, length, heads, head_dim) for length in (queries, keys, keys, queries))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def torchs(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def error(got, want) -> float:
    return max(((a - b).abs().max().item() for a, b in zip(got, want, strict=True) if a.numel()), default=0.0)


def out_and_grads(attend, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    out = attend(q, k, v)
    return out, *torch.autograd.grad((out * weight).sum(), (q, k, v))


@pytest.mark.parametrize("backend", ["cpu", "math"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_are_torchs(backend, causal, scale):
    for queries, keys in LENGTHS:
        if causal and queries != keys:
            continue
        inputs = make(queries, keys)
        got = out_and_grads(partial(attention, causal=causal, scale=scale, backend=backend), *inputs)
        want = out_and_grads(partial(torchs, causal=causal, scale=scale), *inputs)
        assert error(got, want) <= 1e-13, (queries, keys)


@pytest.mark.parametrize("backend", ["cpu", "math"])
def test_a_few_keys_at_a_time(backend):
    """The gradient of a part of the keys, given the whole result, is that part of the gradient: a ring relies on it."""
    forward, backward = BACKENDS[backend]
    q, k, v, dout = (x.detach() for x in make(9, 10))
    out, lse = forward(q, k, v, 0.4, False)
    whole = backward(dout, q, k, v, out, lse, 0.4, False)
    parts = [backward(dout, q, a, b, out, lse, 0.4, False) for a, b in zip(k.split(4, 1), v.split(4, 1), strict=True)]
    dq, dk, dv = zip(*parts, strict=True)
    assert error((sum(dq), torch.cat(dk, 1), torch.cat(dv, 1)), whole) <= 1e-13


@pytest.mark.parametrize("backend", ["cpu", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(backend, dtype):
    got = out_and_grads(partial(attention, backend=backend), *make(33, 20, dtype=dtype))
    want = out_and_grads(torchs, *(x.detach().double().requires_grad_() for x in make(33, 20, dtype=dtype)))
    assert all(x.dtype == dtype for x in got)
    assert error(got, want) <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dim", [0, 2, 3])
def test_transposed_inputs(dim):
    inputs = [x.detach().transpose(dim, 1).contiguous().transpose(dim, 1).requires_grad_() for x in make(9, 9)]
    assert error(out_and_grads(attention, *inputs), out_and_grads(torchs, *inputs)) <= 1e-13


def test_the_seam():
    q, k, v, _ = make(9, 9)
    assert torch.equal(core(q, k, v, Sequence(9)), attention(q, k, v))
    assert torch.equal(core(q, k, v, Sequence(9, causal=True)), attention(q, k, v, causal=True))


@pytest.mark.parametrize("causal", [False, True])
def test_registered_as_torch_wants_it(causal):
    q, k, v, _ = make(5, 5)
    torch.library.opcheck(torch.ops.mm_parallel.attention.default, (q, k, v, 0.4, causal, "cpu"))


def test_shapes_on_meta_and_fake():
    shape = (2, 32_760, 40, 128)  # 14B: nothing of this size may be computed
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
    attention(x, x, x).sum().backward()
    assert x.grad.shape == shape
    with FakeTensorMode(), FlopCounterMode(display=False):
        x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        out, lse = torch.ops.mm_parallel.attention.default(x, x, x, 1.0, False, "cpu")
        assert (lse.shape, lse.dtype, out.dtype) == ((2, 40, 32_760), torch.float32, torch.bfloat16)
        assert (out.is_contiguous(), lse.requires_grad) == (True, False)


KERNELS = [("flash", torch.bfloat16), ("cudnn", torch.bfloat16), ("efficient", torch.float32)]


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("head_dim", [64, 12])
def test_cuda_kernels_are_called_as_they_are_declared(backend, dtype, head_dim):
    """On fake tensors: names and orders of arguments, shapes and dtypes of results. Not their values."""
    forward, backward = BACKENDS[backend]
    with FakeTensorMode():
        q, dout = (torch.empty(2, 40, 3, head_dim, dtype=dtype, device="cuda") for _ in range(2))
        k, v = (torch.empty(2, 70, 3, head_dim, dtype=dtype, device="cuda") for _ in range(2))
        out, lse = forward(q, k, v, 0.1, False)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == ((2, 3, 40), torch.float32)
        grads = backward(dout, q, k, v, out, lse, 0.1, False)
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (q, k, v)]


def documented_forward(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    gen_mask_parallel=True,
    sync=False,
):
    p, largest = documented_scores(query, key, head_num, input_layout, atten_mask, scale, sparse_mode)
    total = p.sum(-1, keepdim=True)
    out = torch.einsum("bnst,btnd->bsnd", p / total, value.repeat_interleave(head_num // value.shape[2], 2))
    return out, largest.expand(*p.shape[:3], 8), total.expand(*p.shape[:3], 8), torch.empty(0), 0, 0, 0


def documented_backward(
    query,
    key,
    value,
    dy,
    head_num,
    input_layout,
    *,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    softmax_max=None,
    softmax_sum=None,
    softmax_in=None,
    attention_in=None,
    scale_value=1.0,
    keep_prob=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    inner_precise=0,
    seed=0,
    offset=0,
    numels=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    gen_mask_parallel=True,
    sync=False,
):
    assert softmax_max.shape == softmax_sum.shape == (*query.transpose(1, 2).shape[:3], 8)
    p, largest = documented_scores(query, key, head_num, input_layout, atten_mask, scale_value, sparse_mode)
    p = p * (largest - softmax_max[..., :1]).exp() / softmax_sum[..., :1]
    heads = key.shape[2]
    key, value = (x.repeat_interleave(head_num // heads, 2) for x in (key, value))
    dp = torch.einsum("bsnd,btnd->bnst", dy, value)
    ds = p * (dp - (dy * attention_in).sum(-1).transpose(1, 2)[..., None]) * scale_value
    dq, dk = torch.einsum("bnst,btnd->bsnd", ds, key), torch.einsum("bnst,bsnd->btnd", ds, query)
    dk, dv = (x.unflatten(2, (heads, -1)).sum(3) for x in (dk, torch.einsum("bnst,bsnd->btnd", p, dy)))
    return dq, dk, dv, None


def packed_or_not(documented):
    """In the layout TND, every sample on its own, cut where the actual lengths say."""

    def call(query, key, value, *rest, actual_seq_qlen=None, actual_seq_kvlen=None, **named):
        *rest, head_num, layout = rest
        if layout != "TND":
            return documented(query, key, value, *rest, head_num, layout, **named)
        assert actual_seq_qlen == actual_seq_kvlen
        assert actual_seq_qlen[-1] == len(query)
        places = [slice(a, b) for a, b in pairwise([0, *actual_seq_qlen])]
        results = []
        for place in places:
            own = {k: x[place].transpose(0, 1)[None] if "softmax" in k else x for k, x in named.items()}  # T N 8
            own |= {k: x[None, place] for k, x in named.items() if k == "attention_in"}
            inputs = (x[None, place] for x in (query, key, value, *rest))
            results.append(documented(*inputs, head_num, "BSND", **own))
        if documented is documented_backward:
            return *(torch.cat(grads, 1)[0] for grads in list(zip(*results, strict=True))[:3]), None
        out, largest, total = (
            torch.cat(parts, 2 if i else 1)[0] for i, parts in enumerate(list(zip(*results, strict=True))[:3])
        )
        return out, largest.transpose(0, 1), total.transpose(0, 1), torch.empty(0), 0, 0, 0

    return call


def documented_scores(query, key, head_num, input_layout, atten_mask, scale, sparse_mode):
    assert (input_layout, head_num) == ("BSND", query.shape[2])
    key = key.repeat_interleave(head_num // key.shape[2], 2)  # fewer heads of keys are shared
    assert query.is_contiguous()
    assert key.is_contiguous()
    scores = torch.einsum("bsnd,btnd->bnst", query, key) * scale
    if atten_mask is not None:
        assert sparse_mode == 2
        assert (atten_mask.shape, atten_mask.dtype) == ((2048, 2048), torch.bool)
        scores = scores.masked_fill(atten_mask[: query.shape[1], : key.shape[1]], float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    return (scores - largest).exp(), largest


@pytest.mark.parametrize("causal", [False, True])
def test_the_npu_is_called_as_documented(causal, monkeypatch):
    stand_in = SimpleNamespace(npu_fusion_attention=documented_forward, npu_fusion_attention_grad=documented_backward)
    monkeypatch.setitem(sys.modules, "torch_npu", stand_in)
    for queries, keys in LENGTHS:
        if causal and queries != keys:
            continue
        inputs = make(queries, keys)
        got = out_and_grads(partial(attention, causal=causal, backend="npu"), *inputs)
        assert error(got, out_and_grads(partial(torchs, causal=causal), *inputs)) <= 1e-13
        if keys and not causal:
            mask = torch.tensor([[True] * keys, [False] * (keys - 1) + [True]])
            got = out_and_grads(partial(attention, mask=mask, backend="npu"), *inputs)
            assert error(got, out_and_grads(partial(masked, mask=mask), *inputs)) <= 1e-13


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [1, 2, 6])
def test_the_npu_takes_packs_and_shared_heads_as_documented(causal, shared, monkeypatch):
    stand_in = SimpleNamespace(
        npu_fusion_attention=packed_or_not(documented_forward),
        npu_fusion_attention_grad=packed_or_not(documented_backward),
    )
    monkeypatch.setitem(sys.modules, "torch_npu", stand_in)
    inputs = make_shared(9, 6, shared)
    for segments in (None, (0, 1, 5, 9)):
        got = out_and_grads(partial(attention, causal=causal, backend="npu", segments=segments), *inputs)
        want = out_and_grads(partial(repeated, segments=segments or (0, 9), causal=causal), *inputs)
        assert error(got, want) <= 1e-13


def test_pick():
    assert pick("cpu", torch.bfloat16, 7) == "cpu"
    assert [pick("cuda", torch.bfloat16, h) for h in (64, 128, 256, 512)] == ["flash", "flash", "flash", "efficient"]
    assert [pick("cuda", dtype, 64) for dtype in (torch.float32, torch.float64)] == ["efficient", "math"]
    assert [pick("npu", dtype, 64) for dtype in (torch.bfloat16, torch.float32, torch.float64)] == [
        "npu",
        "npu",
        "math",
    ]
    assert pick("xpu", torch.float32, 64) == "math"


def test_what_does_not_fit_is_refused():
    q, k, v, _ = make(9, 4)
    with pytest.raises(ValueError, match="no attention backend is named 'fast': there are cpu, flash"):
        attention(q, k, v, backend="fast")
    with pytest.raises(ValueError, match="where 9 queries begin in 4 keys is open"):
        attention(q, k, v, causal=True)
    with pytest.raises(
        ValueError, match="3 heads of q and 2 of k and v; neighbours share one, so the second number must"
    ):
        attention(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="all alike but for L and H of q"):
        attention(q, k[..., :1], v[..., :1])
    with pytest.raises(ValueError, match="cast them to one dtype"):
        attention(q, k.float(), v)


def test_recompute_keeps_it(monkeypatch):
    calls = []
    real = BACKENDS["cpu"]
    counted = real._replace(forward=lambda *args: calls.append(1) or real.forward(*args))
    monkeypatch.setitem(BACKENDS, "cpu", counted)
    q, k, v, weight = make(9, 9)
    run = partial(
        checkpoint,
        lambda *qkv: attention(*(x * 2 for x in qkv)) * 3,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, list(KEPT)),
    )
    got = out_and_grads(run, q, k, v, weight)
    assert len(calls) == 1
    assert error(got, out_and_grads(lambda *qkv: torchs(*(x * 2 for x in qkv)) * 3, q, k, v, weight)) <= 1e-12


def separate(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...], causal: bool) -> Tensor:
    """Every packed sample on its own, by torch."""
    return torch.cat([torchs(q[:, a:b], k[:, a:b], v[:, a:b], causal) for a, b in pairwise(segments)], 1)


@pytest.mark.parametrize("backend", ["cpu", "math"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [(0, 9), (0, 1, 6, 9), (0, 4, 5, 9)])
def test_packed_samples_are_as_apart(backend, causal, segments):
    inputs = make(9, 9)
    got = out_and_grads(partial(attention, causal=causal, backend=backend, segments=segments), *inputs)
    assert error(got, out_and_grads(partial(separate, segments=segments, causal=causal), *inputs)) <= 1e-13
    q, k, v, _ = inputs
    assert torch.equal(core(q, k, v, Sequence(9, causal, segments)), attention(q, k, v, causal, segments=segments))


def make_shared(length: int, heads: int, shared: int, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, length, number, 6) for number in (heads, shared, shared, heads))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def repeated(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...], causal: bool) -> Tensor:
    """As though every head of q had a head of k and v of its own."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    return separate(q, k, v, segments, causal)


@pytest.mark.parametrize("backend", ["cpu", "math"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "shared"), [(6, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("segments", [None, (0, 9), (0, 1, 3, 4, 7, 9), (0, 3, 6, 9)])
def test_heads_are_shared(backend, causal, heads, shared, segments):
    inputs = make_shared(9, heads, shared)
    got = out_and_grads(partial(attention, causal=causal, backend=backend, segments=segments), *inputs)
    want = out_and_grads(partial(repeated, segments=segments or (0, 9), causal=causal), *inputs)
    assert error(got, want) <= 1e-13
    if not causal and segments is None:
        mask = torch.tensor([[True, False, True] * 3, [False] * 9])
        got = out_and_grads(partial(attention, mask=mask, backend=backend), *inputs)
        want = out_and_grads(
            lambda q, k, v: masked(q, *(x.repeat_interleave(heads // shared, 2) for x in (k, v)), mask), *inputs
        )
        assert error(got, want) <= 1e-13


@pytest.mark.parametrize("backend", ["cpu", "math"])
def test_shared_heads_in_lower_precision(backend):
    inputs = make_shared(40, 8, 2, torch.bfloat16)
    segments = (0, 7, 8, 15, 40)
    got = out_and_grads(partial(attention, causal=True, backend=backend, segments=segments), *inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = out_and_grads(partial(repeated, segments=segments, causal=True), *wide)
    assert all(x.dtype == torch.bfloat16 for x in got)
    assert error(got, want) <= 20 * torch.finfo(torch.bfloat16).eps


def test_samples_of_one_length_share_a_call(monkeypatch):
    shapes = []
    real = BACKENDS["cpu"]
    counted = real._replace(forward=lambda q, k, *rest: shapes.append(tuple(k.shape[:2])) or real.forward(q, k, *rest))
    monkeypatch.setitem(BACKENDS, "cpu", counted)
    q, k, v, _ = make(64, 64)
    attention(q, k, v, True, segments=(0, *range(4, 33, 4), 50, 64))
    assert shapes == [(16, 4), (2, 18), (2, 14)]
    attention(q, k, v, True, segments=(0, 64))
    assert shapes[3:] == [(2, 64)]


def test_packs_are_registered_as_torch_wants_it():
    q, k, v, _ = make_shared(5, 4, 2)
    for segments in ([0, 2, 5], [0, 1, 2, 5]):
        torch.library.opcheck(torch.ops.mm_parallel.attention.default, (q, k, v, 0.4, True, "cpu", None, segments))


@pytest.mark.parametrize("segments", [None, (0,)])
def test_no_token_at_all(segments):
    inputs = make_shared(0, 4, 2)
    got = out_and_grads(partial(attention, causal=True, segments=segments), *inputs)
    assert [x.shape for x in got] == [x.shape for x in (inputs[0], *inputs[:3])]


@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("head_dim", [64, 12])
def test_the_packed_cuda_kernel_is_called_as_it_is_declared(head_dim, shared):
    """On fake tensors, as above; one call for all samples."""
    forward, backward = PACKED["flash"]
    segments = (0, 3, 4, 40)
    with FakeTensorMode():
        q, dout = (torch.empty(2, 40, 6, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        k, v = (torch.empty(2, 40, shared, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        out, lse = forward(q, k, v, 0.1, True, segments)
        assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((2, 6, 40), torch.float32)
        grads = backward(dout, q, k, v, out, lse, 0.1, True, segments)
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, torch.bfloat16) for x in (q, k, v)]


def declared_forward(q, k, v, ends, ends_k, longest, longest_k, dropout, causal, debug, *, scale):
    """As torch.nn.attention.varlen describes the kernel: T H h, lse H T in fp32, ends in int32 with 0 before them."""
    assert ends is ends_k
    assert (ends.dtype, longest, longest_k) == (torch.int32, ends.diff().max(), longest)
    assert all(x.is_contiguous() and x.shape[-1] % 8 == 0 for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    samples = [[x[None, a:b] for x in (q, k, v)] for a, b in pairwise(ends.tolist())]
    outs, sums = zip(*(BACKENDS["math"].forward(*sample, scale, causal) for sample in samples), strict=True)
    return torch.cat(outs, 1)[0], torch.cat(sums, 2)[0], torch.empty(2), torch.empty(0), torch.empty(0)


def declared_backward(
    dout, q, k, v, out, lse, ends, ends_k, longest, longest_k, dropout, causal, seed, unused, *, scale
):
    assert lse.shape == (q.shape[1], len(q))
    assert lse.is_contiguous()
    heads = k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // heads, 1) for x in (k, v))
    grads = []
    for a, b in pairwise(ends.tolist()):
        inputs = (x[None, a:b] for x in (dout, q, k, v, out))
        grads.append(BACKENDS["math"].backward(*inputs, lse[None, :, a:b], scale, causal))
    dq, dk, dv = (torch.cat(parts, 1)[0] for parts in zip(*grads, strict=True))
    return dq, *(x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [1, 2, 6])
def test_a_pack_goes_to_the_cuda_kernel_and_back(causal, shared, monkeypatch):
    """Two rows of samples, a head of 6 elements: a stand-in with the kernel's declaration gives what was asked for."""
    stand_in = SimpleNamespace(_flash_attention_forward=declared_forward, _flash_attention_backward=declared_backward)
    monkeypatch.setattr(cuda, "_aten", stand_in)
    inputs = make_shared(9, 6, shared)
    got = out_and_grads(partial(attention, causal=causal, backend="flash", segments=(0, 1, 5, 9)), *inputs)
    assert error(got, out_and_grads(partial(repeated, segments=(0, 1, 5, 9), causal=causal), *inputs)) <= 1e-13


@pytest.mark.parametrize("segments", [(), (0,), (0, 8), (0, 5, 5, 9), (0, 6, 4, 9), (1, 9)])
def test_segments_that_are_not_the_tokens_are_refused(segments):
    q, k, v, _ = make(9, 9)
    with pytest.raises(ValueError, match=r"of 9 tokens: must begin with 0, grow, and end with 9"):
        attention(q, k, v, segments=segments)


def test_packed_queries_need_packed_keys():
    q, k, v, _ = make(9, 4)
    with pytest.raises(ValueError, match="packed samples of 9 queries and 4 keys"):
        attention(q, k, v, segments=(0, 4, 9))


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """The formula: weights of what is masked are 0, and so is a query that sees nothing."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    largest = scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0)
    weights = (scores - largest).exp()
    return torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True).clamp(min=1e-300), v)


keys_seen = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4)


@pytest.mark.parametrize("backend", ["cpu", "math"])
@given(keys_seen)
@example([[False] * 7, [True] * 7])
@example([[True, False] * 3 + [True]] * 2 + [[False] * 6 + [True]])
def test_a_mask_is_the_formula(backend, seen):
    mask = torch.tensor(seen)
    inputs = random_qkv(len(seen), 5, 7)
    got = out_and_grads(partial(attention, mask=mask, backend=backend), *inputs)
    want = out_and_grads(partial(masked, mask=mask), *inputs)
    assert error(got, want) <= 1e-13
    assert all(x.isfinite().all() for x in got)
    assert not got[2][~mask].any()  # exactly 0
    assert not got[3][~mask].any()


def random_qkv(samples: int, queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(samples)
    shapes = ((samples, length, 3, 6) for length in (queries, keys, keys, queries))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_a_mask_of_all_is_no_mask():
    inputs = random_qkv(3, 7, 7)
    got = out_and_grads(partial(attention, mask=torch.ones(3, 7, dtype=torch.bool)), *inputs)
    assert all(map(torch.equal, got, out_and_grads(attention, *inputs)))


def test_what_is_masked_may_be_anything():
    """Not even nan there reaches a query, or a gradient."""
    q, k, v, weight = random_qkv(2, 5, 7)
    mask = torch.tensor([[True] * 4 + [False] * 3, [False, True] * 3 + [False]])
    want = out_and_grads(partial(attention, mask=mask), q, k, v, weight)
    k, v = (x.detach().masked_fill(~mask[:, :, None, None], float("nan")).requires_grad_() for x in (k, v))
    assert all(map(torch.equal, out_and_grads(partial(attention, mask=mask), q, k, v, weight), want))


def test_samples_that_see_the_same_go_together(monkeypatch):
    shapes = []
    real = BACKENDS["cpu"]
    counted = real._replace(forward=lambda q, k, *rest: shapes.append(tuple(k.shape[:2])) or real.forward(q, k, *rest))
    monkeypatch.setitem(BACKENDS, "cpu", counted)
    q, k, v, _ = random_qkv(4, 5, 7)
    some, none = [True] * 3 + [False] * 4, [False] * 7
    attention(q, k, v, mask=torch.tensor([some, some, none, [True] * 7]))
    assert shapes == [(2, 3), (1, 7)]
    attention(q, k, v)
    assert shapes[2:] == [(4, 7)]


@pytest.mark.parametrize("masked", [[[True] * 5], [[True, False] * 2 + [True]], [[False] * 5]])
def test_a_mask_is_registered_as_torch_wants_it(masked):
    q, k, v, _ = random_qkv(1, 5, 5)
    args = (q, k, v, 0.4, False, "cpu", torch.tensor(masked))
    torch.library.opcheck(torch.ops.mm_parallel.attention.default, args)


def test_a_mask_on_meta():
    x = torch.empty(2, 32_760, 40, 128, device="meta", dtype=torch.bfloat16, requires_grad=True)
    attention(x, x, x, mask=torch.empty(2, 32_760, dtype=torch.bool, device="meta")).sum().backward()
    assert x.grad.shape == x.shape


def test_the_seam_takes_a_mask():
    q, k, v, _ = random_qkv(2, 7, 7)
    mask = torch.tensor([[True] * 4 + [False] * 3, [False, True] * 3 + [False]])
    assert torch.equal(core(q, k, v, Sequence(7), mask), attention(q, k, v, mask=mask))
    assert torch.equal(core(q, k, v, Sequence(7), mask=None), attention(q, k, v))


def test_masks_that_do_not_fit_are_refused():
    q, k, v, _ = random_qkv(2, 7, 7)
    good = torch.ones(2, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"a mask \(2, 6\) bool of 2 samples with 7 keys: needs \(2, 7\) bool"):
        attention(q, k, v, mask=good[:, :6])
    with pytest.raises(ValueError, match=r"a mask \(2, 7\) float32 of 2 samples"):
        attention(q, k, v, mask=good.float())
    with pytest.raises(ValueError, match="causal attention with a mask of keys"):
        attention(q, k, v, causal=True, mask=good)
    with pytest.raises(ValueError, match="2 packed samples with a mask of keys"):
        core(q, k, v, Sequence(7, segments=(0, 3, 7)), good)
