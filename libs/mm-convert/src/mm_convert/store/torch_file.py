"""Files of torch.save (.pt, .pth, .ckpt, .bin), read and written without torch.

archive/data.pkl     a pickle of everything but the numbers: dictionaries, and where each tensor lies in which storage
archive/byteorder    little
archive/version      3
archive/data/0 …     the storages
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from mm_convert.files import open_file
from mm_convert.store.records import RecordWriter, read_record, read_records
from mm_convert.store.storages import CLASSES, TORCH_NAMES, TensorBuilder, contiguous
from mm_convert.store.unpickle import unpickle
from mm_convert.tensors.views import LazyTensor, chunks, pieces

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_MAX_PICKLE = 200 * 2**20

# --- reading


def read_torch_file(path: Path, start: int = 0, stop: int | None = None) -> Any:
    """What torch.save wrote, as plain Python: its tensors are lazy, and objects of classes are `Opaque`.

    Args:
        start, stop: the bytes of the file that are meant, where several were written into one.

    Raises ValueError for a file that is truncated, damaged, or of an old format, and for one with code in it, which
    is not run.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        stop = size if stop is None else stop
        where = str(path) if (start, stop) == (0, size) else f"{path} (bytes {start:,} to {stop:,})"
        if not 0 <= start <= stop <= size:
            raise ValueError(f"{where} is truncated: the file has {size:,} bytes")
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
    build = TensorBuilder(path, storages)
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
    program = b"\x80\2" + b"".join(_pickle(contents, storages)) + b"."
    archive = RecordWriter(file)
    for name, text in (("data.pkl", program), ("byteorder", b"little"), ("version", b"3\n")):
        archive.write(f"archive/{name}", len(text), [text])
    for tensor, key in storages.items():
        archive.write(f"archive/data/{key}", tensor.nbytes, _count(tensor, progress))
    archive.finish()


def _count(tensor: LazyTensor, progress: Callable[[int], None]) -> Iterator[bytes | memoryview]:
    for chunk in chunks(pieces([tensor])):
        yield chunk
        progress(len(chunk))


def _pickle(value: Any, storages: dict[LazyTensor, int]) -> Iterator[bytes]:
    """The opcodes of protocol 2 that make a value; tensors get the next number in `storages`."""
    if isinstance(value, LazyTensor):
        yield from _pickle_tensor(value, storages)
    elif isinstance(value, Mapping):
        yield b"}("
        for key, item in value.items():
            yield from _pickle(key, storages)
            yield from _pickle(item, storages)
        yield b"u"
    elif isinstance(value, (list, tuple)):
        yield b"](" if isinstance(value, list) else b"("
        for item in value:
            yield from _pickle(item, storages)
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


def _pickle_tensor(tensor: LazyTensor, storages: dict[LazyTensor, int]) -> Iterator[bytes]:
    if tensor.dtype not in TORCH_NAMES:
        raise ValueError(f"{tensor.dtype} tensors cannot be written into a torch file")
    dtype = TORCH_NAMES[tensor.dtype]
    typed = dtype in CLASSES
    storage = b"ctorch\n%b\n" % CLASSES[dtype].encode() if typed else b"ctorch.storage\nUntypedStorage\n"
    key = storages.setdefault(tensor, len(storages))
    yield b"ctorch._utils\n_rebuild_tensor_v%d\n((" % (2 if typed else 3)
    yield from _pickle("storage", storages)
    yield storage
    for value in (str(key), "cpu", prod(tensor.shape) if typed else tensor.nbytes):
        yield from _pickle(value, storages)
    yield b"tQ"
    for value in (0, tensor.shape, contiguous(tensor.shape), False):
        yield from _pickle(value, storages)
    yield b"ccollections\nOrderedDict\n)R"
    yield b"tR" if typed else b"ctorch\n%b\ntR" % dtype.encode()
