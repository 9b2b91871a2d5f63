"""Between lazy tensors and torch's. The only module that needs torch whenever it is used."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mm_convert.files import open_file
from mm_convert.tensors.views import Computed, LazyTensor, Stored

try:
    import torch
except ImportError as error:
    raise ImportError("this needs torch: pip install 'mm-convert[torch]'") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32}
DTYPES |= {"I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
DTYPES |= {"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
SPELLING = {dtype: name for name, dtype in DTYPES.items()}


class Maps:
    """Tensors of files, mapped: they take memory only where they are read. Writing to one changes no file."""

    def __init__(self) -> None:
        self.files: dict[Path, mmap.mmap] = {}

    def tensor(self, lazy: LazyTensor) -> torch.Tensor:
        if not isinstance(lazy, Stored) or not lazy.nbytes:
            return rows_of(lazy, 0, lazy.height).view(lazy.shape)
        if lazy.file not in self.files:
            with open_file(lazy.file) as file:
                self.files[lazy.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype, count = DTYPES[lazy.dtype], prod(lazy.shape)
        whole = self.files[lazy.file]
        if lazy.start % dtype.itemsize:  # torch wants tensors aligned
            return rows_of(lazy, 0, lazy.height).view(lazy.shape)
        return torch.frombuffer(whole, dtype=dtype, count=count, offset=lazy.start).view(lazy.shape)


def rows_of(lazy: LazyTensor, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor, read into memory."""
    data, dtype = lazy.read(start, stop), DTYPES[lazy.dtype]
    shape = (stop - start, *lazy.shape[1:])
    return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def lazy(shape_and_dtype: torch.Tensor, load: Callable[[], torch.Tensor], name: str) -> LazyTensor:
    """A torch tensor, on any device, as a lazy one: `load` is called once, when its bytes are wanted."""
    if shape_and_dtype.dtype not in SPELLING:
        raise ValueError(f"{name} is {shape_and_dtype.dtype}, which safetensors cannot hold")
    return _Loaded(SPELLING[shape_and_dtype.dtype], tuple(shape_and_dtype.shape), load)


class _Loaded(LazyTensor):
    def __init__(self, dtype: str, shape: tuple[int, ...], load: Callable[[], torch.Tensor]) -> None:
        self.dtype, self.shape, self.load = dtype, shape, load

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        yield bytes_of(self.load())[start * self.row_bytes : stop * self.row_bytes]


def cast(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """A tensor in another dtype, converted some rows at a time."""
    if tensor.dtype == dtype:
        return tensor
    return Computed(dtype, tensor.shape, lambda start, stop: bytes_of(rows_of(tensor, start, stop).to(DTYPES[dtype])))


def quantise_fp8(tensor: LazyTensor, name: str) -> tuple[LazyTensor, LazyTensor]:
    """Codes in float8_e4m3fn and their one scale in fp32: the largest magnitude becomes 448, the largest code.

    Each is computed when it is asked for, some rows at a time; ValueError then for numbers that are not finite.
    """
    blocks = range(0, tensor.height, max(1, 2**23 // max(1, tensor.row_bytes)))

    @cache
    def scale() -> torch.Tensor:
        tops = [rows_of(tensor, top, min(top + blocks.step, tensor.height)).float().abs().amax() for top in blocks]
        largest = torch.stack(tops).amax()  # passes NaN on
        if not largest.isfinite():
            raise ValueError(f"{name} holds numbers that are not finite: they have no scale")
        return largest / torch.finfo(torch.float8_e4m3fn).max if largest else torch.ones(())

    def compute(start: int, stop: int) -> memoryview:
        return bytes_of((rows_of(tensor, start, stop).float() / scale()).clamp(-448, 448).to(torch.float8_e4m3fn))

    return Computed("F8_E4M3", tensor.shape, compute), Computed("F32", (), lambda start, stop: bytes_of(scale()))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it lies on the CPU already (numpy knows no bfloat16)."""
    tensor = tensor.detach().cpu().contiguous()
    array = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    array.tensor = tensor  # the view keeps the array alive, and the array the tensor
    return memoryview(array).cast("B")
