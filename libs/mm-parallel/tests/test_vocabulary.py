"""A vocabulary over tensor-parallel ranks: losses, logits and every gradient of one device."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_parallel import ParallelConfig, ParallelPlan, data_rank, finish_gradients, make_mesh, parallelize, vocabulary
from mm_parallel.estimate.peak import PeakMemory
from mm_parallel.testing import assert_same_grads, gradients, spawn

TOKENS, DIM = 24, 6
PLAN = ParallelPlan(("blocks.*",), heads=4, columns=("blocks.*.0",), rows=("blocks.*.2",))
APART, TIED = replace(PLAN, vocabulary=("lm_head", "embed")), replace(PLAN, vocabulary=("embed",))


class Speaker(nn.Module):
    def __init__(self, tied: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.embed = nn.Embedding(TOKENS, DIM)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM, bias=False)) for _ in range(2)
        )
        self.lm_head = None if tied else nn.Linear(DIM, TOKENS, bias=False)
        self.token_losses, self.token_logits = token_losses, lambda x, weight: F.linear(x, weight.to(x.dtype))

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        x = x.to(self.dtype or x.dtype)
        weight = (self.lm_head or self.embed).weight
        return self.token_logits(x, weight) if labels is None else self.token_losses(x, weight, labels)


def token_losses(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype))
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def build(tied: bool, dtype: torch.dtype = torch.float64) -> Speaker:
    torch.manual_seed(0)
    return Speaker(tied).to(dtype)


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    """Labels on both halves of the vocabulary, at its borders, on few rows, on none."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(TOKENS, (rows, 7), generator=generator)
    labels = torch.randint(TOKENS, (rows, 7), generator=generator)
    labels[0, :5], labels[1], labels[2, :4] = -100, -100, torch.tensor([0, 11, 12, 23])
    return ids, labels


def same_numbers(rank: int, world: int, tied: bool, layout: dict, chunk: int) -> None:
    vocabulary.LOGITS = chunk
    mesh = make_mesh(ParallelConfig(**layout), "cpu")
    single, model = build(tied), parallelize(build(tied), TIED if tied else APART, mesh)
    ids, labels = batch()
    weights = torch.arange(1, 1 + labels.numel(), dtype=torch.float64).view_as(labels)  # losses count unlike each other
    expected = single(ids, labels)
    (expected * weights).sum().backward()
    index, parts = data_rank(mesh)
    ids, labels, weights, expected = (part.chunk(parts)[index] for part in (ids, labels, weights, expected))
    losses = model(ids, labels)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    assert losses[labels == -100].eq(0).all()
    ((losses * weights).sum() * parts).backward()
    finish_gradients(model, mesh)
    assert_same_grads(gradients(model), gradients(single), 1e-12)
    for p in (model.embed.weight, *([] if tied else [model.lm_head.weight])):
        assert isinstance(p, DTensor)
        assert "tp" in p.device_mesh.mesh_dim_names

    for p in (*single.parameters(), *model.parameters()):
        p.grad = None
    logits, everything = model(ids), single(batch()[0])
    torch.testing.assert_close(logits, everything.chunk(parts)[index], rtol=1e-12, atol=0)
    everything.square().sum().backward()
    (logits.square().sum() * parts).backward()
    finish_gradients(model, mesh)
    assert_same_grads(gradients(model), gradients(single), 1e-12)


@pytest.mark.parametrize(
    ("world", "tied", "layout", "chunk"),
    [
        (2, False, {"tp": 2}, 2**26),
        (2, True, {"tp": 2}, 40),  # three rows at a time
        (4, True, {"tp": 2}, 1),
        (4, False, {"tp": 4}, 40),
    ],
)
def test_losses_logits_and_gradients_equal_one_device(world, tied, layout, chunk):
    spawn(world, same_numbers, tied, layout, chunk)


def special_cases(rank: int, world: int) -> list[str]:
    mesh = make_mesh(ParallelConfig(tp=2), "cpu")
    model = parallelize(build(False), APART, mesh)
    ids, labels = batch()
    for few in (labels[1:2], labels[:, :0]):  # no label; no token
        losses = model(ids[1:2] if len(few) == 1 else ids[:, :0], few)
        assert losses.shape == few.shape
        losses.sum().backward()
        assert all(p.grad.to_local().eq(0).all() for p in (model.lm_head.weight, model.embed.weight))

    sent, gather, reduce = [], dist.all_gather, dist.all_reduce
    dist.all_gather = lambda to, x, **named: (sent.append(("gather", x.numel())), gather(to, x, **named))
    dist.all_reduce = lambda x, **named: (sent.append(("sum", x.numel())), reduce(x, **named))
    try:
        x = torch.randn(1, 9, DIM, dtype=torch.float64, requires_grad=True)
        model.token_losses(x, model.lm_head.weight, labels.flatten()[None, 3:12]).sum().backward()
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    rows = int((labels.flatten()[3:12] != -100).sum())
    assert sent == [("gather", 2 * rows), ("sum", DIM * rows)], sent

    half = parallelize(build(False, torch.float32), APART, mesh)
    half.dtype = torch.bfloat16
    alone = build(False, torch.float32)
    alone.dtype = torch.bfloat16
    losses, expected = half(ids, labels), alone(ids, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=2e-2)
    (losses.sum() + 0 * half(ids).sum()).backward()
    (expected.sum() + 0 * alone(ids).sum()).backward()
    assert_same_grads(gradients(half), gradients(alone), 3e-2)
    assert half.lm_head.weight.grad.dtype == torch.float32

    said = []
    tied = build(False)
    tied.lm_head.weight = tied.embed.weight
    odd = build(False)
    odd.lm_head = nn.Linear(DIM, 25, bias=False)
    for wrong, plan in (
        (odd, APART),
        (tied, APART),
        (build(False), replace(APART, vocabulary=("blocks.0.1",))),
        (build(False), replace(APART, heads={"key-value heads": 1, "heads": 4})),
        (build(False), replace(APART, losses="loss")),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
            parallelize(wrong, plan, mesh)
        said.append(str(error.value))
    with pytest.raises(ValueError, match=r"labels are 3 … 24, but the vocabulary has 24 tokens: 0 … 23, or -100"):
        model(ids[:1, :2], torch.tensor([[3, 24]]))
    return said


def test_no_labels_what_is_sent_bf16_and_refusals():
    odd, tied, other, heads, seam = spawn(2, special_cases)[0]
    assert odd == "25 tokens of lm_head cannot be cut over tp=2: for this model tp can be 1"
    assert tied == "plan.vocabulary: embed and lm_head share a weight; name the embedding alone"
    assert other == "plan: blocks.0.1 is of type GELU; tp can only cut Linear and Embedding there"
    assert heads == "1 key-value heads cannot be cut over tp=2: for this model tp can be 1"
    assert seam == "the plan's seam 'loss' is no attribute of Speaker"


def peaks(rank: int, world: int) -> list[int]:
    """Bytes at the most, forward and backward, with all logits at once and with few."""
    group, found = make_mesh(ParallelConfig(tp=2), "cpu").get_group("tp"), []
    labels = torch.randint(4096, (1, 512)).masked_fill(torch.rand(1, 512) < 0.5, -100)
    for vocabulary.LOGITS in (2**26, 2**14):
        x, weight = (torch.randn(size, requires_grad=True) for size in ((1, 512, 8), (2048, 8)))
        with PeakMemory() as memory:
            vocabulary.token_losses(x, weight, labels, group).sum().backward()
        found.append(memory.peak)
    return found


def test_logits_exist_in_chunks_of_rows_with_a_label():
    rows = 256  # about
    for everything, few in spawn(2, peaks):
        assert rows * 2048 * 4 < everything < 3 * rows * 2048 * 4  # this rank's half, never of all rows
        assert few < 8 * 2048 * 8 * 4  # a few times the weight
