"""Tables of angles: where a token is (rotary) and how noisy it is (sinusoid).

Angles need float64, and not every accelerator has it. So frequencies are made in float64 on the CPU, where they are a
few hundred numbers, and everything on the device is float32 without a loss that matters.
"""

import torch
from torch import Tensor


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines for every token of a grid (frames, rows, columns): 2 L h/2, float32.

    Tokens are row-major. The channel pairs of a head are shared out in three bands: the first turn with the frame, the
    next with the row, the last with the column. Not cached: it takes microseconds, and a table made under a fake-tensor
    or inference mode must not leak out of it.
    """
    side = 2 * (head_dim // 6)
    bands = []
    for axis, (length, band) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        frequencies = 10000.0 ** -(torch.arange(0, band, 2, dtype=torch.float64, device="cpu") / band)
        angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
        table = torch.stack((angles.cos(), angles.sin())).float().to(device)
        shape = [2, 1, 1, 1, band // 2]
        shape[1 + axis] = length
        bands.append(table.view(shape).expand(2, *grid, -1))
    return torch.cat(bands, dim=-1).flatten(1, 3)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns channel couples (2k, 2k+1) of x (B L H h) by the angles of `rope` (2 L h/2); in float32, returned as x."""
    cos, sin = rope.unsqueeze(2)  # L 1 h/2
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t·10000^(-i/(dim/2)) for t in 0..1000, any shape: adds a last dim, float32 and accurate to 1e-7.

    The plain product in float32 would be off by 3e-5. So t is split into a whole number and a rest, the frequency into
    its leading 14 bits and a rest: the large part of the angle, 10 bits times 14 bits, is then exact in 24 bits.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim // 2))
    mantissa, exponent = torch.frexp(frequency)
    leading = torch.ldexp((mantissa * 2**14).round(), exponent - 14)
    rest = (frequency - leading).float().to(t.device)
    leading, frequency = leading.float().to(t.device), frequency.float().to(t.device)

    t = t.float().unsqueeze(-1)
    whole = t.round()
    large = whole * leading
    small = whole * rest + (t - whole) * frequency
    cos = large.cos() * small.cos() - large.sin() * small.sin()
    sin = large.sin() * small.cos() + large.cos() * small.sin()
    return torch.cat((cos, sin), dim=-1)
