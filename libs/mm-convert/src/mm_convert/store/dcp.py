"""Directories of torch.distributed.checkpoint: read without torch; written with it, as the index is pickled from its
classes.

    .metadata           a pickle: every tensor's dtype, shape and chunks, and where each chunk lies
    __R_N.distcp        what rank R wrote: one file of torch.save after the other, each a chunk
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from mm_convert.store.torch_file import DTYPES, TORCH_NAMES, read_torch_file, write_archive
from mm_convert.store.unpickle import Opaque, unpickle
from mm_convert.tensors import Computed, LazyTensor, Reshaped, below, beside, rows

INDEX = ".metadata"
_MAX_INDEX = 200 * 2**20
_CHUNK_BYTES = 64 * 2**20  # written at once: a rank that wants some rows reads little more than them
_FILE_BYTES = 4 * 2**30

# --- reading


@dataclass(frozen=True)
class _Place:
    """Where a chunk, or a value, lies."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Chunk:
    top: int
    left: int
    tensor: LazyTensor


def read_dcp(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint, whole, under the names that it has: `model.blocks.0.…`, `optimizer.…`.

    Raises ValueError when something is missing, damaged, compressed, or cut in a way that torch does not cut, and
    when the index has code in it, which is not run.
    """
    described, places = _read_index(folder)
    return {
        name: _tensor(folder, name, record, places)
        for name, record in described.items()
        if record.name == "TensorStorageMetadata"
    }


def read_dcp_value(folder: Path, name: str) -> Any:
    """What is not a tensor: a number, text, arguments (see `read_torch_file`). Raises ValueError if it is not there."""
    _, places = _read_index(folder)
    if (name, None) not in places:
        raise ValueError(f"{folder} has no value {name}; it has {', '.join(n for n, at in places if at is None)}")
    return _read(folder, places[name, None])


def _read_index(folder: Path) -> tuple[dict[str, Opaque], dict[tuple[str, tuple[int, ...] | None], _Place]]:
    """Name -> what torch says about it; (name, offset of a chunk, or None for a value) -> where it lies."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} has no {INDEX}: it is no DCP checkpoint, or saving it was interrupted")
    if path.stat().st_size > _MAX_INDEX:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than any index")
    index = unpickle(path.read_bytes(), str(path), {})
    try:
        described = dict(index.state["state_dict_metadata"])
        places = {}
        for key, info in index.state["storage_data"].items():
            offset = key.state.get("offset")
            places[key.state["fqn"], offset] = _place(path, key.state["fqn"], info.state)
        assert all(isinstance(record, Opaque) for record in described.values())
    except (AttributeError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is not the index of a DCP checkpoint ({error!r})") from error
    return described, places


def _place(path: Path, name: str, info: Mapping[str, Any]) -> _Place:
    file, start, size = info["relative_path"], info["offset"], info["length"]
    if info.get("transform_descriptors"):
        raise ValueError(f"{path} has {name} transformed by {info['transform_descriptors']}: save it without")
    if (
        not isinstance(file, str)
        or Path(file).name != file
        or not all(type(n) is int and n >= 0 for n in (start, size))
    ):
        raise ValueError(f"{path} has {name} in {file!r}, bytes {start} and {size} more, outside its own folder")
    return _Place(file, start, start + size)


def _read(folder: Path, place: _Place) -> Any:
    if not (folder / place.file).is_file():
        raise ValueError(f"{folder} lacks {place.file}, which its {INDEX} names: copy the files of all ranks")
    return read_torch_file(folder / place.file, place.start, place.stop)


def _tensor(folder: Path, name: str, record: Opaque, places: Mapping[tuple[str, Any], _Place]) -> LazyTensor:
    """One tensor, joined from its chunks."""
    where = f"{folder}: {name}"
    try:
        shape, properties = record.state["size"], record.state["properties"].state
        dtype = (properties[0] if isinstance(properties, tuple) else properties["dtype"]).name
        cuts = [(chunk.state["offsets"], chunk.state["sizes"]) for chunk in record.state["chunks"]]
        for sides in (shape, *(sides for cut in cuts for sides in cut)):
            if not all(type(side) is int and 0 <= side < 2**63 for side in sides) or len(sides) != len(shape):
                raise ValueError(f"{where} has shape {shape}, yet a chunk with {sides}")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} describes {name} in a way that is not torch's ({error!r})") from error
    if dtype not in DTYPES:
        raise ValueError(f"{where} is {dtype}, which no checkpoint of a model has")
    if not prod(shape):
        return Computed(DTYPES[dtype], shape, lambda start, stop: b"")

    chunks = []
    for offsets, sizes in cuts:
        if not prod(sizes):  # of a rank that had nothing
            continue
        if (name, offsets) not in places:
            raise ValueError(f"{where} has a chunk at {offsets}, which lies nowhere")
        tensor = _read(folder, places[name, offsets])
        if not isinstance(tensor, LazyTensor) or (tensor.dtype, tensor.shape) != (DTYPES[dtype], sizes):
            raise ValueError(f"{where} should have {DTYPES[dtype]} {sizes} at {offsets}, but there lies {tensor}")
        chunks.append((offsets, tensor))
    return _joined(where, shape, chunks)


def _joined(where: str, shape: tuple[int, ...], chunks: Sequence[tuple[tuple[int, ...], LazyTensor]]) -> LazyTensor:
    """Chunks, by their offsets, as one tensor: rows below one another, and in each band columns beside one another."""
    if not shape:
        if len(chunks) != 1:
            raise ValueError(f"{where} is a single number, in {len(chunks)} chunks")
        return chunks[0][1]
    for offsets, tensor in chunks:
        if any(offsets[2:]) or tensor.shape[2:] != shape[2:]:
            raise ValueError(f"{where} is cut along its third side or further; only rows and columns can be joined")
    height, depth = shape[0], prod(shape[2:])
    width = prod(shape[1:])
    flat = any(tensor.shape[1:] != shape[1:] for _, tensor in chunks)  # columns are those of a matrix
    parts = sorted(
        (
            _Chunk(offsets[0], offsets[1] * depth, _matrix(tensor)) if flat else _Chunk(offsets[0], 0, tensor)
            for offsets, tensor in chunks
        ),
        key=lambda part: (part.top, part.left),
    )
    bands: list[LazyTensor] = []
    active: list[_Chunk] = []
    waiting = iter([*parts, None])
    upcoming = next(waiting)
    cuts = {0, height} | {p.top for p in parts} | {p.top + p.tensor.height for p in parts}
    for top, bottom in pairwise(sorted(cuts)):
        active = [part for part in active if part.top + part.tensor.height > top]
        while upcoming and upcoming.top == top:
            active.append(upcoming)
            upcoming = next(waiting)
        active.sort(key=lambda part: part.left)
        columns = 0
        for part in active:
            if part.left != columns or bottom > height:
                break
            columns += prod(part.tensor.shape[1:])
        else:
            if columns == width:
                bands.append(beside([rows(part.tensor, top - part.top, bottom - part.top) for part in active]))
                continue
        raise ValueError(f"{where} has shape {shape}, but its chunks do not cover rows {top} to {bottom} exactly once")
    whole = below(bands)
    return Reshaped(whole, shape) if whole.shape != shape else whole


def _matrix(tensor: LazyTensor) -> LazyTensor:
    shape = (tensor.height, prod(tensor.shape[1:]))
    return tensor if tensor.shape == shape else Reshaped(tensor, shape)


# --- writing


def write_dcp(folder: Path, contents: Mapping[str, Any], progress: Callable[[int], None]) -> None:
    """Write a folder that torch.distributed.checkpoint.load reads, on any number of ranks.

    Args:
        contents: nested dictionaries of lazy tensors and of values, as they would be given to dcp.save; a name is
            made of the keys on the way, joined by dots.
        progress: is told the bytes of tensors just written.
    """
    try:
        import torch
        from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )
    except ImportError as error:
        raise ImportError("writing a DCP folder needs torch: pip install 'mm-convert[torch]'") from error

    folder.mkdir(parents=True, exist_ok=True)
    described, places, paths = {}, {}, {}
    number = 0
    file = (folder / "__0_0.distcp").open("xb")
    try:
        for path, value in _leaves(contents):
            name = ".".join(path)
            if name in paths:
                raise ValueError(f"{'/'.join(paths[name])} and {'/'.join(path)} would both be called {name}")
            paths[name] = path
            chunks = []
            for top, part in _cut(value) if isinstance(value, LazyTensor) else [(0, value)]:
                if file.tell() > _FILE_BYTES:
                    file.close()
                    number += 1
                    file = (folder / f"__0_{number}.distcp").open("xb")
                start = file.tell()
                write_archive(file, part, progress)
                key = MetadataIndex(name)
                if isinstance(part, LazyTensor):
                    offsets = torch.Size((top, *[0] * (len(part.shape) - 1)) if part.shape else ())
                    key = MetadataIndex(name, offsets, len(chunks))
                    chunks.append(ChunkStorageMetadata(offsets, torch.Size(part.shape)))
                places[key] = _StorageInfo(f"__0_{number}.distcp", start, file.tell() - start)
            if isinstance(value, LazyTensor):
                properties = TensorProperties(getattr(torch, TORCH_NAMES[value.dtype]))
                described[name] = TensorStorageMetadata(properties, torch.Size(value.shape), chunks)
            else:
                described[name] = BytesStorageMetadata()
    finally:
        file.close()
    index = Metadata(described, paths, places, StorageMeta(), CURRENT_DCP_VERSION)
    (folder / INDEX).write_bytes(pickle.dumps(index, protocol=4))


def _leaves(contents: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in contents.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _cut(tensor: LazyTensor) -> Iterator[tuple[int, LazyTensor]]:
    """A tensor in chunks of some rows, and the first row of each."""
    step = max(1, _CHUNK_BYTES // max(1, tensor.row_bytes))
    for top in range(0, tensor.height, step) if tensor.shape else [0]:
        yield top, rows(tensor, top, min(top + step, tensor.height))
    if not tensor.height:
        yield 0, tensor
