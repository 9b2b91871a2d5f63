"""Where kept activations are, when they travel, and that gradients do not notice."""

import contextlib
import gc
import logging
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from mm_parallel import MemoryConfig, ParallelConfig, finish_gradients, make_mesh, parallelize
from mm_parallel.attention import core
from mm_parallel.estimate.peak import PeakMemory
from mm_parallel.testing import TinyLadder, assert_same_grads, gradients, spawn

CASES = {
    "none": MemoryConfig(),
    "full": MemoryConfig("full"),
    "but_attention": MemoryConfig("but_attention"),
    "attention": MemoryConfig("but_attention", offload="attention"),
    "inputs": MemoryConfig("full", offload="inputs"),
    "inputs but_attention": MemoryConfig("but_attention", offload="inputs"),
    "some inputs": MemoryConfig(("full", "none", "but_attention"), offload="inputs"),
    "some attention": MemoryConfig(1, but_attention=2, offload="attention"),
}
MOVING = [name for name, memory in CASES.items() if memory.offload != "none"]


def build(name: str, mesh=None) -> TinyLadder:
    torch.manual_seed(0)
    return prepare(TinyLadder().double(), name, mesh)


def prepare(model: TinyLadder, name: str, mesh=None) -> TinyLadder:
    model.core = core  # in all cases alike
    return parallelize(model, TinyLadder.plan, mesh, memory=CASES[name])


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 6, 5), (4, 3)))


def accumulate(model: TinyLadder, order: str) -> None:
    """`f0 f1 b0 …`: forward of micro-batch 0, of 1, backward of 0, …"""
    losses = {}
    for kind, number in order.split():
        if kind == "f":
            losses[number] = model(*batch(int(number))).square().mean()
        else:
            losses.pop(number).backward()


ORDERS = {
    "one": "f0 b0",
    "accumulation": "f0 b0 f1 b1 f2 b2",
    "1f1b": "f0 f1 b0 f2 b1 f3 b2 b3",
    "all first": "f0 f1 f2 b0 b1 b2",
    "last first": "f0 f1 f2 b2 b1 b0",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", MOVING)
def test_gradients_are_the_same_bits(name, order):
    plain, model = build("none"), build(name)
    accumulate(plain, order)
    accumulate(model, order)
    assert_same_grads(gradients(model), gradients(plain), 0.0)


def sharded(rank: int, world: int) -> None:
    mesh = make_mesh(ParallelConfig(), "cpu")
    expected = None
    for name in ("none", *MOVING):
        model = build(name, mesh)
        for i in range(2):
            model(*(part.chunk(world)[rank] for part in batch(i))).square().mean().backward()
        finish_gradients(model, mesh)
        expected = expected or gradients(model)
        assert_same_grads(gradients(model), expected, 0.0)


def test_gradients_are_the_same_bits_when_sharded():
    spawn(2, sharded)


@contextlib.contextmanager
def journal() -> Iterator[list[str]]:
    """What travels, as `0 leaves`: block 0's."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage().removeprefix("blocks."))
    logger = logging.getLogger("mm_parallel.offload")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


LEAVE = ["0 leaves", "1 leaves", "2 leaves"]
USE = ["1 returns", "2 is used", "0 returns", "1 is used", "0 is used"]  # one layer ahead; the last never was away


@pytest.mark.parametrize("name", ["attention", "inputs"])
def test_what_returns_does_so_one_layer_before_it_is_used(name):
    with journal() as lines:
        accumulate(build(name), ORDERS["one"])
    assert lines == LEAVE + USE


@pytest.mark.parametrize("name", ["attention", "inputs"])
def test_micro_batches_do_not_mix(name):
    with journal() as lines:
        accumulate(build(name), "f0 f1 b0 b1")
    # micro-batch 0 is all on the host when the forward of 1 is through; of 1 the last layer is still here
    assert lines == [*LEAVE, *LEAVE, "2 returns", *USE, *USE]


def test_layers_between_that_move_nothing_are_passed_over():
    with journal() as lines:
        accumulate(build("some inputs"), "f0 b0")
    assert lines == ["0 leaves", "2 leaves", "0 returns", "2 is used", "0 is used"]


def test_layers_of_two_virtual_stages_are_two_runs():
    """Layers 0, 1 and 3, 4 are here; a micro-batch comes back for 3 when others have passed 0 and 1."""
    model = TinyLadder(5)
    model.blocks[2] = None
    parallelize(model, TinyLadder.plan, memory=CASES["inputs"])

    def stage(i: int, x: Tensor) -> Tensor:
        stream = model.stem(x, torch.zeros(2, 3))._replace(x=x)
        for j in (i, i + 1):
            stream = model.layer(j, stream)
        return stream.x

    model.stem = lambda x, t: TinyLadder.stem(model, torch.zeros(2, 4, 5), t)
    x = torch.randn(2, 4, 12, requires_grad=True)
    with journal() as lines:
        first, second = stage(0, x), stage(0, x)
        upper = stage(3, x)
        lines.clear()
        upper.sum().backward()
        assert lines == ["3 returns", "4 is used", "3 is used"]  # and nothing of layer 1
        (first + second).sum().backward()


def test_an_evaluation_moves_nothing():
    model = build("attention")
    with journal() as lines, torch.no_grad():
        model(*batch(0))
    assert not lines


@pytest.mark.parametrize("name", CASES)
def test_an_abandoned_graph_leaves_nothing_behind(name):
    model = build(name)
    gc.disable()  # nothing may wait for the garbage collector
    try:
        with PeakMemory() as memory:
            for i in range(3):
                loss = model(*batch(i)).square().mean()
                assert memory.now > 0
                del loss
                assert memory.now == 0
    finally:
        gc.enable()


def test_backward_twice_through_one_graph():
    plain, model = build("none"), build("attention")
    for each in (plain, model):
        loss = each(*batch(0)).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_grads(gradients(model), gradients(plain), 0.0)


# From here on with two kinds of memory: a device that is not there, "npu", on fake tensors.


class Stream:
    """Writes down who waits for whom."""

    def __init__(self, name: str = "side") -> None:
        self.name, self.done = name, 0

    def wait_stream(self, other: "Stream") -> None:
        Device.events.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> int:
        self.done += 1
        Device.events.append(f"{self.name} has copied {self.done}")
        return self.done

    def wait_event(self, event: int) -> None:
        Device.events.append(f"{self.name} waits for copy {event}")


class Device:
    """As much of an accelerator's module as autograd, checkpoint and offload ask for."""

    Stream = Stream
    events: ClassVar[list[str]] = []
    current = Stream("compute")
    _is_in_bad_fork = staticmethod(lambda: False)
    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    current_stream = staticmethod(lambda device=None: Device.current)

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        before, Device.current = Device.current, stream
        yield
        Device.current = before


def on_a_device(rank: int, world: int) -> tuple[dict, dict]:
    """By case: bytes after the forward on the device and on the host, the device's peak; and the streams' events."""
    _setup_privateuseone_for_python_backend("npu", backend_module=Device)
    found, events = {}, {}
    for name in CASES:
        # an exception on one of autograd's threads for a device ends this process without a word
        with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.set_multithreading_enabled(False):
            with torch.device("npu"):
                model = prepare(TinyLadder(), name)
                inputs = torch.randn(4, LENGTH, 5), torch.randn(4, 3)
            with PeakMemory("npu") as device, PeakMemory("cpu") as host:
                loss = model(*inputs).square().mean()
                held = device.now, host.now
                loss.backward()
            found[name] = (*held, device.peak)
        events[name], Device.events[:] = list(Device.events), []
    return found, events


LENGTH = 48  # enough for the peak to be made of activations, not of gradients
X = OUT = 4 * LENGTH * 12 * 4  # bytes of B L D in fp32
LSE = 4 * 4 * LENGTH * 4  # of B H L


def test_bytes_on_device_and_host_and_the_order_of_streams():
    ((found, events),) = spawn(1, on_a_device)
    device, host, peak = ({name: numbers[i] for name, numbers in found.items()} for i in range(3))
    # three layers; what the last one keeps has not left when the forward ends
    assert device["but_attention"] - device["full"] == 3 * (OUT + LSE)
    assert device["attention"] - device["full"] == OUT + LSE
    assert device["full"] - device["inputs"] == 2 * X
    assert device["but_attention"] - device["inputs but_attention"] == 2 * X
    assert device["none"] - device["full"] > 3 * 10 * X
    assert {name: host[name] for name in CASES} == {
        "none": 0,
        "full": 0,
        "but_attention": 0,
        "attention": 3 * (OUT + LSE),
        "inputs": 3 * X,
        "inputs but_attention": 3 * X,
        "some inputs": 2 * X,
        "some attention": 2 * (OUT + LSE),
    }
    assert peak["inputs"] < peak["full"] < peak["but_attention"] < peak["none"]
    assert peak["attention"] < peak["but_attention"]

    assert not events["full"]
    leaves = "side waits for compute"  # each copy comes after what it copies
    assert (
        events["attention"]
        == events["inputs"]
        == [
            *(leaves, "side has copied 1"),
            *("compute waits for copy 1", leaves, "side has copied 2"),  # before layer 0's memory is used again
            *("compute waits for copy 2", leaves, "side has copied 3"),
            *(leaves, "side has copied 4", "compute waits for copy 3"),  # layer 1 returns; 2 is used, and then freed
            *(leaves, "side has copied 5", "compute waits for copy 4"),  # layer 0 returns; 1 is used
            "compute waits for copy 5",
        ]
    )
