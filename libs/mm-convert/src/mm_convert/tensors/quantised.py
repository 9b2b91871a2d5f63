"""Quantised weights as lazy tensors of bfloat16: some rows are read, multiplied by their scales in fp32, and rounded.

Needs numpy, no torch. Layouts after comfy-kitchen 0.2 (Comfy-Org), which ComfyUI and DiffSynth-Studio read and write.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod

import numpy as np

from mm_convert.tensors.views import Computed, LazyTensor

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # by its four bits
_TILE = 128, 4  # rows and columns of block scales that lie together, in the order of the tensor cores
MX_BLOCK, NV_BLOCK = 32, 16  # neighbours in a row that share a scale, of mxfp8 and nvfp4


def scale_rows(codes: LazyTensor, scale: LazyTensor, rotation: int = 0) -> LazyTensor:
    """Codes of fp8 or int8, times one scale or one for each row; a scale without elements is 1.

    rotation: ConvRot's group size, a power of 4 that divides the columns: neighbours in a row that were mixed by a
        Hadamard matrix before they were quantised; 0 for none.
    """
    count = prod(scale.shape)

    def compute(start: int, stop: int) -> bytes:
        values = read_floats(codes, start, stop).reshape(stop - start, -1)
        if count == 1:
            values *= read_floats(scale).reshape(())
        elif count:
            values *= read_floats(scale, start, stop).reshape(-1, 1)
        if rotation:
            values = (values.reshape(-1, rotation) @ _hadamard(rotation)).reshape(stop - start, -1)
        return round_to_bfloat16(values)

    return Computed("BF16", codes.shape, compute)


def scale_mxfp8(codes: LazyTensor, scales: LazyTensor) -> LazyTensor:
    """Codes of fp8 (rows, columns), times a power of two for 32 neighbours. scales: bytes, tiled."""

    def compute(start: int, stop: int) -> bytes:
        exponents = _read_tiled(scales, start, stop)[:, : codes.shape[1] // MX_BLOCK]
        values = read_floats(codes, start, stop).reshape(stop - start, -1, MX_BLOCK)
        return round_to_bfloat16(values * _E8M0[exponents][:, :, None])

    return Computed("BF16", codes.shape, compute)


def scale_nvfp4(codes: LazyTensor, scales: LazyTensor, scale: LazyTensor) -> LazyTensor:
    """Two codes of four bits in a byte (rows, columns / 2), the left one above, times `scale` and a scale for 16
    neighbours. scales: fp8, tiled.
    """
    shape = codes.shape[0], 2 * codes.shape[1]

    def compute(start: int, stop: int) -> bytes:
        packed = np.frombuffer(codes.read(start, stop), np.uint8).reshape(stop - start, -1)
        values = _E2M1[np.stack([packed >> 4, packed & 15], axis=2)].reshape(stop - start, -1, NV_BLOCK)
        blocks = _fp8_values("F8_E4M3")[_read_tiled(scales, start, stop)[:, : shape[1] // NV_BLOCK]]
        return round_to_bfloat16(values * (blocks * read_floats(scale).reshape(()))[:, :, None])

    return Computed("BF16", shape, compute)


def decode_rows(packed: LazyTensor, shape: tuple[int, ...], decode: Callable[[np.ndarray], np.ndarray]) -> LazyTensor:
    """Rows of bytes that `decode` turns into rows of numbers. shape: of the numbers, with the height of `packed`."""

    def compute(start: int, stop: int) -> bytes:
        return round_to_bfloat16(decode(np.frombuffer(packed.read(start, stop), np.uint8).reshape(stop - start, -1)))

    return Computed("BF16", shape, compute)


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the tensor that holds so many block scales: both sides are filled up to whole tiles."""
    return -(-rows // _TILE[0]) * _TILE[0], -(-columns // _TILE[1]) * _TILE[1]


def read_floats(tensor: LazyTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) as fp32, flat, of any dtype that is exact in it. A copy."""
    data = tensor.read(start, stop)
    if tensor.dtype in ("F8_E4M3", "F8_E5M2"):
        return _fp8_values(tensor.dtype)[np.frombuffer(data, np.uint8)]
    if tensor.dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": np.float32, "F16": np.float16, "I8": np.int8}[tensor.dtype]).astype(np.float32)


def round_to_bfloat16(values: np.ndarray) -> bytes:
    """The bytes of fp32 values, each rounded to the nearest bfloat16, of two as near to the even one."""
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(values).reshape(-1)] = 0x7FC0
    return rounded.tobytes()


def _read_tiled(scales: LazyTensor, start: int, stop: int) -> np.ndarray:
    """Of block scales that lie in tiles, the bytes of rows [start, stop), in their own order.

    A tile is 128 rows and 4 columns; in it, rows 0, 32, 64 and 96 come first, then 1, 33, 65 and 97.
    """
    top, bottom = start // _TILE[0], -(-stop // _TILE[0])
    across = scales.shape[1] // _TILE[1]
    tiles = np.frombuffer(scales.read(top * _TILE[0], bottom * _TILE[0]), np.uint8)
    whole = tiles.reshape(bottom - top, across, 32, 4, 4).transpose(0, 3, 2, 1, 4).reshape(-1, across * 4)
    return whole[start - top * _TILE[0] : stop - top * _TILE[0]]


# Scales of mxfp8 by their byte; 0 marks a block of zeros, 255 is no number.
_E8M0 = np.array([0, *(2.0 ** (exponent - 127) for exponent in range(1, 255)), np.nan], np.float32)


@cache
def _fp8_values(dtype: str) -> np.ndarray:
    """What each of the 256 codes is, in fp32."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (codes << 8).view(np.float16).astype(np.float32)
    exponent, fraction = (codes >> 3 & 15).astype(np.int32), (codes & 7) / np.float32(8)
    values = np.where(exponent > 0, np.ldexp(1 + fraction, exponent - 7), np.ldexp(fraction, -6)).astype(np.float32)
    values[127] = np.nan  # there is no infinity
    values[128:] = -values[:128]
    return values


@cache
def _hadamard(size: int) -> np.ndarray:
    """ConvRot's: regular, symmetric and orthogonal, so that mixing twice is mixing back. size: a power of 4."""
    matrix = four = np.float32(1) - 2 * np.eye(4, dtype=np.float32)[::-1]
    while len(matrix) < size:
        matrix = np.kron(matrix, four)
    return matrix / np.float32(size**0.5)
