"""Reading a safetensors file, one entry of many, again and again.

With `safetensors.safe_open` every tensor that is read leaves 64 bytes behind (0.8.0), and a file that is cut off while
it is mapped ends the process by a bus error. Here the bytes are read, which fails in words. The header of a file is
parsed once, as long as the file is the same.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from mm_data.files import open_file, parse_json

MAX_HEADER = 100_000_000  # bytes, as in safetensors
AGAIN = "delete it and extract again, which encodes only its samples"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Place(NamedTuple):
    """Where a tensor lies in a file: bytes [begin, end)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a shard says of itself."""

    tensors: dict[str, Place]
    metadata: dict[str, str]


class Shards:
    """Reads tensors of shards, from several threads at once. The headers of the shards used last are remembered, of
    `remembered` tensors in all (at some 300 bytes each), and always one.
    """

    def __init__(self, remembered: int = 200_000):
        self.remembered = remembered
        self._headers: OrderedDict[tuple, Header] = OrderedDict()  # by path and stamp: a replaced file is another
        self._lock = Lock()

    def read(self, shard: Path, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU.

        Raises ValueError, naming the shard, where it is gone, damaged, cut off, or does not hold them; OSError where
        it cannot be read.
        """
        with _open_shard(shard) as file:
            tensors, found = self._header(shard, file).tensors, {}
            for name in names:
                if name not in tensors:
                    raise ValueError(f"{shard} does not hold {name}, so it is of another extraction: {AGAIN}")
                found[name] = _read_tensor(shard, file, tensors[name])
            return found

    def _header(self, shard: Path, file: BinaryIO) -> Header:
        stat = os.fstat(file.fileno())
        key = (shard, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        with self._lock:
            if key in self._headers:
                self._headers.move_to_end(key)
                return self._headers[key]
        header = _parse_header(shard, file)
        with self._lock:
            self._headers[key] = header
            total = sum(len(one.tensors) for one in self._headers.values())
            while total > self.remembered and len(self._headers) > 1:
                total -= len(self._headers.popitem(last=False)[1].tensors)
        return header


def check_shard(shard: Path) -> None:
    """Raise ValueError for a shard that is gone, damaged, or not as long as its header says."""
    with _open_shard(shard) as file:
        _parse_header(shard, file)


def _open_shard(shard: Path) -> BinaryIO:
    try:
        return open_file(shard)
    except FileNotFoundError as error:
        raise ValueError(f"{shard} is gone: extract again, which encodes only its samples") from error


def read_metadata(shard: Path) -> dict[str, str]:
    """The texts in the header of a shard. Raises as `Shards.read`."""
    with open_file(shard) as file:
        return _parse_header(shard, file).metadata


def _parse_header(shard: Path, file: BinaryIO) -> Header:
    """The header of an open file, and whether the file is as long as that promises."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError(f"{shard} is damaged or cut off: {size:,} bytes hold no whole header: {AGAIN}")
    try:
        told = parse_json(os.pread(file.fileno(), length, 8).decode("utf-8"), shard)
        metadata = told.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("__metadata__ must hold texts")
        tensors = {name: _place(8 + length, **entry) for name, entry in told.items()}
        end = max((place.end for place in tensors.values()), default=8 + length)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{shard} is damaged: its header cannot be read ({error}): {AGAIN}") from error
    if end != size:
        raise ValueError(f"{shard} is damaged or cut off: it has {size:,} bytes, its header says {end:,}: {AGAIN}")
    return Header(tensors, metadata)


def _place(first: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Place:
    """`first`: where the data begin in the file. Raises ValueError, TypeError or KeyError for what cannot be."""
    begin, end = data_offsets
    known = DTYPES[dtype]
    if not 0 <= begin <= end or end - begin != math.prod(shape) * known.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"{dtype} {shape} in bytes {begin} to {end}")
    return Place(known, tuple(shape), first + begin, first + end)


def _read_tensor(shard: Path, file: BinaryIO, place: Place) -> Tensor:
    tensor = torch.empty(place.shape, dtype=place.dtype)
    if not tensor.nbytes:
        return tensor
    target, done = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), 0
    while done < len(target):  # the system gives at most 2 GB at once
        count = os.preadv(file.fileno(), [target[done:]], place.begin + done)
        if not count:
            raise ValueError(f"{shard} was cut off while it was in use: it ends before byte {place.end:,}: {AGAIN}")
        done += count
    return tensor
