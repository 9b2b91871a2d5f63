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
from typing import NamedTuple

import torch

from mm_parallel.attention import cpu, cuda, math, npu


class Backend(NamedTuple):
    forward: Callable
    backward: Callable


BACKENDS = {
    "cpu": Backend(cpu.forward, cpu.backward),
    "flash": Backend(cuda.flash_forward, cuda.flash_backward),
    "cudnn": Backend(cuda.cudnn_forward, cuda.cudnn_backward),
    "efficient": Backend(cuda.efficient_forward, cuda.efficient_backward),
    "npu": Backend(npu.forward, npu.backward),
    "math": Backend(math.forward, math.backward),
}

SHARING = frozenset(("cpu", "flash", "npu"))

PACKED = {
    "flash": Backend(cuda.flash_packed_forward, cuda.flash_packed_backward),
    "npu": Backend(npu.packed_forward, npu.packed_backward),
}

_SIXTEEN = (torch.float16, torch.bfloat16)


def pick(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the backend for q, k and v like these: a kernel where there is one, else "math".

    CUDA: flash for 16 bits up to 256 elements a head, memory-efficient for larger heads and fp32. cudnn is often
    faster on Hopper, but only by name: which shapes it takes depends on its version.
    """
    if device_type == "cpu":
        return "cpu"
    if device_type == "cuda" and dtype in _SIXTEEN:
        return "flash" if head_dim <= 256 else "efficient"
    if device_type == "cuda" and dtype == torch.float32:
        return "efficient"
    if device_type == "npu" and dtype in (*_SIXTEEN, torch.float32):
        return "npu"
    return "math"
