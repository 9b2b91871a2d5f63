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
from typing import Any, NamedTuple

from mm_convert.files import brief, read_bytes
from mm_convert.store.chunks import join_chunks
from mm_convert.store.storages import DTYPES, TORCH_NAMES
from mm_convert.store.torch_file import read_torch_file, write_archive
from mm_convert.store.unpickle import Opaque, unpickle
from mm_convert.tensors.mapping import Tensors
from mm_convert.tensors.views import MAX_SIDES, Computed, LazyTensor, rows

INDEX = ".metadata"
_MAX_INDEX = 2 * 2**30  # bytes: a chunk has some 140, and 1,024 ranks cut 3,300 tensors into 3.4 million
_MAX_OPCODES = 5_000_000  # of a small index; of a larger one, so many for each byte:
_OPCODES_PER_BYTE = 0.75  # 65 for every chunk, 110 for every tensor
_CHUNK_BYTES = 64 * 2**20  # written at once: a rank that wants some rows reads little more than them
_FILE_BYTES = 4 * 2**30

# --- reading


@dataclass(frozen=True)
class _Place:
    """Where a chunk, or a value, lies."""

    file: str
    start: int
    stop: int


class Description(NamedTuple):
    """What the index says of a tensor: dtype, as safetensors spells it, shape, and offset and shape of each chunk."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]


class Index:
    """What a checkpoint holds, by its index: names such as `model.blocks.0.…`, `optimizer.…`.

    Attributes:
        names: of all that it holds.
        tensors: the names of its tensors.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when the index is missing, damaged, or has code in it, which is not run."""
        self.folder = folder
        self._described, self._places = _read_index(folder)
        self._sizes: dict[str, tuple[str, dict[tuple[int, ...], tuple[int, ...]]]] = {}
        self.names = list(self._described)
        self.tensors = [name for name, record in self._described.items() if record.name == "TensorStorageMetadata"]

    @property
    def parts(self) -> list[str]:
        """What the names begin with: model, optimizer, …"""
        return sorted({name.partition(".")[0] for name in self.tensors})

    def describe(self, name: str) -> Description | None:
        """A tensor, by the index alone; None for what is none. Raises ValueError where that is not torch's."""
        record, where = self._described[name], f"{self.folder}: {name}"
        if record.name != "TensorStorageMetadata":
            return None
        try:
            shape, properties = record.state["size"], record.state["properties"].state
            dtype = (properties[0] if isinstance(properties, tuple) else properties["dtype"]).name
            chunks = [(chunk.state["offsets"], chunk.state["sizes"]) for chunk in record.state["chunks"]]
            for sides in (shape, *(sides for chunk in chunks for sides in chunk)):
                if not _are_counts(sides, 0) or len(sides) != len(shape):
                    raise ValueError(f"{where} has shape {brief(shape)}, yet a chunk with {brief(sides)}")
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.folder / INDEX} describes {name} in a way that is not torch's ({brief(error)})"
            ) from error
        if dtype not in DTYPES:
            raise ValueError(f"{where} is {dtype}, which no checkpoint of a model has")
        return Description(DTYPES[dtype], shape, chunks)

    def chunk(self, name: str, offset: tuple[int, ...]) -> LazyTensor:
        """What lies at an offset of a tensor. Raises ValueError when it is missing, or something else."""
        if name not in self._sizes:
            described = self.describe(name)
            assert described
            self._sizes[name] = described.dtype, {o: sizes for o, sizes in described.chunks if prod(sizes)}
        dtype, sizes = self._sizes[name]
        return self._chunk(f"{self.folder}: {name}", name, dtype, offset, sizes[offset])

    def _chunk(self, where: str, name: str, dtype: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> LazyTensor:
        if (name, offset) not in self._places:
            raise ValueError(f"{where} has a chunk at {offset}, which lies nowhere")
        tensor = _read(self.folder, self._places[name, offset])
        lies = (tensor.dtype, tensor.shape) if isinstance(tensor, LazyTensor) else type(tensor).__name__
        if lies != (dtype, sizes):
            raise ValueError(f"{where} should have {dtype} {sizes} at {offset}, but there lies {lies}")
        return tensor

    def tensor(self, name: str) -> LazyTensor:
        """One tensor, whole, joined from its chunks. Raises ValueError when a chunk is missing, compressed, or cut as
        torch does not cut.
        """
        described, where = self.describe(name), f"{self.folder}: {name}"
        assert described
        dtype, shape, chunks = described
        if not prod(shape):
            return Computed(dtype, shape, lambda start, stop: b"")
        held = [cut for cut in chunks if prod(cut[1])]  # without those of ranks that had nothing
        read = [(offset, self._chunk(where, name, dtype, offset, sizes)) for offset, sizes in held]
        return join_chunks(where, shape, read)

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
    if not path.exists():
        raise ValueError(f"{folder} has no {INDEX}: it is no DCP checkpoint, or saving it was interrupted")
    data = read_bytes(path, _MAX_INDEX, "index")
    index = unpickle(data, str(path), {}, limit=max(_MAX_OPCODES, int(_OPCODES_PER_BYTE * len(data))))
    try:
        described, places = index.state["state_dict_metadata"], {}
        for key, info in index.state["storage_data"].items():
            name, offset = key.state["fqn"], key.state.get("offset")
            assert isinstance(name, str)
            assert offset is None or _are_counts(offset)
            places[name, offset] = _place(path, name, info.state)
        assert all(isinstance(name, str) and isinstance(record, Opaque) for name, record in described.items())
    except (AttributeError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is not the index of a DCP checkpoint ({brief(error)})") from error
    return described, places


def _place(path: Path, name: str, info: Mapping[str, Any]) -> _Place:
    file, start, size = info["relative_path"], info["offset"], info["length"]
    if info.get("transform_descriptors"):
        how = brief(info["transform_descriptors"])
        raise ValueError(f"{path} has {name} transformed by {how}: save it without")
    inside = isinstance(file, str) and Path(file).name == file and file not in ("", "..")
    if not inside or not _are_counts((start, size), 0):
        raise ValueError(
            f"{path} has {name} in {brief(file)}, bytes {brief(start)} and {brief(size)} more, outside its own folder"
        )
    return _Place(file, start, start + size)


def _are_counts(sides: Any, least: int = -(2**63)) -> bool:
    small = isinstance(sides, tuple) and len(sides) <= MAX_SIDES
    return small and all(type(n) is int and least <= n < 2**63 for n in sides)


def _read(folder: Path, place: _Place) -> Any:
    if not (folder / place.file).exists():
        raise ValueError(f"{folder} lacks {place.file}, which its {INDEX} names: copy the files of all ranks")
    return read_torch_file(folder / place.file, place.start, place.stop)


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
