"""A model that is verified: the same bits for 1, 2 and 4 ranks."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mm_parallel import MemoryConfig, ParallelConfig, ParallelPlan, finish_gradients, make_mesh, parallelize, verify
from mm_parallel.testing import TinyLadder, TwoLadders, assert_same_grads, gradients, spawn


def build(dtype: torch.dtype, seed: int = 0) -> TinyLadder:
    torch.manual_seed(seed)
    return TinyLadder().to(dtype)


def batch(samples: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((samples, tokens, 5), (samples, 3), (samples, tokens, 5))
    x, t, target = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, t, target


def train(world: int, samples: int, tokens: int, exact: bool = True, mask: Tensor | None = None) -> list[list]:
    """Losses, outputs and weights of three steps, as bits."""
    mesh = make_mesh(ParallelConfig(cp=world), "cpu")
    model = (verify.parallelize if exact else parallelize)(build(torch.float32), TinyLadder.plan, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, t, target = batch(samples, tokens, torch.float32)
    seen = []
    for _ in range(3):
        y = model(x, t, mask)
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        finish_gradients(model, mesh)
        optimizer.step()
        seen += [loss.detach(), y.detach()]
    with torch.no_grad():
        seen.append(model(x, t, mask))
    return [x.contiguous().view(torch.int32).tolist() for x in (*seen, *map(whole, model.parameters()))]


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


SIZES = [(1, 37), (2, 10), (1, 3)]  # samples, tokens


def train_all(rank: int, world: int) -> tuple[list[list[list]], list[list]]:
    return [train(world, *sizes) for sizes in SIZES], train(world, *SIZES[0], exact=False)


def test_the_same_bits_on_1_2_and_4_ranks():
    ((single, plain_single),) = spawn(1, train_all)
    for world in (2, 4):
        for ranks, plain in spawn(world, train_all):
            for sizes, got, want in zip(SIZES, ranks, single, strict=True):
                assert len(got) == 65
                assert got == want, (world, sizes)
            assert plain != plain_single  # or else nothing would have been shown


def masks() -> list[Tensor]:
    """37 tokens: of the second sample nothing is seen on three ranks of four."""
    places = torch.arange(37)
    return [(places % 3 > 0)[None], torch.stack((places < 25, places < 5))]


def train_masked(rank: int, world: int) -> list[list[list]]:
    return [train(world, len(mask), 37, mask=mask) for mask in masks()]


def test_the_same_bits_with_masked_keys():
    (single,) = spawn(1, train_masked)
    assert single[0] != train(1, 1, 37)  # the mask matters
    for world in (2, 4):
        for ranks in spawn(world, train_masked):
            assert ranks == single, world


def train_packed(rank: int, world: int) -> list[list[list]]:
    """Weights of two steps, as bits: packed samples, causal or not, whose heads share keys."""
    mesh, trained = make_mesh(ParallelConfig(cp=world), "cpu"), []
    x, t, target = batch(2, 11, torch.float32)
    for causal in (False, True):
        torch.manual_seed(0)
        model = TinyLadder(causal=causal, segments=(0, 1, 6, 11), shared=2)
        model = verify.parallelize(model, TinyLadder.plan, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            (model(x, t) - target).square().mean().backward()
            optimizer.step()
        trained.append([whole(p).contiguous().view(torch.int32).tolist() for p in model.parameters()])
    return trained


def test_the_same_bits_with_packed_samples_and_shared_heads():
    (single,) = spawn(1, train_packed)
    assert single[0] != single[1]  # causal or not matters
    for world in (2, 4):
        assert spawn(world, train_packed) == [single] * world


def test_the_numbers_of_the_plain_model_with_packed_samples_and_shared_heads():
    x, t, target = batch(2, 11, torch.float64)
    models = []
    for exact in (False, True):
        torch.manual_seed(0)
        model = TinyLadder(causal=True, segments=(0, 1, 6, 11), shared=1).double()
        models.append(verify.parallelize(model, TinyLadder.plan) if exact else model)
        (model(x, t) - target).square().mean().backward()
    assert_same_grads(gradients(models[1]), gradients(models[0]), 1e-12)


def train_two_ladders(rank: int, world: int) -> list[list]:
    """Weights of three steps, as bits: the ladder in the stem runs whole on every rank."""
    mesh = make_mesh(ParallelConfig(cp=world), "cpu")
    torch.manual_seed(0)
    model = verify.parallelize(TwoLadders(), TwoLadders.plan, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, t, target = batch(2, 11, torch.float32)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x, t, x[:, :6]) - target).square().mean().backward()
        finish_gradients(model, mesh)
        optimizer.step()
    return [whole(p).contiguous().view(torch.int32).tolist() for p in model.parameters()]


def test_the_same_bits_with_a_ladder_in_the_stem():
    single, *pair = *spawn(1, train_two_ladders), *spawn(2, train_two_ladders)
    assert pair == [single, single]


@pytest.mark.parametrize("mask", [None, (True, False, True)])
@pytest.mark.parametrize("tokens", [37, 10, 3])
def test_the_numbers_of_the_plain_model(tokens, mask):
    """Here, in one process without process group."""
    x, t, target = batch(2, tokens, torch.float64)
    mask = None if mask is None else torch.tensor(mask).repeat(2, 13)[:, :tokens]
    plain = build(torch.float64)
    exact = verify.parallelize(build(torch.float64), TinyLadder.plan, make_mesh(ParallelConfig(), "cpu"))
    losses = [(model(x, t, mask) - target).square().mean() for model in (plain, exact)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0] / losses[1] - 1) <= 1e-13
    assert_same_grads(gradients(exact), gradients(plain), 1e-12)
    assert list(exact.state_dict()) == list(plain.state_dict())


class BehindTheGather(TinyLadder):
    """Its head has work, a weight and a part of the stream behind the gather."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(5, 5)

    def head(self, stream):
        return self.last(super().head(stream)) * stream.text.mean() + stream.mod.sum()


def behind(rank: int, world: int) -> None:
    models = []
    plan = ParallelPlan(**{**vars(TinyLadder.plan), "last": ("out", "last")})
    mesh = make_mesh(ParallelConfig(cp=world), "cpu")
    x, t, target = batch(2, 11, torch.float64)
    for exact in (False, True):
        torch.manual_seed(0)
        model = BehindTheGather().double()
        if exact:
            model = verify.parallelize(model, plan, mesh)
        (model(x, t) - target).square().mean().backward()
        models.append(model)
    finish_gradients(models[1], mesh)
    assert_same_grads(gradients(models[1]), gradients(models[0]), 1e-12)


def test_what_is_behind_the_gather_counts_once():
    spawn(2, behind)
    spawn(4, behind)


def test_accumulation_and_frozen_weights():
    x, t, target = batch(2, 11, torch.float64)
    plain, exact = build(torch.float64), build(torch.float64)
    for model in (plain, exact):
        model.blocks[1].requires_grad_(False)
        model.embed.requires_grad_(False)
    exact = verify.parallelize(exact, TinyLadder.plan)
    for model in (plain, exact):
        for _ in range(2):
            (model(x, t) - target).square().mean().backward()
    assert_same_grads(gradients(exact), gradients(plain), 1e-12)
    assert exact.embed.weight.grad is exact.blocks[1].q.weight.grad is None


class Broken(TinyLadder):
    def layer(self, i, stream):
        stream = super().layer(i, stream)
        if i == 1:
            raise RuntimeError("no such layer")
        return stream


def test_an_error_in_a_layer_comes_out():
    torch.manual_seed(0)
    model = verify.parallelize(Broken(), TinyLadder.plan)
    with pytest.raises(RuntimeError, match="no such layer"):
        model(*batch(1, 7, torch.float32)[:2])


def test_memory_options_are_refused():
    with pytest.raises(ValueError, match="exact with recompute='full': exact mode runs"):
        verify.parallelize(TinyLadder(), TinyLadder.plan, memory=MemoryConfig(recompute="full"))


@pytest.mark.parametrize(
    ("layout", "world", "message"),
    [
        ({"cp": 3}, 3, r"exact needs Ulysses over all of 1, 2 or 4 ranks .* not ulysses=3 of 3"),
        ({"cp": 2}, 4, r"exact needs Ulysses over all of 1, 2 or 4 ranks .* not ulysses=2 of 4"),
        ({"ring": 2}, 2, r"exact needs Ulysses over all of 1, 2 or 4 ranks .* not ulysses=1 of 2"),
    ],
)
def test_layouts_that_cannot_be_verified(layout, world, message):
    with pytest.raises(ValueError, match=message):
        verify.check_layout(ParallelConfig(**layout), world)


def over_a_ring(rank: int, world: int) -> None:
    mesh = make_mesh(ParallelConfig(ring=2), "cpu")
    with pytest.raises(ValueError, match=r"exact needs Ulysses .* not ulysses=1 of 2"):
        verify.parallelize(build(torch.float32), TinyLadder.plan, mesh)


def test_a_mesh_that_cannot_be_verified():
    spawn(2, over_a_ring)


def different(rank: int, world: int) -> None:
    verify.parallelize(build(torch.float32, seed=rank), TinyLadder.plan, make_mesh(ParallelConfig(cp=2), "cpu"))


def test_ranks_with_different_weights_are_refused():
    with pytest.raises(RuntimeError, match="49 parameters differ between ranks"):
        spawn(2, different)
