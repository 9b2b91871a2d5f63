"""Which kernel computes attention.

Every backend is two functions, on q B Lq H h, k and v B Lk K h with any lengths but none of them zero:

    forward(q, k, v, scale, causal) -> out, lse
    backward(dout, q, k, v, out, lse, scale, causal) -> dq, dk, dv

lse is B H Lq, the natural log of the sum over keys of exp(scale * q.k), in fp32 (fp64 for fp64). The backward's out
and lse may be those over more keys than the k it is given: then it returns the part of the gradients that is due to
these keys, which is what a ring needs. Causal: query i sees keys 0 … i, and there are as many queries as keys.

K = H, but for the backends of `SHARING`: these take heads of keys that H/K neighbouring heads of queries share. For
all others keys and values are repeated in memory before the call.

`PACKED`: the same two functions for packed samples, with `segments` (where they part, from 0 to L) behind causal. One
call for all samples, whatever their lengths. Where there is none, samples of equal length share a call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from mm_parallel.attention import cpu, cuda, math, npu
from mm_parallel.attention.loading import loaded


class Backend(NamedTuple):
    forward: Callable
    backward: Callable


_FLASH = Backend(cuda.flash_forward, cuda.flash_backward)  # 3 and 4 stand behind the same ops of torch
_PACKED_FLASH = Backend(cuda.flash_packed_forward, cuda.flash_packed_backward)

BACKENDS = {
    "cpu": Backend(cpu.forward, cpu.backward),
    "flash": _FLASH,
    "cudnn": Backend(cuda.cudnn_forward, cuda.cudnn_backward),
    "efficient": Backend(cuda.efficient_forward, cuda.efficient_backward),
    "npu": Backend(npu.forward, npu.backward),
    "math": Backend(math.forward, math.backward),
    "flash3": _FLASH,
    "flash4": _FLASH,
}

SHARING = frozenset(("cpu", "flash", "flash3", "flash4", "cudnn", "npu"))

PACKED = {
    **dict.fromkeys(("flash", "flash3", "flash4"), _PACKED_FLASH),
    "npu": Backend(npu.packed_forward, npu.packed_backward),
}

_SIXTEEN = (torch.float16, torch.bfloat16)
_WRONG_CUDNN = 91500  # and before: wrong where 128 does not divide the keys (pytorch #169849)
_FEW_HEADS = 8  # of keys: with fewer, cuDNN is silently wrong on compute capability 10 (pytorch #193893)
LONG = 4096
"""Queries of a sequence for which `auto` takes cuDNN."""
_ORDER = ("cpu", "npu", "flash4", "flash3", "cudnn", "flash", "efficient", "math")
_LOADED = {"flash": None, "flash3": "FA3", "flash4": "FA4"}


@dataclass(frozen=True)
class Call:
    """What the choice of a kernel depends on."""

    device: str
    dtype: torch.dtype
    head_dim: int
    kv_heads: int | None = None
    queries: int | None = None
    keys: int | None = None
    uneven: bool = False
    """Whether each call has other lengths: packed samples, or keys that a mask leaves out."""
    capability: tuple[int, int] = (8, 0)
    """Of a CUDA device."""
    cudnn: int = 0
    """Its version, as torch counts: 91900 is 9.19.0. 0: there is none."""
    loaded: str | None = None
    """What stands behind torch's flash ops: None is FlashAttention 2, else FA3 or FA4."""
    deterministic: bool = False
    """Whether torch was told to use deterministic algorithms only."""


def refusal(name: str, call: Call) -> str:
    """Why a kernel cannot run such a call, or would be wrong; empty where it can.

    Masked keys are left out before the kernel is called. So what is known to go wrong with a mask (pytorch #196678: NaN
    in the gradient of q at lengths 64 mod 128 on an H100) never happens here: no kernel is ever given one.
    """
    if name == "math":
        return ""
    if name in ("cpu", "npu"):
        if call.device != name:
            return f"it is for {name} tensors, not for {call.device}"
        return "" if name == "cpu" or call.dtype in (*_SIXTEEN, torch.float32) else f"it does not take {call.dtype}"
    if call.device != "cuda":
        return f"it is for CUDA, not for {call.device}"
    if name == "efficient":
        takes = (torch.float16, torch.float32) if call.capability < (8, 0) else (*_SIXTEEN, torch.float32)
        return "" if call.dtype in takes else f"it does not take {call.dtype} on compute capability {_dotted(call)}"
    if call.dtype not in _SIXTEEN:
        return f"it takes float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    return _refuse_cudnn(call) if name == "cudnn" else _refuse_flash(name, call)


def _refuse_flash(name: str, call: Call) -> str:
    if call.loaded != _LOADED[name]:
        needs = f"{_LOADED[name]} has not been loaded into torch (mm_parallel.attention.activate)"
        return needs if _LOADED[name] else f"torch's flash ops were replaced by {call.loaded}"
    majors = {"flash": range(8, 13), "flash3": (9,), "flash4": (9, 10)}[name]
    if call.capability[0] not in majors:
        return f"it runs on compute capability {', '.join(map(str, majors))}, and this is {_dotted(call)}"
    most = 128 if name == "flash4" else 256
    if call.head_dim > most:
        return f"it takes at most {most} elements a head, and these have {call.head_dim}"
    if name == "flash" and 192 < call.head_dim <= 224 and call.capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return f"it has no backward for {call.head_dim} elements a head on compute capability {_dotted(call)}"
    return ""


def _refuse_cudnn(call: Call) -> str:
    if not (8, 0) <= call.capability <= (12, 1):
        return f"it runs on compute capability 8.0 to 12.1, and this is {_dotted(call)}"
    if call.cudnn <= _WRONG_CUDNN:
        return (
            f"cuDNN {call.cudnn} is wrong where 128 does not divide the keys (pytorch #169849): 9.15.1 is needed"
            if call.cudnn
            else "this torch has no cuDNN"
        )
    if call.head_dim > 128:
        return f"its backward takes at most 128 elements a head, and these have {call.head_dim}"
    if call.capability[0] == 10 and call.kv_heads is not None and call.kv_heads < _FEW_HEADS:
        return (
            f"with {call.kv_heads} heads of keys on compute capability {_dotted(call)} its results were seen to be "
            f"wrong (pytorch #193893: fewer than {_FEW_HEADS})"
        )
    if 1 in (call.queries, call.keys):
        return "it takes no sequence of one token (its gradients are NaN, or it refuses)"
    return "it is not deterministic, and torch was told to be" if call.deterministic else ""


def _dotted(call: Call) -> str:
    return ".".join(map(str, call.capability))


def choose(call: Call, name: str = "auto") -> str:
    """The name of the backend for a call: the one asked for, or the first that can.

    auto: FlashAttention 4 or 3 where a program has loaded it; cuDNN on compute capability 9 and 10 (H100, B200), where
    FlashAttention 2 reaches half its speed; else FlashAttention 2; for float32 and large heads memory-efficient.
    cuDNN makes a plan for each new shape, about a second. So auto takes it for long sequences only, which come in few
    shapes, and not for packs and masks, where nearly each call has lengths of its own: these are one call of flash.
    Asked for by name it takes all whole sequences.

    Raises ValueError for a name that there is not, and for one that cannot run here, with the reason.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"no attention backend is named {name!r}: there are {', '.join(BACKENDS)}")
    if name != "auto" and not (name == "cudnn" and (call.uneven or 1 in (call.queries, call.keys))):
        if why := refusal(name, call):
            able = ", ".join(other for other in BACKENDS if not refusal(other, call))
            raise ValueError(f"attention by {name} cannot run here: {why}. There are auto, {able}")
        return name
    few_shapes = not call.uneven and (call.queries is None or call.queries >= LONG)
    for other in _ORDER:
        wanted = other != "cudnn" or (few_shapes and call.capability[0] in (9, 10))
        if wanted and not refusal(other, call):
            return other
    raise AssertionError(call)


def pick(
    device: str | torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    queries: int | None = None,
    keys: int | None = None,
    masked: bool = False,
    packed: bool = False,
    capability: tuple[int, int] | None = None,
    name: str = "auto",
) -> str:
    """The name of the backend for q, k and v like these on a device: see `choose`, which this asks.

    head_dim: elements of a head. heads, kv_heads: of queries and keys, on this rank; None: enough. queries, keys:
    tokens; None: many. capability: of a CUDA device that is not here (with the newest of the rest: cuDNN); None: asked
    of torch. Where there is none to ask, tensors that claim to be on CUDA are fake, and count as on 8.0.
    """
    if isinstance(device, torch.device) or ":" in device:
        device = torch.device(device)
    kind = device if isinstance(device, str) else device.type
    facts = _facts(device if isinstance(device, torch.device) else None) if kind == "cuda" else {}
    if capability is not None:
        facts |= {"capability": capability, "cudnn": facts.get("cudnn") or _WRONG_CUDNN + 1}
    kv_heads = heads if kv_heads is None else kv_heads
    return choose(Call(kind, dtype, head_dim, kv_heads, queries, keys, masked or packed, **facts), name)


def _facts(device: torch.device | None) -> dict[str, Any]:
    """Of this machine. The first two do not change; the others a program may set."""
    capability, cudnn = _hardware(device)
    return {
        "capability": capability,
        "cudnn": cudnn,
        "loaded": loaded(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@cache
def _hardware(device: torch.device | None) -> tuple[tuple[int, int], int]:
    if not torch.cuda.is_available():
        return (8, 0), 0
    cudnn = None if torch.version.hip else torch.backends.cudnn.version()  # of ROCm it would be MIOpen's
    return torch.cuda.get_device_capability(device), cudnn or 0
