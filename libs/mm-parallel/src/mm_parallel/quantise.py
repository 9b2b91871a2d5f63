"""A matrix in 8 or 4 bits: codes and scales, and the matrix again. Plain torch, the same on every device.

    fp8     out x in float8_e4m3fn, and the largest magnitude of each row over 448
    int8    out x in int8, and the largest magnitude of each row over 127
    nf4     blocks of 64 numbers in the order of the rows: 32 bytes of two codes each, the first in the upper bits, and
            the largest magnitude of each block. A code is the place of the nearest number in `NF4`
    dtype   the matrix itself

Scales are in the dtype of the matrix, and codes are made with the scale as it is rounded: so a matrix of bfloat16 comes
back as a product of two bfloat16 numbers, rounded once.
The numbers of nf4, and the order of its codes, are those of QLoRA (Dettmers et al. 2023, appendix E) and bitsandbytes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_parallel.config import Base

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Sixteen quantiles of a normal distribution, over the largest of them; zero is one."""
BLOCK = 64
"""Numbers that share a scale in nf4."""
_MOST = {"fp8": 448.0, "int8": 127.0}
_CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def pack(kind: Base, matrix: Tensor) -> tuple[Tensor, ...]:
    """out x in -> codes and scales, on the device of the matrix, also on meta. A number that is not finite makes a
    scale that is not.
    """
    match kind:
        case "dtype":
            return (matrix.contiguous(),)
        case "fp8" | "int8":
            scale = (matrix.abs().amax(1, keepdim=True) / _MOST[kind]).to(matrix.dtype)
            codes = (_wide(matrix) / _nonzero(_wide(scale))).clamp_(-_MOST[kind], _MOST[kind])
            return (codes.round_() if kind == "int8" else codes).to(_CODES[kind]), scale
        case "nf4":
            blocks = F.pad(matrix.flatten(), (0, -matrix.numel() % BLOCK)).unflatten(0, (-1, BLOCK))
            scale = blocks.abs().amax(1, keepdim=True)
            between = torch.tensor([(a + b) / 2 for a, b in pairwise(NF4)], device=matrix.device)
            codes = torch.bucketize(_wide(blocks) / _nonzero(_wide(scale)), between, out_int32=True).to(torch.uint8)
            return codes[:, 0::2] << 4 | codes[:, 1::2], scale
    raise ValueError(f"base={kind!r}: there are dtype, fp8, int8 and nf4")


def unpack(
    kind: Base, packed: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, pairs: Tensor | None = None
) -> Tensor:
    """The matrix, out x in, in this dtype. pairs: for nf4, see `find_pairs`, on the device of what is packed."""
    if kind == "dtype":
        return packed[0].to(dtype)
    codes, scale = packed
    if kind == "nf4":
        blocks = F.embedding(codes.int(), pairs.to(dtype)).flatten(1)
        return blocks.mul_(scale.to(dtype)).flatten()[: math.prod(shape)].view(*shape)
    return codes.to(dtype).mul_(scale.to(dtype))


def find_pairs() -> Tensor:
    """256 x 2: the two numbers that a byte of nf4 means."""
    numbers = torch.tensor(NF4, device="cpu")
    return torch.stack((numbers.repeat_interleave(16), numbers.repeat(16)), 1)


def check_device(kind: Base, device: torch.device) -> None:
    """Raise ValueError where the device does not know the codes."""
    if kind != "fp8":
        return
    try:
        torch.zeros(1, device=device).to(torch.float8_e4m3fn).float()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"base fp8: {device.type} here knows no float8_e4m3fn ({error}): take int8, or nf4") from error


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)
