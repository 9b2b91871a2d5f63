"""Reading and writing safetensors files as byte ranges: no tensor is ever made, memory stays flat, any dtype passes.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16}
_BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
_CHUNK = 64 * 2**20  # bytes copied between two signs of progress


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: `name` there, dtype as safetensors spells it, bytes [start, end) of the whole file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a file in the order of their data, and its metadata.

    Raises ValueError for anything that is not a whole, honest safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is truncated or not a safetensors file: it promises a header of {length:,} bytes "
                f"and has {size:,} bytes in all"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_doubles)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("__metadata__ holds something else than text")
        entries = sorted((_entry(path, k, v, 8 + length) for k, v in header.items()), key=lambda e: (e.start, e.end))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} has a broken safetensors header: {error}") from error

    position = 8 + length
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise ValueError(f"{path} has a lying header: the data of {entry.name} {kind}")
        position = entry.end
    if position != size:
        what = "is truncated" if position > size else "has bytes that belong to no tensor"
        raise ValueError(f"{path} {what}: its header describes {position:,} bytes, the file has {size:,}")
    return entries, metadata


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} stands in it twice")
    return result


def _entry(path: Path, name: str, record: Mapping[str, Any], data: int) -> Entry:
    dtype, shape, (start, end) = record["dtype"], record["shape"], record["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in [*shape, start, end]) or start > end:
        raise ValueError(f"{name} has shape {shape} and offsets {start}, {end}")
    if dtype in _BITS and (end - start) * 8 != prod(shape) * _BITS[dtype]:
        needed = prod(shape) * _BITS[dtype] // 8
        raise ValueError(f"{name} is {dtype} {shape}, {needed:,} bytes, but its offsets span {end - start:,}")
    return Entry(path, name, str(dtype), tuple(shape), data + start, data + end)


# --- a folder of files


def read_folder(folder: Path) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of the one checkpoint in a folder, file by file, and its metadata.

    Raises ValueError when there is none, or several, and when its index and its files contradict each other.
    """
    files, index = _find_files(folder)
    entries, metadata = read_files(files)
    for entry in entries if index else ():
        if index.pop(entry.name, "no file") != entry.file.name:
            raise ValueError(f"the index of {folder} does not have {entry.name} in {entry.file.name}, where it is")
    if index:
        name, file = index.popitem()
        raise ValueError(f"the index of {folder} has {name} in {file}, where it is not")
    return entries, metadata


def read_files(files: Sequence[Path]) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of several files. Raises ValueError for one that is in two of them."""
    headers = [read_header(file) for file in files]
    found: dict[str, Entry] = {}
    for entry in (entry for entries, _ in headers for entry in entries):
        if entry.name in found:
            raise ValueError(f"{entry.name} is in {found[entry.name].file} and again in {entry.file}")
        found[entry.name] = entry
    return list(found.values()), {key: text for _, metadata in headers for key, text in metadata.items()}


def _find_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{folder} holds several checkpoints: {_listed(indices)}; name one safetensors file")
    if indices:
        weight_map = read_index(indices[0])
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{indices[0]} names {', '.join(missing)}, which is not there")
        return files, weight_map
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1 or (files and _is_complete_series(files)):
        return files, {}
    found = f"{_listed(files)} and no index; name one of them" if files else "no *.safetensors file"
    raise ValueError(f"{folder} holds {found}")


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> file name, which must lie beside the index."""
    try:
        weight_map = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors index: {error!r}") from error
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path} sends {name} to {file!r}, outside its own folder")
    return weight_map


def _is_complete_series(files: Sequence[Path]) -> bool:
    names = [file.name for file in files]
    stem = names[0].partition("-00001-of-")[0]
    return names == [f"{stem}-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files[:5]) + (" …" if len(files) > 5 else "")


# --- writing


@dataclass(frozen=True)
class Item:
    """One tensor to be written: its bytes are a range of another file (`source`) or come from a call."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Entry | Callable[[], memoryview]


def write_file(path: Path, items: Sequence[Item], metadata: Mapping[str, str], progress: Callable[[int], None]) -> None:
    """Write one safetensors file, data in the order of `items`; `progress` is told the bytes just written."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for item in items:
        offsets = [position, position + item.nbytes]
        header[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": offsets}
        position += item.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for source in _runs(items):
            if isinstance(source, Entry):
                file.flush()
                _copy_range(source, file, progress)
            else:
                data = source()
                file.write(data)
                progress(data.nbytes)


def _runs(items: Sequence[Item]) -> Iterator[Entry | Callable[[], memoryview]]:
    """The sources, with neighbouring ranges of one file joined: a renamed shard is copied in one piece."""
    run: Entry | None = None
    for item in items:
        source = item.source
        if isinstance(source, Entry) and run and (run.file, run.end) == (source.file, source.start):
            run = Entry(run.file, run.name, run.dtype, run.shape, run.start, source.end)
            continue
        if run:
            yield run
        run = source if isinstance(source, Entry) else None
        if run is None:
            yield source
    if run:
        yield run


def _copy_range(source: Entry, target: BinaryIO, progress: Callable[[int], None]) -> None:
    """Append bytes of one file to another, inside the kernel where it can, else through a buffer of 1 MiB."""
    with source.file.open("rb", buffering=0) as file:
        copy = _kernel_copy
        position = source.start
        while position < source.end:
            count = min(_CHUNK, source.end - position)
            try:
                copied = copy(file.fileno(), target.fileno(), position, count)
            except (OSError, AttributeError) as error:
                if copy is _buffered_copy or (isinstance(error, OSError) and error.errno in _REAL_ERRORS):
                    raise
                copy = _buffered_copy  # another file system, or another operating system
                continue
            if not copied:
                raise ValueError(f"{source.file} became shorter while it was read")
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
