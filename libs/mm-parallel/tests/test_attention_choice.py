"""Which kernel computes attention: the table, by capabilities that are not here, and what is known to be wrong."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import _registry
from torch.utils._python_dispatch import TorchDispatchMode

from mm_parallel import ParallelPlan, parallelize
from mm_parallel.attention import (
    BACKENDS,
    Call,
    activate,
    attention,
    choose,
    choose_core,
    cuda,
    describe_choice,
    pick,
    refusal,
)
from mm_parallel.attention.backends import _hardware
from mm_parallel.attention.loading import loaded
from mm_parallel.attention.op import core
from mm_parallel.config import AttentionName
from mm_parallel.plan import Sequence
from mm_parallel.testing.ladder import TinyLadder

BF16 = torch.bfloat16
AMPERE, ADA, HOPPER, BLACKWELL, GEFORCE, VOLTA = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (7, 0)
WAN = Call("cuda", BF16, 128, kv_heads=12, queries=32_760, keys=32_760, capability=HOPPER, cudnn=91900)


def test_every_name_of_the_flag_is_a_backend():
    assert set(get_args(AttentionName)) == {"auto", *BACKENDS}


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [(VOLTA, "math"), (AMPERE, "flash"), (ADA, "flash"), (HOPPER, "cudnn"), (BLACKWELL, "cudnn"), (GEFORCE, "flash")],
)
def test_by_device(capability, wanted):
    assert choose(replace(WAN, capability=capability)) == wanted


def test_by_dtype_and_head_size():
    chosen = {d: choose(replace(WAN, head_dim=d)) for d in (64, 80, 128, 192, 256, 512)}
    assert chosen == {64: "cudnn", 80: "cudnn", 128: "cudnn", 192: "flash", 256: "flash", 512: "efficient"}
    chosen = {d: choose(replace(WAN, dtype=d)) for d in (torch.float16, torch.float32, torch.float64)}
    assert chosen == {torch.float16: "cudnn", torch.float32: "efficient", torch.float64: "math"}
    old = replace(WAN, capability=VOLTA)
    assert [choose(replace(old, dtype=d)) for d in (torch.float16, torch.float32)] == ["efficient", "efficient"]
    assert choose(replace(WAN, capability=ADA, head_dim=200)) == "efficient"  # flash has no backward for it there


def test_packs_masks_and_short_sequences_make_no_plan_of_cudnn():
    others = [replace(WAN, uneven=True), replace(WAN, queries=4095), replace(WAN, queries=1)]
    assert [choose(call) for call in others] == ["flash"] * 3
    assert [choose(call, "cudnn") for call in others] == ["flash", "cudnn", "flash"]  # by name: all whole sequences


def test_what_is_known_to_be_wrong_is_not_taken():
    """pytorch #193893, #169849; a sequence of one token; a mask (#196678) never reaches a kernel."""
    wrong = {
        "seen to be wrong": replace(WAN, capability=BLACKWELL, kv_heads=4),
        "9.15.1 is needed": replace(WAN, cudnn=91500),
        "has no cuDNN": replace(WAN, cudnn=0),
        "no sequence of one token": replace(WAN, keys=1),
        "not deterministic": replace(WAN, deterministic=True),
    }
    for why, call in wrong.items():
        assert why in refusal("cudnn", call)
        assert choose(call) == "flash"
    assert choose(replace(WAN, kv_heads=4)) == "cudnn"  # an H100
    assert choose(replace(WAN, capability=BLACKWELL, kv_heads=8)) == "cudnn"


def test_flash_3_and_4_only_where_they_are_loaded():
    assert "has not been loaded" in refusal("flash4", WAN)
    four, three = replace(WAN, loaded="FA4"), replace(WAN, loaded="FA3")
    assert [choose(four), choose(three), choose(replace(four, uneven=True))] == ["flash4", "flash3", "flash4"]
    assert "were replaced by FA4" in refusal("flash", four)
    assert choose(replace(four, capability=AMPERE)) == "efficient"  # torch's flash ops would refuse
    assert choose(replace(three, capability=BLACKWELL)) == "cudnn"
    assert choose(replace(four, head_dim=192)) == "efficient"


def test_a_kernel_that_cannot_run_is_refused_with_those_that_can():
    with pytest.raises(
        ValueError, match=r"attention by flash cannot run here: it runs on compute capability 8, 9.*7\.0"
    ):
        choose(replace(WAN, capability=VOLTA), "flash")
    with pytest.raises(ValueError, match=r"seen to be wrong.*There are auto, flash, efficient, math$"):
        choose(replace(WAN, capability=BLACKWELL, kv_heads=2), "cudnn")
    with pytest.raises(
        ValueError, match=r"cudnn cannot run here: it is for CUDA, not for cpu. There are auto, cpu, math"
    ):
        pick("cpu", BF16, 128, name="cudnn")
    with pytest.raises(ValueError, match="no attention backend is named 'fast'"):
        pick("cpu", BF16, 128, name="fast")


def test_a_device_that_is_not_here():
    assert pick("cuda", BF16, 128, heads=12, capability=HOPPER) == "cudnn"
    assert pick("cuda", BF16, 128, heads=12, capability=HOPPER, packed=True) == "flash"
    assert pick("cuda", BF16, 128, heads=16, kv_heads=2, capability=BLACKWELL) == "flash"
    assert pick(torch.device("cuda", 1), BF16, 128) == pick("cuda:1", BF16, 128) == "flash"  # fake: as on 8.0


def test_rocm_has_no_cudnn(monkeypatch):
    """An MI300X says compute capability 9.4, and torch.backends.cudnn.version() is there MIOpen's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 3_005_001)
    assert _hardware.__wrapped__(None) == ((9, 4), 3_005_001)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert _hardware.__wrapped__(None) == ((9, 4), 0)


def test_flash_by_name_puts_flash_2_back(monkeypatch):
    """Another was loaded in the same process, here by a kernel that does nothing."""
    removed = []
    handle = SimpleNamespace(remove=lambda: removed.append(True))
    known = _registry._FLASH_ATTENTION_IMPLS | {"FA4": lambda: handle}
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", known)
    activate("flash4", "cpu")
    activate("auto", "cpu")
    assert loaded() == "FA4"
    assert not removed
    activate("flash", "cpu")
    assert loaded() is None
    assert removed == [True]


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"flash4 cannot be loaded \(pip install --pre flash-attn-4\): ModuleNotFound"):
        activate("flash4")


@pytest.mark.parametrize(
    ("name", "on"),
    [("auto", (False, True, True)), ("cudnn", (True, False, True)), ("efficient", (False, False, True)),
     ("math", (False, False, False))],
)  # fmt: skip
def test_torchs_own_attention_obeys(name, on):
    """F.scaled_dot_product_attention, which encoders and transformers call: cuDNN only by name."""
    switches = torch.backends.cuda
    kinds = "cudnn", "flash", "mem_efficient"
    before = [getattr(switches, f"{kind}_sdp_enabled")() for kind in kinds]
    try:
        activate(name)
        assert tuple(getattr(switches, f"{kind}_sdp_enabled")() for kind in kinds) == on
        activate("auto", "cpu")  # changes nothing
        assert tuple(getattr(switches, f"{kind}_sdp_enabled")() for kind in kinds) == on
    finally:
        for kind, value in zip(kinds, before, strict=True):
            getattr(switches, f"enable_{kind}_sdp")(value)


def test_the_seam_of_a_model():
    """auto leaves a CPU's results as they are, to the bit, and takes our op on CUDA; a name is always our op."""
    model = TinyLadder()
    plain = model.core
    choose_core(model, TinyLadder.plan)
    q, k, v = torch.randn(3, 2, 9, 4, 8)
    assert torch.equal(model.core(q, k, v, Sequence(9)), plain(q, k, v, Sequence(9)))
    with Calls() as calls:
        model.core(q, k, v, Sequence(9))
    assert not calls.ops
    with FakeTensorMode():
        x = torch.empty(2, 9, 4, 8, device="cuda", dtype=BF16)
        with Calls() as calls:
            assert model.core(x, x, x, Sequence(9)).shape == x.shape
    assert calls.ops == [("mm_parallel.attention.default", "auto")]
    model = parallelize(TinyLadder(), TinyLadder.plan, attention="math")
    with Calls() as calls:
        torch.testing.assert_close(model.core(q, k, v, Sequence(9)), plain(q, k, v, Sequence(9)))
    assert calls.ops == [("mm_parallel.attention.default", "math")]
    with pytest.raises(ValueError, match="no attention backend is named 'fast'"):
        parallelize(TinyLadder(), TinyLadder.plan, attention="fast")


class Calls(TorchDispatchMode):
    """Notes our op, and the name that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm_parallel" in str(func):
            self.ops.append((str(func), args[5]))
        return func(*args, **(kwargs or {}))


def test_in_words(monkeypatch):
    plan = ParallelPlan(("blocks.*",), heads={"key-value heads": 4, "heads": 28}, head_dim=128)
    assert describe_choice("auto", plan, torch.device("cpu"), BF16) == "cpu"
    assert describe_choice("math", plan, torch.device("cpu"), BF16) == "math"
    with pytest.raises(ValueError, match="attention by flash cannot run here"):
        describe_choice("flash", plan, torch.device("cpu"), BF16)
    monkeypatch.setattr("mm_parallel.attention.backends._hardware", lambda device: (HOPPER, 91900))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    said = {name: describe_choice(name, plan, torch.device("cuda"), BF16) for name in ("auto", "cudnn", "flash")}
    assert said == {
        "auto": "cudnn (compute capability 9.0), of packs, masks and fewer than 4,096 tokens flash",
        "cudnn": "cudnn (compute capability 9.0), of packs and masks flash",
        "flash": "flash (compute capability 9.0)",
    }


@pytest.mark.parametrize("head_dim", [64, 80])
def test_heads_that_need_no_padding_are_not_copied(head_dim):
    x = torch.randn(2, 5, 3, head_dim)
    assert cuda._into(x).data_ptr() == x.data_ptr()
    odd = torch.randn(2, 5, 3, 12)
    assert cuda._into(odd).shape == (2, 3, 5, 16)
    turned = torch.randn(2, 5, head_dim, 3).transpose(2, 3)  # elements of a head are no neighbours
    assert cuda._into(turned).stride(-1) == 1


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("shared", [1, 2, 6])
def test_shared_heads_are_read_in_place(backend, shared):
    """On fake tensors: gradients of keys have as many heads as keys, and no key is repeated."""
    with FakeTensorMode():
        q = torch.empty(2, 40, 6, 64, dtype=BF16, device="cuda")
        k = torch.empty(2, 40, shared, 64, dtype=BF16, device="cuda")
        out, lse = BACKENDS[backend].forward(q, k, k, 0.1, True)
        grads = BACKENDS[backend].backward(out, q, k, k, out, lse, 0.1, True)
        assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
        assert (lse.shape, lse.dtype) == ((2, 6, 40), torch.float32)


@pytest.mark.parametrize("mask", [None, torch.arange(9) < torch.tensor([[4], [9]])])
def test_auto_is_resolved_within_the_op(mask):
    """So a compiler sees one op of fixed arguments, whatever the device is."""
    q, k, v = torch.randn(3, 2, 9, 4, 8)
    with Calls() as calls:
        got = core(q, k, v, Sequence(9), mask)
    assert calls.ops == [("mm_parallel.attention.default", "auto")]
    assert torch.equal(got, attention(q, k, v, backend="cpu", mask=mask))
    op = partial(torch.ops.mm_parallel.attention.default, scale=0.3, causal=False, backend="auto")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v)[0], attention(q, k, v, scale=0.3))
