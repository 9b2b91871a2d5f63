"""What runs again in the backward, counted; and that nothing of the numbers changes."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mm_parallel import MemoryConfig, ParallelConfig, ParallelPlan, finish_gradients, make_mesh, parallelize
from mm_parallel.attention import KEPT, core
from mm_parallel.testing import TinyLadder, assert_same_grads, gradients, spawn

LAYERS = 3
LINEARS = 6  # of a block


def build(memory: MemoryConfig | None = None, dtype=torch.float64, compute=None, mesh=None) -> TinyLadder:
    torch.manual_seed(0)
    model = TinyLadder(LAYERS, compute).to(dtype)
    model.core = core
    return model if memory is None else parallelize(model, TinyLadder.plan, mesh, memory=memory, dtype=compute)


def batch(dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((4, 6, 5), (4, 3)))


class Count(TorchDispatchMode):
    """How often each op runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops[op] += 1
        return op(*args, **(kwargs or {}))


def step(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Tensor, int, int]:
    """The loss; how often attention ran, and how many linears in the backward's recompute."""
    with Count() as forward:
        loss = model(*data).square().mean()
    with Count() as backward:
        loss.backward()
    aten = torch.ops.aten
    linears = sum(backward.ops[op] for op in (aten.addmm.default, aten.linear.default))
    return loss.detach(), sum((forward.ops + backward.ops)[op] for op in KEPT), linears


CASES = [  # memory, how often attention runs in each layer, in which the linears run again
    (MemoryConfig(), (1, 1, 1), (0, 0, 0)),
    (MemoryConfig("full"), (2, 2, 2), (1, 1, 1)),
    (MemoryConfig("but_attention"), (1, 1, 1), (1, 1, 1)),
    (MemoryConfig(2), (2, 2, 1), (1, 1, 0)),
    (MemoryConfig(0), (1, 1, 1), (0, 0, 0)),
    (MemoryConfig(1, but_attention=1), (2, 1, 1), (1, 1, 0)),
    (MemoryConfig(but_attention=2), (1, 1, 1), (1, 1, 0)),
    (MemoryConfig(("but_attention", "none", "full")), (1, 1, 2), (1, 0, 1)),
    (MemoryConfig(["full", "full", "none"]), (2, 2, 1), (1, 1, 0)),  # as a configuration file may give it
]


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("memory", "attentions", "again"), CASES, ids=lambda case: str(case) if case else "")
def test_attention_and_linears_are_counted_and_gradients_are_the_same_bits(memory, attentions, again, compute):
    dtype = torch.float64 if compute is None else torch.float32
    plain, model = build(dtype=dtype, compute=compute), build(memory, dtype, compute)
    expected, once, _ = step(plain, batch(dtype))
    loss, ran, linears = step(model, batch(dtype))
    assert torch.equal(loss, expected)
    assert (once, ran) == (LAYERS, sum(attentions))
    assert linears == LINEARS * sum(again)
    assert_same_grads(gradients(model), gradients(plain), 0.0)


def sharded(rank: int, world: int) -> None:
    mesh = make_mesh(ParallelConfig(), "cpu")
    for compute, dtype in ((None, torch.float64), (torch.bfloat16, torch.float32)):
        data = tuple(part.chunk(world)[rank] for part in batch(dtype))
        plain = build(MemoryConfig(), dtype, compute, mesh)
        expected, _, _ = step(plain, data)
        finish_gradients(plain, mesh)
        for memory, attentions, _ in CASES:
            model = build(memory, dtype, compute, mesh)
            loss, ran, _ = step(model, data)
            finish_gradients(model, mesh)
            assert torch.equal(loss, expected)
            assert ran == sum(attentions)
            assert_same_grads(gradients(model), gradients(plain), 0.0)
            dist.barrier()


def test_the_same_when_sharded():
    spawn(2, sharded)


def test_our_attention_takes_the_seam_only_where_it_must():
    for memory, seam in ((MemoryConfig("full"), "attention"), (MemoryConfig(1, but_attention=1), "core")):
        model = parallelize(TinyLadder(), TinyLadder.plan, memory=memory)
        assert model.core.__name__ == seam
    model = TinyLadder()
    model.double()
    kept = parallelize(copy.deepcopy(model), TinyLadder.plan, memory=MemoryConfig("but_attention"))
    torch.testing.assert_close(kept(*batch()), model(*batch()), rtol=1e-12, atol=1e-12)


def test_a_causal_ladder_stays_causal():
    model = parallelize(TinyLadder(causal=True).double(), TinyLadder.plan, memory=MemoryConfig("but_attention"))
    tokens, t = batch()
    before = model(tokens, t)
    after = model(torch.cat((tokens[:, :-1], tokens[:, -1:] + 1), 1), t)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1:], after[:, -1:])


@pytest.mark.parametrize("mine", [(0, 1), (2, 3), (0, 3)])
def test_part_of_a_pipeline_takes_its_own_words(mine):
    words = ("full", "none", "but_attention", "full")
    model = TinyLadder(4)
    for i in set(range(4)) - set(mine):
        model.blocks[i] = None
    parallelize(model, TinyLadder.plan, memory=MemoryConfig(words))
    assert [getattr(model.blocks[i].forward, "word", "none") for i in mine] == [words[i] for i in mine]


def test_a_number_counts_the_layers_of_each_pipeline_rank():
    model = TinyLadder(6)
    for i in (0, 1, 2):
        model.blocks[i] = None
    parallelize(model, TinyLadder.plan, memory=MemoryConfig(1, but_attention=5))  # 5: all that are left
    assert [model.blocks[i].forward.word for i in (3, 4, 5)] == ["full", "but_attention", "but_attention"]


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (MemoryConfig(4), r"recompute=4 and but_attention=0 layers: the model has 3, .* together at most 3"),
        (MemoryConfig(-1), "recompute=-1 .* the model has 3"),
        (MemoryConfig(2, but_attention=2), "recompute=2 and but_attention=2 layers: the model has 3"),
        (MemoryConfig(2, but_attention=-1), "recompute=2 and but_attention=-1 layers"),
        (MemoryConfig("full", but_attention=1), "but_attention=1 .* not recompute='full': give a number"),
        (MemoryConfig(("full",) * 3, but_attention=1), "but_attention=1 .* give a number"),
        (MemoryConfig("some"), "recompute='some': give one of none, full, but_attention, how many of the 3 layers"),
        (MemoryConfig(1.5), r"recompute=1.5: .* \(0 … 3\)"),
        (MemoryConfig(True), "recompute=True: give one of"),
        (MemoryConfig(("full", "none")), "recompute has 2 words: give one of .* for each of the 3 layers"),
        (MemoryConfig(("full", "none", "fulll")), "3 words, 'fulll' among them: give one of none, full"),
        (MemoryConfig("full", offload="attention"), r"no layer recomputes so \(full\): set recompute or but_attention"),
        (MemoryConfig(offload="attention"), r"no layer recomputes so \(none\)"),
        (MemoryConfig(0, offload="inputs"), "no layer recomputes: set recompute"),
        (MemoryConfig("full", offload="disk"), "offload='disk': there are none, attention and inputs"),
    ],
)
def test_impossible_wishes_are_refused(memory, message):
    with pytest.raises(ValueError, match=message):
        parallelize(TinyLadder(), TinyLadder.plan, memory=memory)


def test_a_model_whose_attention_cannot_be_named_is_refused():
    for plan, message in (
        (ParallelPlan(layers=("blocks.*",)), "its tokens .* are empty"),
        (ParallelPlan(layers=("blocks.*",), tokens={"x": 1}, core="heart"), "no seam 'heart'"),
    ):
        with pytest.raises(ValueError, match=message):
            parallelize(TinyLadder(), plan, memory=MemoryConfig("but_attention"))


def test_a_layer_that_goes_past_the_seam_is_never_recomputed_in_full_silently():
    model = parallelize(TinyLadder(), TinyLadder.plan, memory=MemoryConfig("but_attention"))
    model.core = lambda q, k, v, sequence: v
    with pytest.raises(
        ValueError, match=r"blocks\.0 cannot recompute all but attention: none of mm_parallel\.attention"
    ):
        model(torch.randn(2, 4, 5), torch.randn(2, 3))


@pytest.mark.parametrize("word", ["full", "but_attention"])
def test_a_copy_recomputes_with_its_own_weights(word):
    model = parallelize(TinyLadder(), TinyLadder.plan, memory=MemoryConfig(word))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].table.zero_()
        twin.blocks[0].up.weight.zero_()
    inputs = torch.randn(2, 4, 5), torch.randn(2, 3)
    assert not torch.allclose(model(*inputs), twin(*inputs))
