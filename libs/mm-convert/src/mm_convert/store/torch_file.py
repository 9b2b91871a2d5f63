"""Files of torch.save (.pt, .pth, .ckpt, .bin), read and written without torch.

archive/data.pkl     a pickle of everything but the numbers: dictionaries, and where each tensor lies in which storage
archive/byteorder    little
archive/version      3
archive/data/0 …     the storages
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from mm_convert.store.records import Record, RecordWriter, read_record, read_records
from mm_convert.store.unpickle import Opaque, unpickle
from mm_convert.tensors import BITS, Computed, LazyTensor, Stored, chunks, pieces

_MAX_PICKLE = 200 * 2**20

# torch's name -> the spelling of safetensors; those after the gap have none, and are only carried along
DTYPES = {"bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint16": "U16"}
DTYPES |= {"uint32": "U32", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
DTYPES |= {"complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}
TORCH_NAMES = {spelling: name for name, spelling in DTYPES.items()}
_BYTES = {name: BITS[spelling] // 8 for name, spelling in DTYPES.items()}
_BYTES |= {"complex32": 4, "complex128": 16, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1}

# Storages that know their dtype. Younger dtypes have none: their storage is untyped, and the tensor says the dtype.
_STORAGES = {"BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16"}
_STORAGES |= {"IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"}
_STORAGES |= {"FloatStorage": "float32", "DoubleStorage": "float64", "ComplexFloatStorage": "complex64"}
_STORAGES |= {"ComplexDoubleStorage": "complex128"}
_CLASSES = {dtype: name for name, dtype in _STORAGES.items()}

_WORDS = {1: "B", 2: "H", 4: "I", 8: "Q"}  # to move elements, whatever they mean

# --- reading


def read_torch_file(path: Path, start: int = 0, stop: int | None = None) -> Any:
    """What torch.save wrote, as plain Python: its tensors are lazy, and objects of classes are `Opaque`.

    Args:
        start, stop: the bytes of the file that are meant, where several were written into one.

    Raises ValueError for a file that is truncated, damaged, or of an old format, and for one with code in it, which
    is not run.
    """
    size = path.stat().st_size
    stop = size if stop is None else stop
    where = str(path) if (start, stop) == (0, size) else f"{path} (bytes {start:,} to {stop:,})"
    if not 0 <= start <= stop <= size:
        raise ValueError(f"{where} is truncated: the file has {size:,} bytes")
    with path.open("rb", buffering=0) as file:
        try:
            _check_format(file, start)
            records = read_records(file, start, stop)
            prefix = next(iter(records), "").partition("/")[0]
            if f"{prefix}/data.pkl" not in records:
                raise ValueError("is a zip file without data.pkl, not one of torch.save")
            order = records.get(f"{prefix}/byteorder")
            if order and (said := read_record(file, order, 16)) != b"little":
                raise ValueError(f"was written on a machine of other byte order ({said!r}): load and save it there")
            data = read_record(file, records[f"{prefix}/data.pkl"], _MAX_PICKLE)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
    storages = {name.removeprefix(f"{prefix}/data/"): record for name, record in records.items()}
    build = _Builder(path, storages)
    return unpickle(data, where, build.builders, build.storage)


def _check_format(file: BinaryIO, start: int) -> None:
    file.seek(start)
    head = file.read(512)
    if head.startswith(b"PK"):
        return
    resave = "torch.save(torch.load(old, weights_only=True), new)"
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        raise ValueError(f"has the format of torch before 1.6: save it anew with torch, {resave}")
    raise ValueError("is not a file of torch.save, or is damaged at its beginning")


@dataclass(frozen=True)
class _Storage:
    record: Record
    dtype: str | None  # torch's name; None if untyped


class _Builder:
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
        if kind != "storage" or key not in self.storages:
            raise ValueError(f"there is no storage {key!r}")
        record, dtype = self.storages[key], _STORAGES.get(cls.name)
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
            raise ValueError(f"a tensor of {dtype} {metadata or ''} is of a kind that no checkpoint of a model has")
        if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides)):
            raise ValueError(f"a tensor has shape {shape}, strides {strides} and offset {offset}")
        width, count = _BYTES[dtype], prod(shape)
        held = storage.record.size // width
        last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) if count else 0
        if (count and last >= held) or count > held:
            raise ValueError(f"a tensor of shape {shape} and strides {strides} does not fit a storage of {held:,}")
        spelling, begin = DTYPES.get(dtype, dtype.upper()), storage.record.start + offset * width
        if not count:
            return Stored(self.path, storage.record.start, spelling, shape, 0)
        if all(side == 1 or s == c for side, s, c in zip(shape, strides, _contiguous(shape), strict=True)):
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
    steps = _contiguous(sides)
    rows = bytearray(prod(sides) * width)
    target, count = memoryview(rows).cast(_WORDS[width]), sides[along]
    with path.open("rb", buffering=0) as file:
        for index in product(*(range(sides[i]) for i in others)):
            source = start * strides[0] + sum(n * strides[i] for n, i in zip(index, others, strict=True))
            first = sum(n * steps[i] for n, i in zip(index, others, strict=True))
            file.seek(begin + source * width)
            run = file.read(count * width)
            if len(run) != count * width:
                raise ValueError(f"{path} became shorter while it was read")
            target[first : first + (count - 1) * steps[along] + 1 : steps[along]] = memoryview(run).cast(_WORDS[width])
    return rows


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without gaps."""
    return tuple(prod(max(side, 1) for side in shape[i + 1 :]) for i in range(len(shape)))


# --- writing


def write_torch_file(path: Path, contents: Mapping[str, Any], progress: Callable[[int], None]) -> None:
    """Write what torch.load(path, weights_only=True) reads, also mapped, without holding a whole tensor.

    Args:
        contents: nested dictionaries and lists of lazy tensors, numbers, text and None. Tensors that are equal, as
            tied weights are, share one storage.
        progress: is told the bytes of tensors just written.
    """
    with path.open("xb") as file:
        write_archive(file, contents, progress)


def write_archive(file: BinaryIO, contents: Any, progress: Callable[[int], None]) -> None:
    """The same, appended to a file."""
    storages: dict[LazyTensor, int] = {}
    program = b"\x80\2" + b"".join(_pickled(contents, storages)) + b"."
    archive = RecordWriter(file)
    for name, text in (("data.pkl", program), ("byteorder", b"little"), ("version", b"3\n")):
        archive.write(f"archive/{name}", len(text), [text])
    for tensor, key in storages.items():
        archive.write(f"archive/data/{key}", tensor.nbytes, _counted(tensor, progress))
    archive.finish()


def _counted(tensor: LazyTensor, progress: Callable[[int], None]) -> Iterator[bytes | memoryview]:
    for chunk in chunks(pieces([tensor])):
        yield chunk
        progress(len(chunk))


def _pickled(value: Any, storages: dict[LazyTensor, int]) -> Iterator[bytes]:
    """The opcodes of protocol 2 that make a value; tensors get the next number in `storages`."""
    if isinstance(value, LazyTensor):
        yield from _pickled_tensor(value, storages)
    elif isinstance(value, Mapping):
        yield b"}("
        for key, item in value.items():
            yield from _pickled(key, storages)
            yield from _pickled(item, storages)
        yield b"u"
    elif isinstance(value, (list, tuple)):
        yield b"](" if isinstance(value, list) else b"("
        for item in value:
            yield from _pickled(item, storages)
        yield b"e" if isinstance(value, list) else b"t"
    elif value is None or isinstance(value, bool):
        yield b"N" if value is None else b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        yield b"J" + struct.pack("<i", value) if len(raw) <= 4 else b"\x8a" + bytes([len(raw)]) + raw
    elif isinstance(value, float):
        yield b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        raw = value.encode("utf-8", "surrogatepass")
        yield b"X" + struct.pack("<I", len(raw)) + raw
    else:
        raise ValueError(f"{type(value).__name__} {value!r} cannot be written into a torch file")


def _pickled_tensor(tensor: LazyTensor, storages: dict[LazyTensor, int]) -> Iterator[bytes]:
    if tensor.dtype not in TORCH_NAMES:
        raise ValueError(f"{tensor.dtype} tensors cannot be written into a torch file")
    dtype = TORCH_NAMES[tensor.dtype]
    typed = dtype in _CLASSES
    storage = b"ctorch\n%b\n" % _CLASSES[dtype].encode() if typed else b"ctorch.storage\nUntypedStorage\n"
    key = storages.setdefault(tensor, len(storages))
    yield b"ctorch._utils\n_rebuild_tensor_v%d\n((" % (2 if typed else 3)
    yield from _pickled("storage", storages)
    yield storage
    for value in (str(key), "cpu", prod(tensor.shape) if typed else tensor.nbytes):
        yield from _pickled(value, storages)
    yield b"tQ"
    for value in (0, tensor.shape, _contiguous(tensor.shape), False):
        yield from _pickled(value, storages)
    yield b"ccollections\nOrderedDict\n)R"
    yield b"tR" if typed else b"ctorch\n%b\ntR" % dtype.encode()
