"""Context parallelism against one device: attention alone for many sizes, then a whole ladder."""

import itertools
import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mm_parallel import ParallelConfig, ParallelPlan, context, finish_gradients, make_mesh, parallelize
from mm_parallel.attention import BACKENDS, KEPT
from mm_parallel.context import context_attention, gather
from mm_parallel.context.shard import TokenLayout, split, take
from mm_parallel.context.ulysses import HeadLayout
from mm_parallel.plan import Sequence
from mm_parallel.testing import TinyLadder, assert_same_grads, gradients, spawn

HEAD_DIM = 5


def layouts(world: int) -> list[DeviceMesh]:
    return [make_mesh(ParallelConfig(ring=r, ulysses=world // r), "cpu") for r in range(1, world + 1) if world % r == 0]


@given(st.integers(0, 200), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_every_token_is_held_once_and_evenly(tokens, ring, ulysses, causal):
    layout = TokenLayout(tokens, ring, ulysses, causal)
    held = [layout.pieces(rank) for rank in range(ring * ulysses)]
    sizes = [sum(stop - start for start, stop in pieces) for pieces in held]
    assert sorted(t for pieces in held for piece in pieces for t in range(*piece)) == list(range(tokens))
    assert max(sizes) - min(sizes) <= 1
    for rank in range(ring):
        own = sizes[rank * ulysses : (rank + 1) * ulysses]
        assert own == layout.shares(rank)
        assert sum(own) == sum(stop - start for start, stop in layout.block(rank))


def test_a_causal_ring_holds_front_and_back():
    assert [TokenLayout(10, 2, 2, True).pieces(rank) for rank in range(4)] == [[(0, 3)], [(8, 10)], [(3, 6)], [(6, 8)]]
    assert [TokenLayout(10, 2, 2).pieces(rank) for rank in range(4)] == [[(0, 3)], [(3, 5)], [(5, 8)], [(8, 10)]]


def one_device(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """By torch; with a mask by the formula: what is masked weighs 0, and a query that sees nothing gives 0."""
    if mask is not None:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        weights = (scores - scores.detach().amax(-1, keepdim=True)).exp() * mask[:, None, None]
        return torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True).clamp(min=1e-300), v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def attend(
    rank: int,
    mesh: DeviceMesh,
    tokens: int,
    heads: int,
    samples: int,
    causal: bool,
    dtype: torch.dtype = torch.float64,
    mask: Tensor | None = None,
) -> float:
    """Largest error, relative to the largest value, of the result and of the gradients of q, k and v."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (samples, tokens, heads, HEAD_DIM)
    weight, *whole = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    whole = [x.to(dtype).double().requires_grad_() for x in whole]
    expected = one_device(*whole, causal, mask)
    wanted = torch.autograd.grad((expected * weight).sum(), whole)

    pieces = TokenLayout(tokens, mesh["ring"].size(), mesh["ulysses"].size(), causal).pieces(rank)
    own = context_attention(*(take(x, 1, pieces).to(dtype) for x in whole), Sequence(tokens, causal), mesh, mask=mask)
    out = gather(own.double(), Sequence(tokens, causal), mesh)
    got = torch.autograd.grad((out * weight).sum(), whole)
    for grad in got:
        dist.all_reduce(grad, dist.ReduceOp.AVG)
    assert all(x.isfinite().all() for x in (out, *got))  # max() below would pass over nan
    if mask is not None:
        assert not any(grad[~mask].any() for grad in got[1:]), "masked keys have a gradient"
    pairs = zip((out, *got), (expected, *wanted), strict=True)
    return max((a - b).abs().max().item() / b.abs().max().clamp(min=1e-3).item() for a, b in pairs)


def packed(rank: int, world: int) -> None:
    """Samples that end inside a rank's part, and a rank without heads: values and gradients of samples apart."""
    mesh = make_mesh(ParallelConfig(ulysses=world), "cpu")
    for causal, segments, heads in itertools.product((False, True), ((0, 11), (0, 1, 5, 11), (0, 6, 10, 11)), (2, 5)):
        generator = torch.Generator().manual_seed(heads)
        shape = (2, 11, heads, HEAD_DIM)
        weight, *whole = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
        whole = [x.requires_grad_() for x in whole]
        apart = [one_device(*(x[:, a:b] for x in whole), causal) for a, b in itertools.pairwise(segments)]
        wanted = torch.autograd.grad((torch.cat(apart, 1) * weight).sum(), whole)
        sequence, pieces = Sequence(11, causal, segments), TokenLayout(11, 1, world).pieces(rank)
        out = gather(context_attention(*(take(x, 1, pieces) for x in whole), sequence, mesh), sequence, mesh)
        got = torch.autograd.grad((out * weight).sum(), whole)
        for grad in got:
            dist.all_reduce(grad, dist.ReduceOp.AVG)
        for a, b in zip((out, *got), (torch.cat(apart, 1), *wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_ulysses_takes_packed_samples():
    spawn(3, packed)


def apart(q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: tuple[int, ...] | None) -> Tensor:
    """By torch: every sample on its own, and a head of k and v for every head of q."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    ends = (0, *(segments or (0, q.shape[1]))[1:-1], q.shape[1])
    return torch.cat([one_device(*(x[:, a:b] for x in (q, k, v)), causal) for a, b in itertools.pairwise(ends)], 1)


def attend_packed(
    rank: int, mesh: DeviceMesh, sequence: Sequence, heads: int, shared: int, samples: int, dtype=torch.float64
) -> float:
    """Largest error, relative to the largest value, of the result and of the gradients of q, k and v."""
    generator, tokens = torch.Generator().manual_seed(sequence.tokens), sequence.tokens
    shapes = ((samples, tokens, number, HEAD_DIM) for number in (heads, heads, shared, shared))
    weight, *whole = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    whole = [x.to(dtype).double().requires_grad_() for x in whole]
    expected = apart(*whole, sequence.causal, sequence.segments)
    wanted = torch.autograd.grad((expected * weight).sum(), whole)
    pieces = TokenLayout(tokens, mesh["ring"].size(), mesh["ulysses"].size(), sequence.causal).pieces(rank)
    own = context_attention(*(take(x, 1, pieces).to(dtype) for x in whole), sequence, mesh)
    out = gather(own.double(), sequence, mesh)
    got = torch.autograd.grad((out * weight).sum(), whole)
    for grad in got:
        dist.all_reduce(grad, dist.ReduceOp.AVG)
    assert all(x.isfinite().all() for x in (out, *got))
    pairs = [(a, b) for a, b in zip((out, *got), (expected, *wanted), strict=True) if b.numel()]
    return max(((a - b).abs().max().item() / b.abs().max().clamp(min=1e-3).item() for a, b in pairs), default=0.0)


def draw_ends(draw: random.Random, tokens: int) -> tuple[int, ...] | None:
    """Where samples part: nowhere, anywhere, after every token, into few or many of any lengths."""
    if draw.random() < 0.2:
        return None
    rate = draw.choice((0, 0.03, 0.1, 0.4, 1))
    return (0, *(end for end in range(1, tokens) if draw.random() < rate), *((tokens,) if tokens else ()))


def attend_all_packed(rank: int, world: int, cases: int) -> int:
    draw, done = random.Random(world), 0
    meshes = layouts(world)
    for case in range(cases):
        for mesh in meshes:
            tokens, shared, samples = draw.randint(0, 61), draw.randint(1, 5), draw.choice((1, 1, 2))
            if case < 2:
                tokens = case  # fewer than ranks
            heads, causal = shared * draw.randint(1, 7), draw.random() < 0.8
            sequence = Sequence(tokens, causal, draw_ends(draw, tokens))
            error = attend_packed(rank, mesh, sequence, heads, shared, samples)
            where = f"ring {mesh['ring'].size()}, ulysses {mesh['ulysses'].size()}, {heads} heads share {shared}"
            assert error <= 1e-10, f"{sequence}, {where}: {error}"
            done += 1
    return done


@pytest.mark.parametrize(("world", "cases"), [(2, 40), (3, 30), (4, 30), (8, 10)])
def test_packed_samples_and_shared_heads_equal_one_device(world, cases):
    assert min(spawn(world, attend_all_packed, cases)) >= 40


def named_heads(rank: int, world: int) -> None:
    """Qwen2.5-VL's numbers of heads, over as many ranks as share one head, and more."""
    for mesh in layouts(world):
        for heads, shared in ((16, 2), (28, 4)):
            sequence = Sequence(33, True, (0, 7, 8, 30, 33))
            assert attend_packed(rank, mesh, sequence, heads, shared, 1) <= 1e-10
        assert attend_packed(rank, mesh, sequence, 16, 2, 1, torch.float32) <= 1e-6
        assert attend_packed(rank, mesh, sequence, 16, 2, 1, torch.bfloat16) <= 2e-2


def test_16_heads_share_2_and_28_share_4():
    spawn(4, named_heads)
    spawn(8, named_heads)


@given(st.integers(0, 12), st.integers(1, 8), st.integers(1, 9))
def test_every_head_meets_the_one_that_it_shares(shared, each, ranks):
    layout = HeadLayout(shared * each, shared, ranks)
    for rank, ((first, last), (start, stop)) in enumerate(zip(layout.queries, layout.keys, strict=True)):
        held = [head for head, n in zip(range(start, stop), layout.copies(rank), strict=True) for _ in range(n)]
        wanted = [head // each for head in range(first, last)]
        assert [held[i * len(held) // len(wanted)] for i in range(len(wanted))] == wanted
        assert sorted(set(wanted)) == list(range(start, stop))  # none that nobody here needs
        if shared % ranks == 0:
            assert held == list(range(rank * shared // ranks, (rank + 1) * shared // ranks))


def pairs_computed(rank: int, world: int, segments: tuple[int, ...]) -> list[tuple[int, int]]:
    """Queries and keys of every call of a kernel."""
    calls, real = [], BACKENDS["cpu"]
    BACKENDS["cpu"] = real._replace(
        forward=lambda q, k, *rest: calls.append((q.shape[0] * q.shape[1], k.shape[1])) or real.forward(q, k, *rest)
    )
    mesh, sequence = make_mesh(ParallelConfig(ring=world), "cpu"), Sequence(segments[-1], True, segments)
    pieces = TokenLayout(segments[-1], world, 1, True).pieces(rank)
    context_attention(*(take(torch.randn(1, segments[-1], 2, HEAD_DIM), 1, pieces) for _ in range(3)), sequence, mesh)
    BACKENDS["cpu"] = real
    return calls


def test_a_ring_computes_only_what_samples_need():
    # 24 tokens, 8 chunks of 3; rank 0 has chunks 0 and 7, rank 1 chunks 1 and 6, ...
    assert spawn(4, pairs_computed, tuple(range(0, 25, 3))) == [[(6, 3)]] * 4  # two samples of 3 tokens in one call
    first = spawn(4, pairs_computed, (0, 12, 24))
    assert first[0] == [(6, 3), (3, 3), (3, 3), (3, 3)]  # samples of its own, then queries of chunk 7, keys of 6, 5, 4
    assert first[3] == [(6, 3), (3, 3), (3, 3), (3, 3)]  # queries of chunk 3, keys of 2, 1, 0
    assert [sum(q * k for q, k in calls) for calls in first] == [18 + 27] * 4


def sent_by_shared_heads(rank: int, world: int, axis: str, heads: int, shared: int) -> tuple[int, int]:
    mesh, sequence = make_mesh(ParallelConfig(**{axis: world}), "cpu"), Sequence(8 * world, True, (0, 3, 8 * world))
    q, k, v = (torch.randn(1, 8, number, HEAD_DIM, requires_grad=True) for number in (heads, shared, shared))
    with Counted() as forward:
        out = context_attention(q, k, v, sequence, mesh)
    with Counted() as backward:
        out.sum().backward()
    return forward.sent, backward.sent


def test_shared_heads_travel_once():
    token = 8 * HEAD_DIM  # of one head of a rank
    for forward, backward in spawn(4, sent_by_shared_heads, "ring", 16, 2):
        assert (forward, backward) == (2 * 3 * 2 * token, 2 * 3 * 2 * token + 2 * 4 * 2 * token)
    for forward, backward in spawn(4, sent_by_shared_heads, "ulysses", 16, 4):  # one for each rank
        assert forward == backward == 12 * token + 2 * 3 * token + 3 * 4 * token
    for forward, backward in spawn(4, sent_by_shared_heads, "ulysses", 16, 2):  # two ranks need the same
        assert forward == backward == 12 * token + 2 * 3 * token + 3 * 4 * token


def attend_all(rank: int, world: int, cases: int) -> tuple[int, float]:
    draw, done, worst = random.Random(world), 0, 0.0
    meshes = layouts(world)
    for case in range(cases):
        for mesh in meshes:
            tokens, heads, samples = draw.randint(1, 97), draw.randint(1, 13), draw.choice((1, 1, 2))
            if case == 0:
                tokens, heads = 1, 1  # fewer than ranks of either
            error = attend(rank, mesh, tokens, heads, samples, causal=bool(case % 2))
            where = f"ring {mesh['ring'].size()}, ulysses {mesh['ulysses'].size()}, causal {bool(case % 2)}"
            assert error <= 1e-10, f"{tokens} tokens, {heads} heads, {where}: {error}"
            done, worst = done + 1, max(worst, error)
    return done, worst


@pytest.mark.parametrize(("world", "cases"), [(2, 40), (3, 30), (4, 20), (8, 8)])
def test_attention_equals_one_device(world, cases):
    for done, worst in spawn(world, attend_all, cases):
        assert done >= 32
        assert worst > 0


def draw_mask(draw: random.Random, samples: int, layout: TokenLayout) -> Tensor:
    """B L, each sample in a way of its own: any tokens, padding at the end, ring ranks without any, none, or all."""
    rows = []
    for _ in range(samples):
        kind, row = draw.choice(("any", "any", "padding", "ranks", "ranks", "none", "all")), [True] * layout.tokens
        if kind == "any":
            rate = draw.choice((0.1, 0.5, 0.9))
            row = [draw.random() < rate for _ in row]
        elif kind == "padding":
            start = draw.randint(1, layout.tokens)
            row[start:] = [False] * (layout.tokens - start)
        elif kind == "ranks":
            for ring in draw.sample(range(layout.ring), draw.randint(1, layout.ring)):
                for start, stop in layout.block(ring):
                    row[start:stop] = [False] * (stop - start)
        elif kind == "none":
            row = [False] * layout.tokens
        rows.append(row)
    return torch.tensor(rows)


def attend_masked(rank: int, world: int, cases: int) -> tuple[int, float]:
    draw, done, worst = random.Random(world), 0, 0.0
    meshes = layouts(world)
    for case in range(cases):
        for mesh in meshes:
            tokens, heads, samples = draw.randint(1, 61), draw.randint(1, 5), draw.choice((1, 2, 3))
            if case == 0:
                tokens, heads = 1, 1
            ring, ulysses = mesh["ring"].size(), mesh["ulysses"].size()
            mask = draw_mask(draw, samples, TokenLayout(tokens, ring, ulysses))
            error = attend(rank, mesh, tokens, heads, samples, False, mask=mask)
            where = f"{tokens} tokens, {heads} heads, ring {ring}, ulysses {ulysses}, mask {mask.int().tolist()}"
            assert error <= 1e-10, f"{where}: {error}"
            done, worst = done + 1, max(worst, error)
    return done, worst


@pytest.mark.parametrize(("world", "cases"), [(2, 40), (3, 30), (4, 20), (8, 6)])
def test_masked_attention_is_the_formula(world, cases):
    for done, worst in spawn(world, attend_masked, cases):
        assert done >= 24
        assert worst > 0


def lower_precision_masked(rank: int, world: int) -> None:
    draw = random.Random(0)
    for mesh in layouts(world):
        mask = draw_mask(draw, 6, TokenLayout(61, mesh["ring"].size(), mesh["ulysses"].size()))
        assert attend(rank, mesh, 61, 3, 6, False, torch.float32, mask) <= 1e-6
        assert attend(rank, mesh, 61, 3, 6, False, torch.bfloat16, mask) <= 1.5e-2


def test_lower_precision_with_a_mask():
    spawn(4, lower_precision_masked)


def named_sizes(rank: int, world: int) -> None:
    mesh = make_mesh(ParallelConfig(cp=world), "cpu")
    tokens, heads = {4: (769, 2), 8: (20, 12)}[world]
    assert attend(rank, mesh, tokens, heads, 1, False) <= 1e-10


def lower_precision(rank: int, world: int) -> None:
    for mesh in layouts(world):
        for causal in (False, True):
            assert attend(rank, mesh, 61, 3, 1, causal, torch.float32) <= 1e-6
            assert attend(rank, mesh, 61, 3, 1, causal, torch.bfloat16) <= 1.5e-2  # bf16 itself: 0.8 %


def test_lower_precision():
    spawn(4, lower_precision)


def test_769_tokens_on_4_ranks_and_12_heads_on_8():
    spawn(4, named_sizes)
    spawn(8, named_sizes)


class Counted:
    """Wraps torch's functions while it is entered, and counts the elements that go to other ranks."""

    def __enter__(self) -> "Counted":
        self.sent, self.real = 0, (dist.all_to_all_single, dist.batch_isend_irecv)
        dist.all_to_all_single, dist.batch_isend_irecv = self.exchange, self.pass_on
        return self

    def __exit__(self, *_) -> None:
        dist.all_to_all_single, dist.batch_isend_irecv = self.real

    def exchange(self, received, sent, incoming, outgoing, group):
        self.sent += sent.numel() - outgoing[group.rank()]
        self.real[0](received, sent, incoming, outgoing, group=group)

    def pass_on(self, ops):
        self.sent += sum(op.tensor.numel() for op in ops if op.op is dist.isend)
        return self.real[1](ops)


def bytes_sent(rank: int, world: int, tokens: int, heads: int) -> dict[str, tuple[int, int]]:
    counts = {}
    for name in ("ring", "ulysses"):
        mesh = make_mesh(ParallelConfig(**{name: world}), "cpu")
        layout = TokenLayout(tokens, mesh["ring"].size(), mesh["ulysses"].size())
        own = sum(stop - start for start, stop in layout.pieces(rank))
        q, k, v = (torch.randn(1, own, heads, HEAD_DIM, requires_grad=True) for _ in range(3))
        with Counted() as forward:
            out = context_attention(q, k, v, Sequence(tokens), mesh)
        with Counted() as backward:
            out.sum().backward()
        counts[name] = (forward.sent, backward.sent)
    return counts


@pytest.mark.parametrize(("tokens", "heads"), [(12, 8), (10, 3)])
def test_what_is_sent_is_what_the_formulas_say(tokens, heads):
    world = 4
    for rank, counts in enumerate(spawn(world, bytes_sent, tokens, heads)):
        n, m = (size // world + (rank < size % world) for size in (tokens, heads))
        out, back = n * (heads - m) * HEAD_DIM, (tokens - n) * m * HEAD_DIM
        assert counts["ulysses"] == (3 * out + back, out + 3 * back)
        if tokens % world == 0 == heads % world:
            even = 4 * tokens * heads * HEAD_DIM * (world - 1) // world**2
            assert counts["ulysses"] == (even, even)
        blocks = [tokens // world + (r < tokens % world) for r in range(world)]
        passing = [2 * heads * HEAD_DIM * blocks[(rank - step) % world] for step in range(world)]
        assert counts["ring"] == (sum(passing[:-1]), sum(passing[:-1]) + sum(passing))


def sent_with_masks(rank: int, world: int) -> list[int]:
    """Elements that a ring sends, forward and backward, without a mask, with one, and with one that sees nothing."""
    mesh, sent = make_mesh(ParallelConfig(ring=world), "cpu"), []
    some = torch.arange(5 * world)[None] % 3 > 0
    for mask in (None, some, torch.zeros_like(some)):
        with Counted() as counted:
            q, k, v = (torch.randn(1, 5, 2, HEAD_DIM, requires_grad=True) for _ in range(3))
            context_attention(q, k, v, Sequence(5 * world), mesh, mask=mask).sum().backward()
        sent.append(counted.sent)
    return sent


def test_keys_travel_whole_whatever_is_masked():
    for sent in spawn(3, sent_with_masks):
        assert sent == [sent[0]] * 3
        assert sent[0] > 0


def kept(rank: int, world: int) -> tuple[int, int]:
    """Elements sent in the backward of a ring, without and with recompute of all but attention."""
    mesh, sent = make_mesh(ParallelConfig(ring=world), "cpu"), []
    keep = partial(create_selective_checkpoint_contexts, list(KEPT))
    q, k, v = (torch.randn(1, 5, 2, HEAD_DIM, requires_grad=True) for _ in range(3))
    for run in (lambda fn, *args: fn(*args), partial(checkpoint, use_reentrant=False, context_fn=keep)):
        out = run(lambda *qkv: context_attention(*(x * 2 for x in qkv), Sequence(5 * world), mesh), q, k, v)
        with Counted() as backward:
            (out * out).sum().backward()
        sent.append(backward.sent)
    return tuple(sent)


def test_recompute_does_not_send_again():
    for plain, recomputed in spawn(3, kept):
        assert plain == recomputed > 0


def registered(rank: int, world: int) -> None:
    group = make_mesh(ParallelConfig(ring=world), "cpu").get_group("ring").group_name
    q, k, v = (torch.randn(1, 4, 2, HEAD_DIM) for _ in range(3))
    args = (q, k, v, 0.4, True, "cpu", [2] * 2 * world, group)
    tests = ("test_schema", "test_faketensor")  # the others call it as often as they like, and a ring must agree
    torch.library.opcheck(torch.ops.mm_parallel.ring_attention.default, args, test_utils=tests)
    out, lse = torch.ops.mm_parallel.ring_attention.default(*args)
    args = (torch.randn_like(q), q, k, v, out, lse, *args[3:])
    torch.library.opcheck(torch.ops.mm_parallel.ring_attention_backward.default, args, test_utils=tests)
    mask = torch.arange(4 * world)[None] < 3  # of the first rank alone
    args = (q, k, v, 0.4, False, "cpu", [4] * world, group, mask)
    torch.library.opcheck(torch.ops.mm_parallel.ring_attention.default, args, test_utils=tests)
    out, lse = torch.ops.mm_parallel.ring_attention.default(*args)
    args = (torch.randn_like(q), q, k, v, out, lse, *args[3:])
    torch.library.opcheck(torch.ops.mm_parallel.ring_attention_backward.default, args, test_utils=tests)


def test_the_ring_is_registered_as_torch_wants_it():
    spawn(2, registered)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 11, 5), (2, 3), (2, 11, 5))
    tokens, t, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tokens, t, target


def build(causal: bool, segments: tuple[int, ...] | None = None) -> TinyLadder:
    torch.manual_seed(0)
    return TinyLadder(2, causal=causal, segments=segments).double()


def ladder(rank: int, world: int, rings: tuple[int, ...]) -> int:
    data, done = batch(), 0
    for ring in rings:
        for causal, segments in ((False, None), (True, None), (True, (0, 3, 4, 11))):
            single, parallel = build(causal, segments), ParallelConfig(ring=ring, ulysses=world // ring)
            expected = (single(*data[:2]) - data[2]).square().mean()
            expected.backward()
            mesh = make_mesh(parallel, "cpu")
            model = parallelize(build(causal, segments), TinyLadder.plan, mesh, parallel)
            loss = (model(*data[:2]) - data[2]).square().mean()
            loss.backward()
            finish_gradients(model, mesh)
            assert abs(loss / expected - 1) <= 1e-10
            assert_same_grads(gradients(model), gradients(single), 1e-10)
            done += 1
    return done


@pytest.mark.parametrize(("world", "rings"), [(2, (1, 2)), (3, (1, 3)), (4, (1, 2, 4)), (8, (2,))])
def test_a_ladder_equals_one_device(world, rings):
    assert spawn(world, ladder, rings) == [3 * len(rings)] * world


def meta(rank: int, world: int) -> None:
    for mesh in layouts(world):
        with torch.device("meta"):
            model = TinyLadder()
        parallel = ParallelConfig(ring=mesh["ring"].size(), ulysses=mesh["ulysses"].size())
        context.cut(model, TinyLadder.plan, make_mesh(parallel, "cpu"))
        for mask in (None, torch.empty(2, 11, dtype=torch.bool, device="meta")):
            y = model(torch.empty(2, 11, 5, device="meta"), torch.empty(2, 3, device="meta"), mask)
            assert y.shape == (2, 11, 5)
            y.sum().backward()
            assert all(p.grad.shape == p.shape for p in model.parameters())


def test_shapes_are_known_on_meta():
    spawn(4, meta)


def wrong(rank: int, world: int) -> list[str]:
    mesh, said = make_mesh(ParallelConfig(cp=world), "cpu"), []
    q, mask = torch.zeros(1, 3, 2, 4), torch.ones(1, 6, dtype=torch.bool)
    stream = build(False).stem(*batch()[:2])
    for attempt in (
        lambda: context_attention(q, q, q, Sequence(9), mesh),
        lambda: context_attention(
            q, q, q, Sequence(6, segments=(0, 2, 7)), make_mesh(ParallelConfig(ring=world), "cpu")
        ),
        lambda: context_attention(q, q, q, Sequence(6), mesh, mask=mask[:, :3]),  # of a rank's own tokens
        lambda: context_attention(q, q, q, Sequence(6, causal=True), mesh, mask=mask),
        lambda: context_attention(q, q, q, Sequence(6, segments=(0, 2, 6)), mesh, mask=mask),
        lambda: context.cut(TinyLadder(), ParallelPlan(("blocks.*",)), mesh),
        lambda: context.cut(TinyLadder(), ParallelPlan(("blocks.*",), tokens={"x": 1}, core="kernel"), mesh),
        lambda: split(stream._replace(place=stream.place[:4]), {"x": 1, "place": 0}, TokenLayout(11, 1, world), rank),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (what it says is looked at below)
            attempt()
        said.append(str(error.value))
    return said


def test_what_cannot_be_is_refused():
    said = spawn(2, wrong)[0]
    assert said == [
        "attention of 3 queries and 3 keys, but of 9 tokens this rank (ring 0 of 1, ulysses 0 of 2) has 5",
        "segments (0, 2, 7) of 6 tokens: must begin with 0, grow, and end with 6",
        "a mask (1, 3) bool of 1 samples with 6 keys: needs (1, 6) bool, True for a key that is attended",
        "causal attention with a mask of keys: there is no such kernel; pack without what is masked instead",
        "2 packed samples with a mask of keys: leave out what is masked when you pack",
        "the plan names no tokens, so nothing can be cut over cp: give ParallelPlan(tokens={…: dim})",
        "the plan's seam 'kernel' is no attribute of TinyLadder",
        "stream.place has 4 tokens in dim 0, but the sequence has 11",
    ]
