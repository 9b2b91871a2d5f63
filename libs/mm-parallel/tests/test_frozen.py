"""Frozen matrices in 8 and 4 bits, and in the host's memory: what they come back as; gradients do not notice."""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    load_parameters,
    parallelize,
    verify,
)
from mm_parallel.attention import core
from mm_parallel.estimate import estimate_memory
from mm_parallel.estimate.peak import PeakMemory
from mm_parallel.fits import check_fits
from mm_parallel.frozen import FrozenLinear, frozen_linears, spread
from mm_parallel.quantise import NF4, find_pairs, pack, unpack
from mm_parallel.testing import TinyLadder, TwoLadders, assert_same_grads, gradients, spawn
from mm_parallel.testing.equivalence import Case, Subject, check
from mm_parallel.testing.memory import measure_memory

M = MemoryConfig
QUANTISED = ("fp8", "int8", "nf4")
CPU = torch.device("cpu")


class Adapter(nn.Module):
    """A linear and what is trained beside it, with the names of peft."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        return self.base_layer(x) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def build(kind: type[TinyLadder] = TinyLadder, layers: int = 3, dtype: torch.dtype = torch.float64) -> TinyLadder:
    """A frozen base of this dtype, with adapters beside q and down."""
    torch.manual_seed(0)
    model = kind(layers).to(dtype).requires_grad_(False)
    for ladder in (model, model.tower) if kind is TwoLadders else (model,):
        for block in ladder.blocks:
            block.q, block.down = Adapter(block.q).to(dtype), Adapter(block.down).to(dtype)
    return model


def batch(seed: int, samples: int = 4, kind: type[TinyLadder] = TinyLadder) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"tokens": (samples, 6, 5), "t": (samples, 3)} | ({"image": (4, 6, 5)} if kind is TwoLadders else {})
    return {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}


def learn(model: nn.Module, count: int = 2) -> list[Tensor]:
    """Losses of some micro-batches; gradients stay with the parameters."""
    losses = []
    for seed in range(count):
        losses.append(model(**batch(seed, kind=type(model))).square().mean())
        losses[-1].backward()
    return [loss.detach() for loss in losses]


def dequantise(model: nn.Module, base: str) -> nn.Module:
    """The same model, with whole matrices that have the values of the codes."""
    held = parallelize(copy.deepcopy(model), model.plan, memory=M(base=base))
    with torch.no_grad():
        for name, linear in frozen_linears(held).items():
            weight = model.get_parameter(name)
            weight.copy_(linear.read(weight.dtype, weight.device))
    return model


# Codes


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_comes_back_near(kind: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(70, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix[3] = 0
    packed = pack(kind, matrix)
    back = unpack(kind, packed, matrix.shape, dtype, find_pairs())
    assert back.dtype == dtype
    assert back.shape == matrix.shape
    assert not back[3].any()
    error = (back.float() - matrix.float()).norm() / matrix.float().norm()
    assert error < {"fp8": 0.03, "int8": 0.01, "nf4": 0.1}[kind]
    expected = 70 * 33 + 70 * dtype.itemsize if kind != "nf4" else 37 * (32 + dtype.itemsize)
    assert sum(x.nbytes for x in packed) == expected
    meta = pack(kind, matrix.to("meta"))
    assert [(x.shape, x.dtype) for x in meta] == [(x.shape, x.dtype) for x in packed]


def test_eight_bits_are_of_the_largest_in_a_row() -> None:
    matrix = torch.tensor([[127.0, -64.0, 0.6, 0.4], [0.0, -1.0, 0.5, 0.25]])
    codes, scale = pack("int8", matrix)
    assert codes.tolist() == [[127, -64, 1, 0], [0, -127, 64, 32]]
    assert scale.flatten().tolist() == [1.0, pytest.approx(1 / 127)]
    codes, scale = pack("fp8", matrix * 448 / 127)
    assert codes.float()[0].tolist() == [448.0, -224.0, 2.0, 1.375]  # 225.8, 2.12 and 1.41 to four bits
    assert scale.flatten().tolist() == [1.0, pytest.approx(1 / 127)]


def test_nf4_is_that_of_bitsandbytes() -> None:
    """The bytes are those of bitsandbytes 0.50.2: quantize_4bit(x, blocksize=64, quant_type="nf4")."""
    x = (torch.arange(128).sin() * torch.arange(128).cos().exp()).view(2, 64)
    codes, scale = pack("nf4", x)
    made = "7fc7402fd8510eea620afb7304fc8511fe9620dfa7307fc7402fd8511ee9620bfb7305fc8511fe9620dea7308fc7403fd8511ee9620bfb7305fc8511fe9610de"  # noqa: E501
    assert bytes(codes.flatten().tolist()).hex() == made
    assert scale.flatten().tolist() == pytest.approx([1.4562188386917114, 1.4585226774215698])
    numbers = torch.tensor(NF4)
    nearest = (x[..., None] / scale[..., None] - numbers).abs().argmin(-1)
    assert torch.equal(unpack("nf4", (codes, scale), x.shape, x.dtype, find_pairs()), numbers[nearest] * scale)


# Layers


@pytest.mark.parametrize("memory", [M(), M("full"), M(1, but_attention=1), M("full", offload="inputs")], ids=repr)
@pytest.mark.parametrize("base", QUANTISED)
def test_gradients_are_those_of_whole_matrices(base: str, memory: MemoryConfig) -> None:
    model = build()
    plain = parallelize(dequantise(copy.deepcopy(model), base), model.plan, memory=memory)
    held = parallelize(model, model.plan, memory=replace(memory, base=base, host_layers=2))
    assert len(frozen_linears(held)) == 18
    assert not frozen_linears(held).keys() & held.state_dict().keys()
    assert torch.equal(torch.stack(learn(held)), torch.stack(learn(plain)))
    assert_same_grads(gradients(held), gradients(plain), 0.0)


@pytest.mark.parametrize("kind", [TinyLadder, TwoLadders])
@pytest.mark.parametrize("memory", [M(), M("but_attention")], ids=repr)
def test_layers_on_the_host_change_no_bit(kind: type[TinyLadder], memory: MemoryConfig) -> None:
    model = build(kind, 5)
    plain = parallelize(copy.deepcopy(model), model.plan, memory=memory)
    held = parallelize(model, model.plan, memory=replace(memory, host_layers=5))
    twin = copy.deepcopy(held)
    for one in (held, twin):
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(one(**batch(7, kind=kind)), plain(**batch(7, kind=kind)))
            one.zero_grad()
            plain.zero_grad()
            assert torch.equal(torch.stack(learn(one)), torch.stack(learn(plain)))
            assert_same_grads(gradients(one), gradients(plain), 0.0)


def test_a_bias_that_is_trained_learns() -> None:
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    plain, held = copy.deepcopy(model), parallelize(model, model.plan, memory=M(host_layers=1))
    learn(held)
    learn(plain)
    assert gradients(held)["blocks.1.v.bias"].any()
    assert_same_grads(gradients(held), gradients(plain), 0.0)


class Journal(logging.Handler):
    """Numbers of the layers that come."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(int(record.getMessage().removesuffix(" comes")))


@pytest.fixture
def journal() -> Iterator[Journal]:
    logger, found = logging.getLogger("mm_parallel.waiting"), Journal()
    level = logger.level
    logger.addHandler(found)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.removeHandler(found)
    logger.setLevel(level)


def test_layers_come_one_ahead_and_only_what_is_not_there(journal: Journal) -> None:
    held = parallelize(build(layers=5), TinyLadder.plan, memory=M("full", host_layers=5))
    host = frozen_linears(held)["blocks.0.v.weight"].host

    def come(work: Callable[[], object]) -> list[int]:
        journal.lines.clear()
        work()
        return list(journal.lines)

    assert come(lambda: learn(held, 1)) == [0, 1, 2, 3, 4, 2, 1, 0]
    assert come(lambda: learn(held, 2)) == [2, 3, 4, 2, 1, 0] * 2
    with torch.no_grad():  # no backward comes, but perhaps another forward
        assert come(lambda: held(**batch(0))) == [2, 3, 4, 0]
        assert come(lambda: held(**batch(0))) == [1, 2, 3, 4, 0]
    assert host.copied == (8 + 12 + 4 + 5) * sum(x.nbytes for x in host.units[0])


def test_the_device_holds_two_layers() -> None:
    """A step makes no more than without, but two buffers and one matrix."""

    def peak(memory: MemoryConfig) -> int:
        model = parallelize(build(layers=8), TinyLadder.plan, memory=memory)
        with PeakMemory() as made:
            learn(model, 1)
            del model
        return made.peak

    host = frozen_linears(parallelize(build(layers=8), TinyLadder.plan, memory=M(host_layers=8)))
    largest = host["blocks.0.v.weight"].host.largest
    assert largest < 1.3 * sum(linear.held[0].nbytes for name, linear in host.items() if "blocks.0." in name)
    plain, held = peak(M("full")), peak(M("full", host_layers=8))
    assert plain + largest < held <= plain + 2 * largest


@pytest.mark.parametrize("memory", [M("full", base="nf4", host_layers=6), M(base="fp8"), M(host_layers=1)], ids=repr)
def test_an_estimate_knows_what_is_held_where(memory: MemoryConfig) -> None:
    dtype = torch.float32
    with torch.device("meta"):
        outline = build(layers=8, dtype=dtype)
    outline.core = core
    example = {name: x.float().to("meta") for name, x in batch(0).items()}
    how = (outline, outline.plan, ParallelConfig().resolve(1), memory, dtype, example)
    (said,) = estimate_memory(*how, losses=lambda y: y.square())
    model = build(layers=8, dtype=dtype)
    model.core = core
    held = parallelize(model, model.plan, memory=memory)
    found = measure_memory(
        held,
        held,
        1,
        lambda _: {name: x.float() for name, x in batch(0).items()},
        lambda y, _: y.square(),
        None,
    )
    assert {name: getattr(said, name) for name in ("parameters", "gradients", "moments")}.items() <= found.items()
    frozen = frozen_linears(held).values()
    waiting = [x for linear in frozen if linear.host for x in linear.held]
    assert said.waiting == said.host == sum(x.nbytes for x in waiting)
    assert said.peak - (said.parameters - said.waiting) - said.moments == pytest.approx(found["peak"], rel=0.03)


def test_layers_that_wait_are_spread() -> None:
    assert spread(2, 4) == [1, 3]
    assert spread(3, 10) == [1, 5, 8]
    assert spread(9, 4) == [0, 1, 2, 3]
    assert spread(0, 4) == []


# Loading


@pytest.mark.parametrize("memory", [M(base="nf4"), M(host_layers=2), M(base="int8", host_layers=1)], ids=repr)
def test_weights_are_packed_while_they_are_read(memory: MemoryConfig) -> None:
    torch.manual_seed(0)
    source = build().state_dict()
    with torch.device("meta"):
        model = build()
    held = parallelize(model, model.plan, memory=memory)
    load_parameters(held, source, CPU)
    whole = parallelize(build(), TinyLadder.plan, memory=memory)
    with torch.no_grad():
        assert torch.equal(held(**batch(0)), whole(**batch(0)))
    assert all(linear.is_finite() for linear in frozen_linears(held).values())
    largest = max(x.nbytes for x in source.values())
    with torch.device("meta"):
        model = parallelize(build(), TinyLadder.plan, memory=memory)
    with PeakMemory() as made:
        load_parameters(model, source, CPU)
        at_the_end = made.now
    assert made.peak <= at_the_end + 4 * largest  # of one matrix: in fp32, its codes before they are packed
    name = next(iter(frozen_linears(model)))
    source[name][0, 0] = float("nan")
    load_parameters(model, source, CPU)
    assert [other for other, one in frozen_linears(model).items() if not one.is_finite()] == [name]


def test_a_weight_that_does_not_fit_is_refused() -> None:
    with torch.device("meta"):
        model = build()
    held = parallelize(model, model.plan, memory=M(base="nf4"))
    source = build().state_dict()
    with pytest.raises(ValueError, match=r"1 missing, 0 unexpected; missing: blocks\.0\.v\.weight"):
        load_parameters(held, {name: x for name, x in source.items() if name != "blocks.0.v.weight"}, CPU)
    with pytest.raises(ValueError, match=r"blocks.0.v.weight has shape \(5, 5\), but the model needs \(12, 12\)"):
        load_parameters(held, source | {"blocks.0.v.weight": torch.zeros(5, 5)}, CPU)
    with pytest.raises(ValueError, match=r"blocks\.0\.v\.weight is torch\.int64"):
        load_parameters(held, source | {"blocks.0.v.weight": torch.zeros(12, 12, dtype=torch.int64)}, CPU)


def test_codes_keep_their_dtype_when_a_model_is_cast() -> None:
    held = parallelize(build(dtype=torch.float32), TinyLadder.plan, memory=M(base="fp8")).to(torch.bfloat16)
    linear = frozen_linears(held)["blocks.0.v.weight"]
    assert [x.dtype for x in linear.held] == [torch.float8_e4m3fn, torch.float32]
    assert linear.bias.dtype == torch.bfloat16


# Together with the rest


def test_compiled_layers_learn_the_same() -> None:
    model = build(layers=2)
    plain = parallelize(dequantise(copy.deepcopy(model), "nf4"), model.plan)
    held = parallelize(model, model.plan, memory=M("full", base="nf4", host_layers=1), compile="aot_eager")
    losses = torch.stack(learn(held)), torch.stack(learn(plain))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    assert_same_grads(gradients(held), gradients(plain), 1e-12)
    torch._dynamo.reset()


MEMORY = M(base="int8", host_layers=2)
SUBJECT = Subject(
    lambda: dequantise(build(layers=4), "int8"),  # so that codes are exact
    lambda model: model.plan,
    lambda: batch(0, 8) | {"target": torch.linspace(-1, 1, 240, dtype=torch.float64).view(8, 6, 5)},
)
TWO = [
    Case("shards", ParallelConfig(dp_shard=2), replace(MEMORY, recompute="full"), meta=True),
    Case("shards on the host", ParallelConfig(dp_shard=2), replace(MEMORY, offload_params=True), meta=True, steps=1),
    Case("copies", ParallelConfig(dp_replicate=2, dp_shard=1), MEMORY, micro_batches=2, steps=1),
    Case("context", ParallelConfig(dp_shard=1, ulysses=2), replace(MEMORY, recompute="but_attention"), steps=1),
    Case("pipeline", ParallelConfig(dp_shard=1, pp_layers=(1, 3)), MEMORY, micro_batches=4, meta=True, steps=1),
    Case(
        "zero bubble",
        ParallelConfig(dp_shard=1, pp_layers=(2, 2), schedule="zero_bubble"),
        MEMORY,
        micro_batches=2,
        steps=1,
    ),
]


def on_ranks(rank: int, world: int) -> None:
    check(rank, world, SUBJECT, TWO)


def test_ranks_learn_the_same() -> None:
    spawn(2, on_ranks)


# Refusals


@pytest.mark.parametrize(
    ("memory", "parallel", "why"),
    [
        (M(base="nf4"), ParallelConfig(dp_shard=1, tp=2), "base='nf4' with tp=2: a matrix is cut .* Use tp=1"),
        (M(host_layers=4), ParallelConfig(), r"host_layers=4: the model has 3 layers, so it can be 0 … 3"),
    ],
)
def test_what_cannot_be_is_refused(memory: MemoryConfig, parallel: ParallelConfig, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_fits(build(), TinyLadder.plan, parallel.resolve(parallel.tp), memory)


def test_a_model_that_is_all_trained_has_no_base() -> None:
    with pytest.raises(ValueError, match="base='int8' and host_layers=1 is for matrices that are not trained"):
        parallelize(TinyLadder(), TinyLadder.plan, memory=M(base="int8", host_layers=1))
    with pytest.raises(ValueError, match="exact with base='int8'"):
        verify.parallelize(TinyLadder(), TinyLadder.plan, memory=M(base="int8"))
    with pytest.raises(ValueError, match="base='int3': there are dtype, fp8, int8 and nf4"):
        parallelize(build(), TinyLadder.plan, memory=M(base="int3"))
    assert isinstance(parallelize(build(), TinyLadder.plan).blocks[0].v, nn.Linear)
    assert not isinstance(parallelize(build(), TinyLadder.plan).blocks[0].v, FrozenLinear)
