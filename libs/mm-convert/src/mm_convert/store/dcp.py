"""Directories of torch.distributed.checkpoint: read without torch; written with it, as the index is pickled from its
classes.

    .metadata           a pickle: every tensor's dtype, shape and chunks, and where each chunk lies
    __R_N.distcp        what rank R wrote: one file of torch.save after the other, each a chunk
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mm_convert.store.chunks import join_chunks
from mm_convert.store.storages import DTYPES, TORCH_NAMES
from mm_convert.store.torch_file import read_torch_file, write_archive
from mm_convert.store.unpickle import Opaque, unpickle
from mm_convert.tensors.mapping import Tensors
from mm_convert.tensors.views import Computed, LazyTensor, rows

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


class Index:
    """What a checkpoint holds, by its index: names such as `model.blocks.0.…`, `optimizer.…`.

    Attributes:
        tensors: the names of its tensors.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when the index is missing, damaged, or has code in it, which is not run."""
        self.folder = folder
        self._described, self._places = _read_index(folder)
        self.tensors = [name for name, record in self._described.items() if record.name == "TensorStorageMetadata"]

    @property
    def parts(self) -> list[str]:
        """What the names begin with: model, optimizer, …"""
        return sorted({name.partition(".")[0] for name in self.tensors})

    def tensor(self, name: str) -> LazyTensor:
        """One tensor, whole. Raises ValueError when a chunk is missing, compressed, or cut as torch does not cut."""
        return _tensor(self.folder, name, self._described[name], self._places)

    def part(self, part: str) -> dict[str, LazyTensor]:
        """The tensors of one part, by their names without it; none if it is not there."""
        start = f"{part}."
        return {name.removeprefix(start): self.tensor(name) for name in self.tensors if name.startswith(start)}

    def value(self, name: str) -> Any:
        """What is not a tensor: a number, text, arguments (see `read_torch_file`)."""
        if (name, None) not in self._places:
            there = ", ".join(name for name, offset in self._places if offset is None)
            raise ValueError(f"{self.folder} has no value {name}; it has {there}")
        return _read(self.folder, self._places[name, None])


def open_dcp(folder: str | Path, part: str = "model") -> Tensors:
    """One part of a checkpoint, be it a whole model or not: its names, without the part, to tensors, lazily.

    Raises ValueError when the part is not there, and for what is missing, damaged, or cut as torch does not cut.
    """
    index = Index(Path(folder))
    tensors = index.part(part)
    if not tensors:
        raise ValueError(f"{folder} holds no {part}; it holds {', '.join(index.parts)}")
    return Tensors(tensors)


def read_dcp(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of a checkpoint, under the names that it has. Errors as of `Index`."""
    index = Index(folder)
    return {name: index.tensor(name) for name in index.tensors}


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
    inside = isinstance(file, str) and Path(file).name == file and file not in ("", "..")
    if not inside or not all(type(n) is int and n >= 0 for n in (start, size)):
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
        lies = (tensor.dtype, tensor.shape) if isinstance(tensor, LazyTensor) else type(tensor).__name__
        if lies != (DTYPES[dtype], sizes):
            raise ValueError(f"{where} should have {DTYPES[dtype]} {sizes} at {offsets}, but there lies {lies}")
        chunks.append((offsets, tensor))
    return join_chunks(where, shape, chunks)


# --- writing

_Part = tuple[str, tuple[int, ...] | None, Any, int]  # name, offset, what, bytes


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

    described, paths = {}, {}
    parts: list[_Part] = []
    for path, value in _leaves(contents):
        name = ".".join(path)
        if name in paths:
            raise ValueError(f"{' / '.join(paths[name])} and {' / '.join(path)} would both be called {name}")
        paths[name] = path
        if isinstance(value, LazyTensor):
            if value.dtype not in TORCH_NAMES:
                raise ValueError(f"{name} is {value.dtype}, which torch does not have")
            own = [(torch.Size(offset), part) for offset, part in _cut(value)]
            parts += [(name, offset, part, part.nbytes) for offset, part in own]
            properties = TensorProperties(getattr(torch, TORCH_NAMES[value.dtype]))
            chunks = [ChunkStorageMetadata(offset, torch.Size(part.shape)) for offset, part in own]
            described[name] = TensorStorageMetadata(properties, torch.Size(value.shape), chunks)
        else:
            parts.append((name, None, value, 0))
            described[name] = BytesStorageMetadata()

    folder.mkdir(parents=True, exist_ok=True)
    places = {}
    for number, group in enumerate(_group(parts)):
        with (folder / f"__0_{number}.distcp").open("xb") as file:
            for name, offset, part, _ in group:
                start = file.tell()
                write_archive(file, part, progress)
                places[MetadataIndex(name, offset)] = _StorageInfo(Path(file.name).name, start, file.tell() - start)
    index = Metadata(described, paths, places, StorageMeta(), CURRENT_DCP_VERSION)
    (folder / INDEX).write_bytes(pickle.dumps(index, protocol=4))


def _leaves(contents: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in contents.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _cut(tensor: LazyTensor) -> Iterator[tuple[tuple[int, ...], LazyTensor]]:
    """A tensor in chunks of some rows, and the offset of each."""
    if not tensor.nbytes or not tensor.shape:
        yield (0,) * len(tensor.shape), tensor
        return
    step = max(1, _CHUNK_BYTES // tensor.row_bytes)
    for top in range(0, tensor.height, step):
        yield (top, *[0] * (len(tensor.shape) - 1)), rows(tensor, top, min(top + step, tensor.height))


def _group(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Parts by file: each is closed when it is large enough."""
    group: list[_Part] = []
    size = 0
    for part in parts:
        group.append(part)
        size += part[3]
        if size >= _FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
