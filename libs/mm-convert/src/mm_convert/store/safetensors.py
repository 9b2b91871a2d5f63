"""Reading and writing safetensors files as byte ranges: no tensor is ever made, memory stays flat, any dtype passes.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data without gaps.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from mm_convert.files import brief, open_file, parse_json, read_bytes, read_exactly
from mm_convert.tensors import views
from mm_convert.tensors.views import BITS, MAX_SIDES, LazyTensor, Stored

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
INDEX_SUFFIX = ".safetensors.index.json"
_MAX_NAME = 1000  # characters of the name of a tensor


def read_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file in the order of their data, and its metadata.

    Raises ValueError for anything that is not a whole, honest safetensors file.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length.to_bytes(8, "little") == b"version ":
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is truncated or not a safetensors file: it promises a header of {length:,} bytes "
                f"and has {size:,} bytes in all"
            )
        raw = read_exactly(file, length)
    try:
        header = parse_json(raw, pairs=_refuse_doubles)
        if not isinstance(header, dict):
            raise ValueError(f"it is {brief(header)}, not an object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("__metadata__ holds something else than text")
        found = {name: _locate(path, name, record, 8 + length) for name, record in header.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} has a broken safetensors header: {error}") from error

    found = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    position = 8 + length
    for name, tensor in found.items():
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "leaves a gap before it"
            raise ValueError(f"{path} has a lying header: the data of {name} {kind}")
        position += tensor.nbytes
    if position != size:
        what = "is truncated" if position > size else "has bytes that belong to no tensor"
        raise ValueError(f"{path} {what}: its header describes {position:,} bytes, the file has {size:,}")
    return found, metadata


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0][:_MAX_NAME]} stands in it twice")
    return result


def _locate(path: Path, name: str, record: Mapping[str, Any], data: int) -> Stored:
    if len(name) > _MAX_NAME:
        raise ValueError(f"a tensor has a name of {len(name):,} characters, {name[:80]}…")
    lists = [record.get(key) for key in ("shape", "data_offsets")] if isinstance(record, dict) else []
    if not lists or not all(isinstance(numbers, list) for numbers in lists) or len(lists[1]) != 2:
        raise ValueError(f"{name} is {brief(record)}, not a dtype, a shape and two offsets")
    dtype, shape, (start, end) = record.get("dtype"), *lists
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} is of dtype {brief(dtype)}, which is none of {', '.join(BITS)}")
    sides = all(type(n) is int and 0 <= n < 2**63 for n in [*shape, start, end])
    if not sides or start > end or len(shape) > MAX_SIDES:
        raise ValueError(f"{name} has shape {brief(shape)} and offsets {brief(start)}, {brief(end)}")
    if (end - start) * 8 != prod(shape) * BITS[dtype]:
        needed = prod(shape) * BITS[dtype] // 8
        raise ValueError(f"{name} is {dtype} {shape}, {needed:,} bytes, but its offsets span {end - start:,}")
    return Stored(path, data + start, dtype, tuple(shape))


# --- a folder of files


def read_folder(folder: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of the one checkpoint in a folder, file by file, and its metadata.

    Raises ValueError when there is none, or several, and when its index and its files contradict each other.
    """
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) > 1:
        raise ValueError(f"{folder} holds several checkpoints: {_list_files(indices)}; name one of them")
    if indices:
        return read_indexed(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        refuse_link_out(file)
    if len(files) == 1 or (files and _is_complete_series(files)):
        return read_files(files)
    found = f"{_list_files(files)} and no index; name one of them" if files else "no *.safetensors file"
    raise ValueError(f"{folder} holds {found}")


def read_indexed(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of the files that an index names. Errors as `read_folder`."""
    index = read_index(path)
    files = [path.parent / name for name in sorted(set(index.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(f"{path} names {', '.join(missing)}, which is not there")
    for file in files:
        refuse_link_out(file)
    found, metadata = read_files(files)
    for name, tensor in found.items():
        if index.pop(name, "no file") != tensor.file.name:
            raise ValueError(f"the index of {path.parent} does not have {name} in {tensor.file.name}, where it is")
    if index:
        name, file = index.popitem()
        raise ValueError(f"the index of {path.parent} has {name} in {file}, where it is not")
    return found, metadata


def read_files(files: Sequence[Path]) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of several files. Raises ValueError for one that is in two of them."""
    found: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files:
        tensors_here, metadata_here = read_file(file)
        for name in tensors_here:
            if name in found:
                raise ValueError(f"{name} is in {found[name].file} and again in {file}")
        found |= tensors_here
        metadata |= metadata_here
    return found, metadata


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> file name, which must lie beside the index."""
    raw = read_bytes(path)
    try:
        weight_map = dict(parse_json(raw)["weight_map"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a safetensors index: {error!r}") from error
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path} sends {name} to {file!r}, outside its own folder")
    return weight_map


def refuse_link_out(file: Path, folder: Path | None = None) -> None:
    """A file of a folder may be a link within it, or into a cache of the hub (models--…/blobs), not elsewhere."""
    folder, real = (folder or file.parent).resolve(), file.resolve()
    cache = next((parent.parent for parent in folder.parents if parent.name == "snapshots"), folder)
    in_hub = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if not (in_hub or real.is_relative_to(folder) or real.is_relative_to(cache / "blobs")):
        raise ValueError(f"{file} is a link to {real}, outside its folder; name that file itself if it is meant")


def _is_complete_series(files: Sequence[Path]) -> bool:
    names = [file.name for file in files]
    stem = names[0].partition("-00001-of-")[0]
    return names == [f"{stem}-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]


def _list_files(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files[:5]) + (" …" if len(files) > 5 else "")


# --- writing


def write_file(
    path: Path,
    contents: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    progress: Callable[[int], None],
) -> None:
    """Write one safetensors file, data in the order of `contents`; `progress` is told the bytes just written."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in contents.items():
        offsets = [position, position + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        views.write(views.pieces(contents.values()), file, progress)
