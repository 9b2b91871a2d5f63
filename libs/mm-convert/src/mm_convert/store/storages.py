"""Tensors as torch keeps them: a window on a storage, with strides. Here they become lazy tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from mm_convert.files import brief, open_file
from mm_convert.store.records import Record
from mm_convert.store.unpickle import Opaque
from mm_convert.tensors.views import BITS, MAX_SIDES, Computed, LazyTensor, Stored

# torch's name -> the spelling of safetensors
DTYPES = {"bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint16": "U16"}
DTYPES |= {"uint32": "U32", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
DTYPES |= {"complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}
TORCH_NAMES = {spelling: name for name, spelling in DTYPES.items()}
_BYTES = {name: BITS[spelling] // 8 for name, spelling in DTYPES.items()}
# These have no spelling: such a tensor is seen, but can only be left out.
_BYTES |= {"complex32": 4, "complex128": 16, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1}

# Storages that know their dtype. Younger dtypes have none: their storage is untyped, and the tensor says the dtype.
_STORAGES = {"BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16"}
_STORAGES |= {"IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"}
_STORAGES |= {"FloatStorage": "float32", "DoubleStorage": "float64", "ComplexFloatStorage": "complex64"}
_STORAGES |= {"ComplexDoubleStorage": "complex128"}
CLASSES = {dtype: name for name, dtype in _STORAGES.items()}

_WORDS = {1: "B", 2: "H", 4: "I", 8: "Q"}  # to move elements, whatever they mean


@dataclass(frozen=True)
class _Storage:
    record: Record
    dtype: str | None  # torch's name; None if untyped


class TensorBuilder:
    """Makes the tensors that the pickle describes."""

    def __init__(self, path: Path, storages: Mapping[str, Record]) -> None:
        self.path, self.storages = path, storages
        self.builders: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor_with_dtype,
            "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
            "torch._tensor._rebuild_from_type_v2": lambda build, kind, args, state: build(*args),
            "torch_npu.utils.storage._rebuild_npu_tensor": lambda *args: self.tensor(*args[:6]),
        }

    def storage(self, pid: Any) -> _Storage:
        kind, cls, key, _, count = pid
        if kind != "storage" or not isinstance(key, str) or key not in self.storages:
            raise ValueError(f"there is no storage {brief(key)}")
        record, dtype = self.storages[key], _STORAGES.get(cls.name)
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(f"storage {key} should have {brief(count)} elements")
        if dtype and count * _BYTES[dtype] != record.size:
            raise ValueError(f"storage {key} should have {count:,} elements of {dtype}, it has {record.size:,} bytes")
        return _Storage(record, dtype)

    def tensor(
        self, storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None
    ) -> LazyTensor:
        return self.view(storage, storage.dtype, offset, tuple(shape), tuple(strides), metadata)

    def tensor_with_dtype(
        self, storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Opaque,
        metadata: Any = None,
    ) -> LazyTensor:  # fmt: skip
        return self.view(storage, dtype.name, offset, tuple(shape), tuple(strides), metadata)

    def view(
        self,
        storage: _Storage,
        dtype: str | None,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        metadata: Any,
    ) -> LazyTensor:
        """A tensor: elements of a storage, `strides` of them apart along each side."""
        if dtype not in _BYTES or metadata:
            more = brief(metadata) if metadata else ""
            raise ValueError(f"a tensor of {brief(dtype)} {more} is of a kind that no checkpoint of a model has")
        numbers = (offset, *shape, *strides)
        if not len(shape) == len(strides) <= MAX_SIDES or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"a tensor has shape {brief(shape)}, strides {brief(strides)} and offset {brief(offset)}")
        width, count = _BYTES[dtype], prod(shape)
        held = storage.record.size // width
        last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) if count else 0
        if (count and last >= held) or count > held:
            raise ValueError(f"a tensor of shape {shape} and strides {strides} does not fit a storage of {held:,}")
        spelling, begin = DTYPES.get(dtype, dtype.upper()), storage.record.start + offset * width
        if not count:
            return Stored(self.path, storage.record.start, spelling, shape, 0)
        if all(side == 1 or s == c for side, s, c in zip(shape, strides, contiguous(shape), strict=True)):
            size = None if spelling in BITS else count * width
            return Stored(self.path, begin, spelling, shape, size)
        if width not in _WORDS or not any(
            side > 1 and stride == 1 for side, stride in zip(shape, strides, strict=True)
        ):
            raise ValueError(
                f"a tensor of shape {shape} has strides {strides}, no side with its elements next to one another: "
                "load it with torch and save its .contiguous()"
            )
        return Computed(spelling, shape, partial(_gather, self.path, begin, width, shape, strides))


def _gather(
    path: Path, begin: int, width: int, shape: tuple[int, ...], strides: tuple[int, ...], start: int, stop: int
) -> bytearray:
    """Rows [start, stop) of a tensor of which one side lies in runs: read run by run, each put where it belongs."""
    sides = (stop - start, *shape[1:])
    along = next(i for i, stride in enumerate(strides) if stride == 1 and shape[i] > 1)
    others = [i for i in range(len(sides)) if i != along]
    steps = contiguous(sides)
    rows = bytearray(prod(sides) * width)
    target, count = memoryview(rows).cast(_WORDS[width]), sides[along]
    with open_file(path) as file:
        for index in product(*(range(sides[i]) for i in others)):
            source = start * strides[0] + sum(n * strides[i] for n, i in zip(index, others, strict=True))
            first = sum(n * steps[i] for n, i in zip(index, others, strict=True))
            file.seek(begin + source * width)
            run = file.read(count * width)
            if len(run) != count * width:
                raise ValueError(f"{path} became shorter while it was read")
            target[first : first + (count - 1) * steps[along] + 1 : steps[along]] = memoryview(run).cast(_WORDS[width])
    return rows


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without gaps."""
    return tuple(prod(max(side, 1) for side in shape[i + 1 :]) for i in range(len(shape)))
