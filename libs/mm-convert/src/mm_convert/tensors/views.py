"""Tensors as the bytes they are and where those lie, so that cutting and joining them moves no more than is written.

Every cut that a checkpoint knows is along the first side of a tensor (rows) or, for a matrix, the second (columns):
tensor-parallel slices, fused q, k and v, shards of FSDP. So a tensor is anything that can say where the bytes of its
rows are: a range of a file, rows of other tensors one below the other, columns side by side, or a computation.
No torch is needed, any dtype passes, and memory stays flat however large the tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from mm_convert.files import open_file

BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16}
BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
FP8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
MAX_SIDES = 64  # of a tensor, as in torch

_BLOCK = 8 * 2**20  # bytes of rows that are in memory at once
_COPY = 64 * 2**20  # bytes that the kernel copies between two signs of progress


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of a file."""

    file: Path
    start: int
    stop: int


class LazyTensor:
    """Its dtype as safetensors spells it, its shape, and on request the bytes of some of its rows.

    A row is all that one index of the first side holds; a scalar is one row.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8

    @property
    def height(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.height if self.height else 0

    def pieces(self, start: int, stop: int) -> Iterator[Range | bytes]:
        """The bytes of rows [start, stop), in order: where they lie, or themselves."""
        raise NotImplementedError

    def read(self, start: int = 0, stop: int | None = None) -> bytearray:
        """The bytes of rows [start, stop), all at once."""
        result = bytearray()
        for chunk in chunks(self.pieces(start, self.height if stop is None else stop)):
            result += chunk
        return result


@dataclass(frozen=True)
class Stored(LazyTensor):
    """A tensor that lies in a file, from byte `start` on, without gaps."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]
    size: int | None = None  # bytes; needed only for a dtype that this module does not know

    @property
    def nbytes(self) -> int:
        return super().nbytes if self.size is None else self.size

    def pieces(self, start: int, stop: int) -> Iterator[Range]:
        yield Range(self.file, self.start + start * self.row_bytes, self.start + stop * self.row_bytes)


@dataclass(frozen=True)
class Rows(LazyTensor):
    """Rows [start, stop) of each part, one part below the other."""

    parts: tuple[tuple[LazyTensor, int, int], ...]

    def __post_init__(self) -> None:
        _check_alike({(part.dtype, part.shape[1:]) for part, _, _ in self.parts})

    @property
    def dtype(self) -> str:
        return self.parts[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(stop - start for _, start, stop in self.parts), *self.parts[0][0].shape[1:])

    def pieces(self, start: int, stop: int) -> Iterator[Range | bytes]:
        above = 0
        for part, first, last in self.parts:
            begin, end = max(start - above, 0), min(stop - above, last - first)
            if begin < end:
                yield from part.pieces(first + begin, first + end)
            above += last - first


@dataclass(frozen=True)
class Columns(LazyTensor):
    """Columns [start, stop) of each part, one part beside the other; all parts are matrices."""

    parts: tuple[tuple[LazyTensor, int, int], ...]

    def __post_init__(self) -> None:
        _check_alike({(part.dtype, part.height, len(part.shape)) for part, _, _ in self.parts})
        assert len(self.parts[0][0].shape) == 2, "only matrices have columns"

    @property
    def dtype(self) -> str:
        return self.parts[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts[0][0].height, sum(stop - start for _, start, stop in self.parts))

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        widths = [(part.row_bytes // part.shape[1] if part.shape[1] else 0) for part, _, _ in self.parts]
        at_once = max(1, _BLOCK // max(1, sum(part.row_bytes for part, _, _ in self.parts)))
        for top in range(start, stop, at_once):
            bottom = min(top + at_once, stop)
            strips = []
            for (part, first, last), width in zip(self.parts, widths, strict=True):
                block, row = memoryview(part.read(top, bottom)), part.row_bytes
                strips.append([block[i * row + first * width : i * row + last * width] for i in range(bottom - top)])
            yield b"".join(strip for row in zip(*strips, strict=True) for strip in row)


@dataclass(frozen=True)
class Computed(LazyTensor):
    """A tensor whose rows are made when asked for: `compute(start, stop)` gives their bytes."""

    dtype: str
    shape: tuple[int, ...]
    compute: Callable[[int, int], bytes | bytearray | memoryview]

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        at_once = max(1, _BLOCK // max(1, self.row_bytes))
        for top in range(start, stop, at_once):
            yield self.compute(top, min(top + at_once, stop))


@dataclass(frozen=True)
class Reshaped(LazyTensor):
    """The same bytes under another shape."""

    whole: LazyTensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert prod(self.shape) == prod(self.whole.shape), f"{self.whole.shape} cannot be read as {self.shape}"

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    def pieces(self, start: int, stop: int) -> Iterator[Range | bytes]:
        if (start, stop) == (0, self.height):
            yield from self.whole.pieces(0, self.whole.height)
        elif self.height == self.whole.height:
            yield from self.whole.pieces(start, stop)
        else:
            yield bytes(self.whole.read()[start * self.row_bytes : stop * self.row_bytes])


def rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows [start, stop) of a tensor."""
    return tensor if (start, stop) == (0, tensor.height) else Rows(((tensor, start, stop),))


def columns(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Columns [start, stop) of a matrix."""
    return tensor if (start, stop) == (0, tensor.shape[1]) else Columns(((tensor, start, stop),))


def vstack(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors one below the other: concatenated along the first side."""
    return tensors[0] if len(tensors) == 1 else Rows(tuple((t, 0, t.height) for t in tensors))


def hstack(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Matrices one beside the other: concatenated along the second side."""
    return tensors[0] if len(tensors) == 1 else Columns(tuple((t, 0, t.shape[1]) for t in tensors))


def _check_alike(kinds: set[object]) -> None:
    if len(kinds) != 1:
        raise ValueError(f"tensors that are parts of one another differ: {sorted(map(str, kinds))}")


# --- moving bytes


def pieces(tensors: Iterable[LazyTensor]) -> Iterator[Range | bytes]:
    """The bytes of several tensors in order; ranges that follow one another in a file are joined into one."""
    run: Range | None = None
    for piece in (piece for tensor in tensors for piece in tensor.pieces(0, tensor.height)):
        if isinstance(piece, Range):
            if run and (run.file, run.stop) == (piece.file, piece.start):
                run = Range(run.file, run.start, piece.stop)
                continue
            if run:
                yield run
            run = piece
        else:
            if run:
                yield run
            run = None
            yield piece
    if run:
        yield run


def chunks(pieces: Iterable[Range | bytes]) -> Iterator[bytes | memoryview]:
    """The bytes themselves, at most 8 MiB at a time where they come from a file."""
    for piece in pieces:
        if not isinstance(piece, Range):
            yield piece
            continue
        with open_file(piece.file) as file:
            file.seek(piece.start)
            left = piece.stop - piece.start
            while left:
                data = file.read(min(left, _BLOCK))
                if not data:
                    raise ValueError(f"{piece.file} became shorter while it was read")
                left -= len(data)
                yield data


def write(pieces: Iterable[Range | bytes], file: BinaryIO, progress: Callable[[int], None]) -> None:
    """Append bytes to a file; `progress` is told how many, as they are written."""
    for piece in pieces:
        if isinstance(piece, Range):
            file.flush()
            _copy(piece, file, progress)
        else:
            file.write(piece)
            progress(len(piece))


def _copy(piece: Range, target: BinaryIO, progress: Callable[[int], None]) -> None:
    """Append a range of another file, inside the kernel where it can, else through a buffer of 1 MiB."""
    with open_file(piece.file) as file:
        copy = _kernel_copy
        position = piece.start
        while position < piece.stop:
            count = min(_COPY, piece.stop - position)
            try:
                copied = copy(file.fileno(), target.fileno(), position, count)
            except (OSError, AttributeError) as error:
                if copy is _buffered_copy or (isinstance(error, OSError) and error.errno in _REAL_ERRORS):
                    raise
                copy = _buffered_copy  # another file system, or another operating system
                continue
            if not copied:
                raise ValueError(f"{piece.file} became shorter while it was read")
            position += copied
            progress(copied)


_REAL_ERRORS = {5, 28, 122}  # EIO, ENOSPC, EDQUOT: a second try would not help


def _kernel_copy(source: int, target: int, position: int, count: int) -> int:
    return os.copy_file_range(source, target, count, offset_src=position)


def _buffered_copy(source: int, target: int, position: int, count: int) -> int:
    os.lseek(source, position, os.SEEK_SET)
    data = memoryview(os.read(source, min(count, 2**20)))
    written = 0
    while written < len(data):
        written += os.write(target, data[written:])
    return written
