"""Reading GGUF files of diffusion models, as city96 publishes them: a header, then tensors in blocks of ggml's types.

"GGUF", version, how many tensors and values; values by name; for each tensor name, sides (the last one first), type
and offset; the data, aligned. What is in no block (F32, F16, BF16) is read as it lies, the rest through the package
gguf, some rows at a time.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

from mm_convert.files import brief, open_file
from mm_convert.tensors.views import MAX_SIDES, LazyTensor, Reshaped, Stored

_PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}  # ggml's numbers of types that safetensors has, too
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_ALIGNMENT = 32
_MAX_HEADER = 100_000_000  # bytes, as of safetensors
_SHAPE = "comfy.gguf.orig_shape."  # of a tensor that was laid out anew, as its rows are no whole blocks


@dataclass(frozen=True)
class GGUF:
    """What a file holds: every tensor as numbers. kinds: how many of them are in blocks of which type."""

    tensors: dict[str, LazyTensor]
    kinds: Counter[str]


def read_gguf(path: Path) -> GGUF:
    """The tensors of a file, lazily. Only its header is read.

    Raises ValueError for anything that is not a whole, honest GGUF file of little endian; ImportError where it needs
    the package gguf and there is none.
    """
    with open_file(path) as raw:
        size = os.fstat(raw.fileno()).st_size
        header = _Header(path, BufferedReader(raw))
        if header.take(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with GGUF")
        if (version := header.number("I")) not in (2, 3):
            raise ValueError(f"{path} is GGUF of version {version}; 2 and 3 of little endian are read")
        count, values = header.number("Q"), header.number("Q")
        said = dict(_read_value(header) for _ in range(values))
        found = [_read_place(header) for _ in range(count)]
        alignment = said.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"{path} has an alignment of {brief(alignment)}")
        data = -(-header.position // alignment) * alignment
    tensors: dict[str, LazyTensor] = {}
    kinds: Counter[str] = Counter()
    end = data
    for name, shape, kind, offset in sorted(found, key=lambda place: place[3]):
        if name in tensors:
            raise ValueError(f"{path} has a lying header: {name} stands in it twice")
        if data + offset < end:
            raise ValueError(f"{path} has a lying header: the data of {name} overlaps the tensor before it")
        whole, end = _tensor(path, name, shape, kind, data + offset)
        if end > size:
            raise ValueError(f"{path} is truncated: {name} ends at byte {end:,}, the file has {size:,}")
        tensors[name] = _reshape(path, name, whole, said.get(_SHAPE + name))
        if kind not in _PLAIN:
            kinds[_types()[kind].name] += 1
    return GGUF(tensors, kinds)


class _Header:
    """The beginning of a file, read bit by bit and not beyond what any header has."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file, self.position = path, file, 0

    def take(self, count: int) -> bytes:
        self.position += count
        data = self.file.read(count) if self.position <= _MAX_HEADER else b""
        if len(data) != count:
            raise ValueError(f"{self.path} is truncated or no GGUF file: its header ends within byte {self.position:,}")
        return data

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} has a text in its header that is not UTF-8: {brief(raw)}") from error


def _read_value(header: _Header) -> tuple[str, Any]:
    """A name and its value; of a list of texts, nothing."""
    name, kind = header.text(), header.number("I")
    if kind == _TEXT:
        return name, header.text()
    if kind in _NUMBERS:
        return name, header.number(_NUMBERS[kind])
    inner, length = (header.number("I"), header.number("Q")) if kind == _LIST else (None, 0)
    if inner == _TEXT:
        for _ in range(length):
            header.text()
        return name, None
    if inner not in _NUMBERS:
        raise ValueError(f"{header.path}: {brief(name)} in its header has type {kind}, {inner}, which is not known")
    letter = _NUMBERS[inner]
    raw = header.take(length * struct.calcsize(letter))
    return name, list(struct.unpack(f"<{length}{letter}", raw)) if name.startswith(_SHAPE) else None


def _read_place(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor."""
    name, sides = header.text(), header.number("I")
    if sides > MAX_SIDES:
        raise ValueError(f"{header.path} has a lying header: {brief(name)} has {sides:,} sides")
    shape = tuple(reversed([header.number("Q") for _ in range(sides)]))
    return name, shape, header.number("I"), header.number("Q")


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, start: int) -> tuple[LazyTensor, int]:
    """The numbers of a tensor, and where its bytes end."""
    if kind in _PLAIN:
        plain = Stored(path, start, _PLAIN[kind], shape)
        return plain, start + plain.nbytes
    types = _types()
    if kind not in types:
        raise ValueError(f"{path}: {name} is of ggml's type {kind}, which this version of the package gguf cannot read")
    type_ = types[kind]
    if not shape or not prod(shape) or shape[-1] % type_.values:
        raise ValueError(
            f"{path} has a lying header: {name} is {type_.name} {list(shape)}, but has {type_.values} values a block"
        )
    from mm_convert.tensors.quantised import decode_rows

    rows = shape[0] if len(shape) > 1 else 1  # of a vector, all blocks are one row
    row_bytes = prod(shape) // rows // type_.values * type_.nbytes
    packed = Stored(path, start, "U8", (rows, row_bytes))
    whole = decode_rows(packed, shape if len(shape) > 1 else (1, *shape), type_.decode)
    return whole if len(shape) > 1 else Reshaped(whole, shape), start + packed.nbytes


def _reshape(path: Path, name: str, tensor: LazyTensor, said: list[int] | None) -> LazyTensor:
    """Under the shape that it had before it was laid out in blocks, if that is said."""
    if said is None:
        return tensor
    if not all(side > 0 for side in said) or prod(said) != prod(tensor.shape):
        raise ValueError(f"{path}: {_SHAPE}{name} is {brief(said)}, but the tensor has shape {list(tensor.shape)}")
    return Reshaped(tensor, tuple(said))


@dataclass(frozen=True)
class _Type:
    name: str
    values: int  # in a block
    nbytes: int  # of a block
    decode: Any  # bytes (rows, n) -> fp32


@cache
def _types() -> dict[int, _Type]:
    """ggml's types of blocks that the package gguf decodes, by their number."""
    try:
        import numpy as np
        from gguf.constants import GGML_QUANT_SIZES
        from gguf.quants import dequantize
    except ImportError as error:
        raise ImportError("quantised GGUF files need the package gguf: pip install 'mm-convert[gguf]'") from error

    types = {}
    for kind, (values, nbytes) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        types[int(kind)] = _Type(kind.name, values, nbytes, partial(dequantize, qtype=kind))
    return types
