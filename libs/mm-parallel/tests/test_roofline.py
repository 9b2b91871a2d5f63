"""Seconds of a step follow from what is counted and from the table of devices."""

import time
from dataclasses import replace

import pytest
import torch

from mm_parallel import MemoryConfig, ParallelConfig
from mm_parallel.devices import find_device
from mm_parallel.estimate.collectives import Traffic, count_traffic
from mm_parallel.estimate.kernels import Kernel, Shape
from mm_parallel.estimate.roofline import FUSED, LATENCY, Clock
from mm_parallel.estimate.units import Units
from mm_parallel.testing import TinyLadder

H100 = find_device("h100")
BF16 = torch.bfloat16
LONG = Shape(40, 40, 128, 32_760, 32_760, False, False)


def attend(shape: Shape = LONG, products: int = 4, op: str = "mm_parallel.attention") -> Kernel:
    flops = products * shape.heads * shape.queries * shape.keys * shape.head_dim
    return Kernel("attention", op, flops, 1, 1, BF16, shape)


@pytest.fixture(scope="module")
def units() -> Units:
    with torch.device("meta"):
        model = TinyLadder(8, BF16)
    example = {"tokens": torch.ones(2, 4096, 5, device="meta"), "t": torch.ones(2, 3, device="meta")}
    return Units(model, model.plan, BF16, example)


def test_a_kernel_takes_the_longest_of_three():
    clock = Clock(H100, BF16)
    product = Kernel("gemm", "aten.mm", 10**15, 10**6, 10**6, BF16)
    assert clock.kernel(product, False) == pytest.approx(1e15 / (989e12 * 0.66))
    thin = Kernel("gemm", "aten.mm", 10**6, 10**10, 10**9, BF16)
    assert clock.kernel(thin, False) == pytest.approx(1.1e10 / (3.35e12 * 0.85))
    add = Kernel("memory", "aten.add", 0, 2 * 10**9, 10**9, torch.float32)
    assert clock.kernel(add, False) == pytest.approx(3e9 / (3.35e12 * 0.85))
    assert Clock(H100, BF16, compiled=True).kernel(add, False) == pytest.approx(FUSED * clock.kernel(add, False))
    assert clock.kernel(Kernel("memory", "aten.add", 0, 4, 4, BF16), False) == H100.shares.launch
    wide = replace(product, dtype=torch.float32)
    assert clock.kernel(wide, False) == pytest.approx(clock.kernel(product, False) * 989 / 67)


@pytest.mark.parametrize(
    ("device", "name", "shape", "picked"),
    [
        ("h100", "auto", LONG, "cudnn"),
        ("h100", "auto", LONG._replace(uneven=True), "flash"),
        ("h100", "flash", LONG, "flash"),
        ("h100", "flash3", LONG, "flash3"),
        ("b200", "flash4", LONG, "flash4"),
        ("b200", "auto", LONG._replace(kv_heads=4), "flash"),
        ("a100-80g", "auto", LONG, "flash"),
        ("mi300x", "auto", LONG, "flash"),
        ("rtx-4090", "auto", LONG._replace(head_dim=320), "efficient"),
        ("ascend-910b2", "auto", LONG, "npu"),
    ],
)
def test_attention_by_the_kernel_that_runs(device, name, shape, picked):
    clock = Clock(find_device(device), BF16, attention=name)
    assert clock.pick(attend(shape)) == picked
    if shape.head_dim == 128:
        share, _ = clock.device.shares.attention[picked]
        assert clock.kernel(attend(shape), False) == pytest.approx(attend(shape).flops / (clock.peak * share))


def test_what_attention_leaves_out():
    clock = Clock(H100, BF16)
    causal, small = attend(LONG._replace(causal=True)), attend(LONG._replace(head_dim=64))
    assert clock.kernel(causal, False) == pytest.approx(clock.kernel(attend(), False) / 2)
    assert 1.2 < clock.kernel(small, False) * 2 / clock.kernel(attend(), False) < 1.4  # smaller heads are slower
    with pytest.raises(ValueError, match="attention by flash3 cannot run here: it runs on compute capability 9"):
        Clock(find_device("a100-80g"), BF16, attention="flash3").pick(attend())
    with pytest.raises(ValueError, match="no peak of h100 in float64 is known"):
        Clock(H100, torch.float64)


def test_links_by_the_places_of_ranks():
    """16 ranks: tp 2 and ulysses 4 are on one host of 8, and the two dp ranks on two."""
    clock, layout = Clock(H100, BF16), ParallelConfig(dp_shard=2, ulysses=4, tp=2).resolve(16)
    size = 10**9

    def cost(op, axis, ranks):
        return clock.link(Traffic("weights", op, axis, ranks, 1, size), layout)

    fast = pytest.approx(LATENCY + size / (450e9 * 0.8))
    assert cost("all_reduce", "tp", 2) == ("link", fast)
    assert cost("all_to_all", "ulysses", 4) == ("link", fast)
    # four of the eight ranks of a group are on each host, and each has a network card
    assert cost("all_gather", "fsdp", 8) == ("network", pytest.approx(LATENCY + size / (4 * 50e9 * 0.8)))
    assert cost("send", "dp_shard", 2) == ("network", pytest.approx(LATENCY + size / (50e9 * 0.8)))
    wide = ParallelConfig(ulysses=16).resolve(16)
    away = clock.link(Traffic("tokens", "all_to_all", "ulysses", 16, 1, size), wide)
    assert away == ("network", pytest.approx(LATENCY + 8 / 15 * size / (50e9 * 0.8)))


def test_a_step_adds_up(units):
    clock = Clock(H100, BF16)
    layout, memory = ParallelConfig(dp_shard=2, ulysses=4, tp=2).resolve(16), MemoryConfig("full")
    step = clock.time(units, layout, memory, 4, 1e15)
    assert step.total == pytest.approx(
        step.gemm + step.attention + step.memory + step.communication + step.offload + step.bubble + step.optimizer
    )
    assert step.mfu == pytest.approx(1e15 / (step.total * 16 * 989e12))
    assert step.communication == pytest.approx(sum(link.waited for link in step.links))
    (traffic,) = count_traffic(units, layout, memory, 4)
    assert {link.traffic for link in step.links} == set(traffic)
    for link in step.links:
        assert 0 < link.waited <= link.seconds
        if link.traffic.what in ("tokens", "tensor", "norm"):
            assert link.waited == link.seconds
    trace = units.trace(layout, dict.fromkeys(units.layers[""], "full")).units
    each = [clock.unit(found) for found in trace.values()]
    assert step.compute == pytest.approx(4 * sum(half.total for pair in each for half in pair))


def test_words_cost_what_they_make_again(units):
    clock, layout = Clock(H100, BF16), ParallelConfig().resolve(1)
    none, kept, full = (
        clock.time(units, layout, MemoryConfig(word), 1, 1e15) for word in ("none", "but_attention", "full")
    )
    assert none.gemm < kept.gemm == full.gemm
    assert none.attention == kept.attention < full.attention
    assert none.total < kept.total < full.total
    assert none.communication == none.bubble == none.offload == 0


def test_a_slow_network_is_waited_for(units):
    layout = ParallelConfig().resolve(64)
    slow = Clock(replace(H100, network=1e6), BF16).time(units, layout, MemoryConfig(), 1, 1e15)
    fast = Clock(H100, BF16).time(units, layout, MemoryConfig(), 1, 1e15)
    assert slow.compute == fast.compute
    whole = sum(link.seconds for link in slow.links)
    assert whole - slow.compute * 1.01 < slow.communication < whole  # the rest hides behind what is computed
    alone = Clock(replace(H100, host_link=1e6), BF16)
    moved = alone.time(units, layout, MemoryConfig("full", offload="inputs"), 1, 1e15)
    assert moved.offload > 0
    assert moved.compute == pytest.approx(alone.time(units, layout, MemoryConfig("full"), 1, 1e15).compute)


def test_bubbles(units):
    clock = Clock(H100, BF16)

    def bubble(stages, count, schedule="1f1b"):
        layout = ParallelConfig(pp_layers=stages, schedule=schedule).resolve(4)
        step = clock.time(units, layout, MemoryConfig(), count, 1e15)
        return step.bubble / (step.compute + step.communication)

    assert bubble((2, 2, 2, 2), 8) == pytest.approx(3 / 8)
    assert bubble(((1,) * 4,) * 2, 8) == pytest.approx(3 / 8 / 2)
    assert bubble((2, 2, 2, 2), 32) == pytest.approx(3 / 32)
    assert bubble((2, 2, 2, 2), 8, "zero_bubble") == pytest.approx(1 / 8)


def test_it_is_quick(units):
    """A search asks for thousands."""
    clock = Clock(H100, BF16)
    layouts = [
        ParallelConfig(ulysses=ulysses, tp=tp, pp_layers=(4, 4) if pp else ()).resolve(64)
        for ulysses in (1, 2, 4)
        for tp in (1, 2)
        for pp in (False, True)
    ]
    for layout in layouts:  # each way of cutting is run once
        clock.time(units, layout, MemoryConfig(), 4, 1e15)
    started = time.process_time()
    for layout in layouts:
        clock.time(units, layout, MemoryConfig(), 4, 1e15)
    assert (time.process_time() - started) / len(layouts) < 0.1
