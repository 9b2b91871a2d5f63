"""Compiled layers: loss and every gradient as without, in every layout; few codes; nothing falls back silently."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mm_parallel import MemoryConfig, ParallelConfig, Pipeline, finish_gradients, make_mesh, parallelize
from mm_parallel.compile import MOST_CODES, check_compiler, compile_layers, count_graphs
from mm_parallel.testing import TinyLadder, assert_same_grads, gradients, spawn
from mm_parallel.testing.equivalence import Case, Subject, check


def build() -> TinyLadder:
    torch.manual_seed(0)
    return TinyLadder(4).double()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"tokens": (8, 6, 5), "t": (8, 3), "target": (8, 6, 5)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


SUBJECT = Subject(build, lambda model: TinyLadder.plan, batch)
ALONE = [
    Case("plain"),
    Case("full", memory=MemoryConfig("full")),
    Case("but-attention", memory=MemoryConfig("but_attention")),
    Case("some", memory=MemoryConfig(1, but_attention=1)),
    Case("offload", memory=MemoryConfig("but_attention", offload="attention")),
    Case("inputs", memory=MemoryConfig("full", offload="inputs")),
]
TWO = [
    Case("shards", ParallelConfig(dp_shard=2)),
    Case("kept", ParallelConfig(dp_shard=2), MemoryConfig("but_attention", reshard=False, prefetch=2), meta=True),
    Case("ulysses", ParallelConfig(dp_shard=1, ulysses=2)),
    Case("ulysses, full", ParallelConfig(dp_shard=1, ulysses=2), MemoryConfig("full")),
    Case("ring", ParallelConfig(dp_shard=1, ring=2), micro_batches=2),
    Case("ring, but-attention", ParallelConfig(dp_shard=1, ring=2), MemoryConfig("but_attention", offload="attention")),
    Case("tensor", ParallelConfig(dp_shard=1, tp=2)),
    Case("tensor, but-attention", ParallelConfig(dp_shard=1, tp=2), MemoryConfig("but_attention")),
    Case("pipeline", ParallelConfig(dp_shard=1, pp_layers=(1, 3)), MemoryConfig("full"), micro_batches=2),
]


@pytest.fixture(autouse=True)
def from_nothing():
    torch._dynamo.reset()


def compiled(rank: int, world: int, cases: list[Case]) -> None:
    check(rank, world, SUBJECT, [replace(case, compile="aot_eager", steps=1) for case in cases])


def test_recompute_and_offload_are_outside_of_the_code():
    before = count_graphs()
    compiled(0, 1, ALONE)
    assert count_graphs() - before == 3  # before and behind attention; before, where x needs no gradient


def test_on_two_ranks():
    spawn(2, compiled, TWO, timeout=300)


def compare(model: TinyLadder, twin: TinyLadder, tokens: Tensor, t: Tensor) -> None:
    """Output and every gradient of two models."""
    outputs = []
    for one in (model, twin):
        one.zero_grad()
        outputs.append(one(tokens, t))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    assert_same_grads(gradients(twin), gradients(model), 1e-12)


def pair(layers: int) -> tuple[TinyLadder, TinyLadder]:
    torch.manual_seed(0)
    model = TinyLadder(layers).double()
    twin = copy.deepcopy(model)
    compile_layers(twin, twin.plan, "aot_eager")
    return model, twin


def draw(samples: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, tokens, 5).double(), torch.randn(samples, 3).double()


def test_layers_share_one_code_and_sizes_share_another():
    for layers in (2, 6):
        torch._dynamo.reset()
        before, pairs, graphs = count_graphs(), pair(layers), []
        for size in ((2, 6), (2, 9), (3, 5), (5, 11), (4, 7)):
            compare(*pairs, *draw(*size))
            graphs.append(count_graphs() - before)
        assert graphs == [2, 4, 6, 6, 6]  # the first; another number of tokens, of samples; and then any


def test_without_gradients():
    model, twin = pair(2)
    data = draw(2, 6)
    compare(model, twin, *data)
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(*data), model.eval()(*data), rtol=1e-12, atol=1e-12)
    compare(model.train(), twin.train(), *data)


def test_a_copy_has_its_own_layers():
    _, twin = pair(2)
    other, data = copy.deepcopy(twin), draw(2, 6)
    with torch.no_grad():
        before = twin(*data)
        for parameter in other.parameters():
            parameter.mul_(2)
        assert torch.equal(twin(*data), before)
        assert not torch.allclose(other(*data), before)


def frozen(rank: int, world: int) -> None:
    """Layers of a class that are trained, and others that are not, gathered by FSDP: torch looks at these less."""
    mesh = make_mesh(ParallelConfig(), "cpu")
    tokens, t = draw(2 * world, 6)
    for own in ([0, 1], [2], [1, 3], []):
        model, twin = build(), build()
        for one in (model, twin):
            for number in own:
                one.blocks[number].requires_grad_(False)
        parallelize(twin, twin.plan, mesh, compile="aot_eager")
        model(tokens, t).square().sum().div(world).backward()
        twin(tokens.chunk(world)[rank], t.chunk(world)[rank]).square().sum().backward()
        finish_gradients(twin, mesh)
        assert_same_grads(gradients(twin), gradients(model), 1e-10)


def test_frozen_layers():
    spawn(2, frozen)


def test_too_many_codes_are_an_error():
    _, twin = pair(2)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2), torch.no_grad():
        for samples, tokens in ((2, 6), (2, 9)):
            twin(*draw(samples, tokens))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            twin(*draw(1, 9))


def test_too_many_codes_are_an_error_in_another_thread_too():
    """Recompute on CUDA runs layers in a thread of autograd, and settings of torch are those of a thread."""
    _, twin = pair(2)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(twin, *draw(2, 6)).result()
        assert pool.submit(lambda: torch._dynamo.config.recompile_limit).result() == MOST_CODES
        assert pool.submit(lambda: torch._dynamo.config.fail_on_recompile_limit_hit).result()


def split(rank: int, world: int) -> None:
    parallel = ParallelConfig(pp_layers=(2, 2), schedule="zero_bubble")
    with pytest.raises(ValueError, match="schedule zero_bubble with compile: it splits a backward in two"):
        Pipeline(build(), TinyLadder.plan, make_mesh(parallel, "cpu"), parallel, compile=True)


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    spawn(2, split)
    check_compiler("cpu")
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        with pytest.raises(ValueError, match="TORCH_COMPILE_DISABLE=1 is in the environment"):
            check_compiler("cpu")
    # torch's own patch: monkeypatch would leave the setting hidden, for all tests after this
    none = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with none, pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler for the CPU, and there is none"):
        check_compiler("cpu")
    with pytest.raises(ValueError, match="compile works on CUDA and on the CPU, this is npu: leave compile out"):
        check_compiler("npu")
