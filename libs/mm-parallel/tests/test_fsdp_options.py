"""What `MemoryConfig` says about FSDP: the numbers of one device, and what was asked for, counted."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    clip_grad_norm,
    finish_gradients,
    load_parameters,
    make_mesh,
    parallelize,
)
from mm_parallel.fsdp import drop_gathered
from mm_parallel.grads import by_layout
from mm_parallel.mesh import data_rank
from mm_parallel.testing import TinyLadder, assert_same_grads, gradients, spawn

LAYERS = 4
SAMPLES = 8
OPTIONS = {
    "reshard": MemoryConfig(reshard=False),
    "prefetch 1": MemoryConfig(prefetch=1),
    "prefetch 9": MemoryConfig(prefetch=9),
    "offload_params": MemoryConfig(offload_params=True),
    "all": MemoryConfig("full", offload="inputs", reshard=False, prefetch=2, offload_params=True),
}


def build() -> TinyLadder:
    torch.manual_seed(0)
    return TinyLadder(LAYERS).double()


def batch(mesh=None) -> tuple[Tensor, Tensor]:
    """This rank's samples."""
    generator = torch.Generator().manual_seed(1)
    index, size = data_rank(mesh)
    shapes = ((SAMPLES, 6, 5), (SAMPLES, 3))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).chunk(size)[index] for s in shapes)


def train(model: TinyLadder, mesh=None) -> tuple[dict[str, Tensor], list[float], torch.optim.Optimizer]:
    """Three steps; gradients of the first, norms of all."""
    groups = [{"params": parameters} for parameters in by_layout(model.parameters())]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-4)
    first, norms = {}, []
    for _ in range(3):
        for tokens, t in zip(*(part.chunk(2) for part in batch(mesh)), strict=True):  # two micro-batches
            (model(tokens, t).square().mean() / 2).backward()
        finish_gradients(model, mesh)
        first = first or {name: grad.clone() for name, grad in gradients(model).items()}
        norms.append(clip_grad_norm(model, 0.1, mesh).item())
        optimizer.step()
        optimizer.zero_grad()
    return first, norms, optimizer


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def every_option(rank: int, world: int, replicate: int) -> int:
    single = build()
    expected, norms, _ = train(single)
    mesh = make_mesh(ParallelConfig(dp_replicate=replicate), "cpu")
    for meta in (False, True) if world == 2 else (True,):
        for memory in OPTIONS.values():
            model = build()
            values = {name: value.clone() for name, value in model.state_dict().items()}
            model = parallelize(model.to("meta") if meta else model, TinyLadder.plan, mesh, memory=memory)
            if meta:
                load_parameters(model, values, torch.device("cpu"))
            first, own_norms, optimizer = train(model, mesh)
            assert_same_grads(first, expected, 1e-10)
            torch.testing.assert_close(own_norms, norms, rtol=1e-10, atol=0)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(
                    whole(parameter).detach(), single.get_parameter(name).detach(), rtol=1e-10, atol=1e-10
                )
            state = optimizer.state_dict()["state"]
            assert len(state) == len(list(model.parameters()))
            assert {value.device.type for moments in state.values() for value in moments.values()} == {"cpu"}
    return len(OPTIONS)


@pytest.mark.parametrize(("world", "replicate"), [(2, 1), (4, 2)])
def test_three_steps_equal_one_device(world, replicate):
    assert spawn(world, every_option, replicate) == [len(OPTIONS)] * world


def collectives(rank: int, world: int) -> dict[bool, dict[str, int]]:
    mesh, counts = make_mesh(ParallelConfig(), "cpu"), {}
    for reshard in (True, False):
        model = parallelize(build(), TinyLadder.plan, mesh, memory=MemoryConfig(reshard=reshard))
        with warnings.catch_warnings(), CommDebugMode() as communication:
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # CommDebugMode's own
            model(*batch(mesh)).square().mean().backward()
        counts[reshard] = {str(op).split(".")[-1]: n for op, n in communication.get_comm_counts().items()}
    return counts


def test_without_reshard_weights_are_gathered_once():
    groups = LAYERS + 2  # layers, the time embedding, the root's own
    for counts in spawn(2, collectives):
        assert counts[True] == {"_allgather_base_": 2 * groups, "_reduce_scatter_base_": groups}
        assert counts[False] == {"_allgather_base_": groups, "_reduce_scatter_base_": groups}


def evaluations(rank: int, world: int, reshard: bool) -> tuple[float, float]:
    """What an evaluation is worth, and one with other weights after it."""
    mesh = make_mesh(ParallelConfig(), "cpu")
    model = parallelize(build(), TinyLadder.plan, mesh, memory=MemoryConfig(reshard=reshard))
    shards = list(model.parameters())
    with torch.no_grad():
        before = model(*batch(mesh)).norm().item()
        drop_gathered(model)
        assert all(a is b for a, b in zip(model.parameters(), shards, strict=True))
        for shard in shards:
            shard.mul_(0.5)
        return before, model(*batch(mesh)).norm().item()


def test_an_evaluation_sees_what_was_written_after_another():
    seen, expected = spawn(2, evaluations, False)[0], spawn(2, evaluations, True)[0]
    assert seen == expected
    assert seen[0] != seen[1]


class Reduced(TorchDispatchMode):
    """Bytes of whole gradients that are reduced over the ranks, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "reduce_scatter" in str(op):
            dtype = args[1].dtype
            self.sizes[dtype] = self.sizes.get(dtype, 0) + args[1].nbytes
        return op(*args, **(kwargs or {}))


def in_another_dtype(rank: int, world: int) -> list[dict[torch.dtype, int]]:
    """Two micro-batches, reduced in fp32 and in bf16: what is sent. What is kept in fp32 is the same to the bit."""
    mesh, sizes, found = make_mesh(ParallelConfig(), "cpu"), [], []
    tokens, t = (part.float() for part in batch(mesh))
    for reduce in ("float32", "bfloat16"):
        model = parallelize(build().float(), TinyLadder.plan, mesh, memory=MemoryConfig(reduce=reduce))
        with Reduced() as reduced:
            for _ in range(2):
                model(tokens, t).square().mean().backward()
        finish_gradients(model, mesh)
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
        sizes.append(reduced.sizes)
        found.append({name: whole(grad) for name, grad in gradients(model).items()})
    plain, narrow = found
    kept = TinyLadder.plan.fp32_parameters(build())
    for name, grad in plain.items():
        assert torch.equal(narrow[name], grad) == (name in kept), name
        torch.testing.assert_close(narrow[name], grad, rtol=2**-7, atol=2**-7 * grad.abs().max().item())
    return sizes


def test_gradients_are_reduced_in_the_dtype_that_is_asked_for():
    plain, narrow = spawn(2, in_another_dtype)[0]
    model = build()
    kept = TinyLadder.plan.fp32_parameters(model)
    padded = {name: -(-len(p) // 2) * 2 * p[0].numel() for name, p in model.named_parameters()}  # to parts of one size
    sharded = sum(number for name, number in padded.items() if name.startswith("time"))
    rest = sum(number for name, number in padded.items() if name not in kept)
    assert plain == {torch.float32: 2 * 4 * (rest + sharded)}
    assert narrow == {torch.float32: 2 * 4 * sharded, torch.bfloat16: 2 * 2 * rest}


class Journal(TorchDispatchMode):
    """When weights are gathered, and when layers begin."""

    def __init__(self, model: TinyLadder) -> None:
        super().__init__()
        self.lines: list[str] = []
        for i, block in enumerate(model.blocks):
            if block is not None:
                # on the first submodule to run in each direction: FSDP's own hooks on the block have run then
                block.norm.register_forward_pre_hook(lambda *_, i=i: self.lines.append(f"block {i}"))
                block.down.register_full_backward_pre_hook(lambda *_, i=i: self.lines.append(f"block {i}"))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "allgather" in str(op) or "all_gather_single" in str(op):
            self.lines.append("gather")
        return op(*args, **(kwargs or {}))


def order(rank: int, world: int, cases: list) -> list[tuple[list[str], list[str]]]:
    """What happens in the forward and in the backward, for every (prefetch, layers that are here)."""
    mesh = make_mesh(ParallelConfig(), "cpu")
    return [order_of(mesh, *case) for case in cases]


def order_of(mesh, ahead: int, mine: list[int]) -> tuple[list[str], list[str]]:
    model = build()
    for i in set(range(LAYERS)) - set(mine):
        model.blocks[i] = None
    model.forward = lambda x, t: run(model, mine, x, t)
    parallelize(model, TinyLadder.plan, mesh, memory=MemoryConfig(prefetch=ahead))
    with Journal(model) as journal, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        loss = model(*batch(mesh)).square().mean()
        forward = list(journal.lines)
        journal.lines.clear()
        loss.backward()
    return forward, journal.lines


def run(model: TinyLadder, layers: list[int], x: Tensor, t: Tensor) -> Tensor:
    stream = model.stem(x, t)
    for i in layers:
        stream = model.layer(i, stream)
    return model.head(stream)


def gathers_before(lines: list[str], layers: list[int]) -> list[int]:
    """How many gathers were begun before each layer was computed."""
    return [lines[: lines.index(f"block {i}")].count("gather") for i in layers]


def test_prefetch_gathers_earlier():
    layers, aheads, stem = list(range(LAYERS)), (0, 1, 2, 9), 2  # stem: the root's own and the time embedding
    *found, gap = spawn(2, order, [*((ahead, layers) for ahead in aheads), (9, [0, 1, 3])])[0]
    before = [gathers_before(forward, layers) for forward, _ in found]
    assert before == [
        [stem + 1, stem + 2, stem + 3, stem + 4],
        [stem + 2, stem + 3, stem + 4, stem + 4],
        [stem + 3, stem + 4, stem + 4, stem + 4],
        [stem + 4, stem + 4, stem + 4, stem + 4],
    ]
    back = [gathers_before(lines, layers[::-1]) for _, lines in found]
    assert back == [
        [3, 4, 5, 6],  # FSDP's own way: the root, this layer and the one below; the time embedding at the end
        [3, 4, 5, 6],
        [4, 5, 5, 6],
        [5, 5, 5, 6],
    ]
    assert {lines.count("gather") for pair in found for lines in pair} == {LAYERS + stem}
    # layer 2 is another pipeline stage's: what is behind it is gathered when it is its turn
    assert gathers_before(gap[0], [0, 1, 3]) == [stem + 2, stem + 2, stem + 3]


def unwanted(rank: int, world: int, memory: MemoryConfig, parallel: ParallelConfig) -> None:
    parallelize(build(), TinyLadder.plan, make_mesh(parallel, "cpu"), parallel, memory)


def test_impossible_options_are_refused():
    with pytest.raises(RuntimeError, match=r"ValueError: prefetch=-1: must be 0 .* or how many layers"):
        spawn(2, unwanted, MemoryConfig(prefetch=-1), ParallelConfig())
    with pytest.raises(
        RuntimeError, match=r"ValueError: offload_params .* nothing is sharded here \(2 ranks \(tp 2\)\)"
    ):
        spawn(2, unwanted, MemoryConfig(offload_params=True), ParallelConfig(tp=2))
    with pytest.raises(ValueError, match=r"offload_params .* nothing is sharded here \(1 rank\): leave it out"):
        parallelize(build(), TinyLadder.plan, memory=MemoryConfig(offload_params=True))
    with pytest.raises(RuntimeError, match=r"ValueError: reduce='fp16': there are 'float32' and 'bfloat16'"):
        spawn(2, unwanted, MemoryConfig(reduce="fp16"), ParallelConfig())
