"""A checkpoint folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_convert.progress import readable_bytes
from mm_convert.store.safetensors import write_file
from mm_convert.tensors import LazyTensor

_OURS = ("*.safetensors", "*.safetensors.index.json", "config.json")  # what --overwrite may replace


@dataclass(frozen=True)
class Files:
    """What to write: tensors by file name, the index's name (None: one file without index), and header metadata."""

    shards: Mapping[str, Mapping[str, LazyTensor]]
    index: str | None
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for contents in self.shards.values() for tensor in contents.values())


def name_shards(
    stem: str, shards: Sequence[Mapping[str, LazyTensor]], metadata: Mapping[str, str], always_index: bool
) -> Files:
    """The hub's file names: `stem.safetensors`, or `stem-00001-of-00003.safetensors`, … and an index."""
    if len(shards) == 1 and not always_index:
        return Files({f"{stem}.safetensors": shards[0]}, None, metadata)
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    return Files(dict(zip(names, shards, strict=True)), f"{stem}.safetensors.index.json", metadata)


@contextmanager
def new_folder(target: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it takes the target's name when the block ends well.

    Raises ValueError, before anything is written, when the target exists (with `overwrite`: when it holds anything
    else than a checkpoint) or when the disk has fewer than `nbytes` bytes left.
    """
    target = target.resolve()
    refuse_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise ValueError(f"{target} needs {readable_bytes(nbytes)}, its disk has {readable_bytes(free)} left")
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        if overwrite and target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            target.rename(old / "checkpoint")
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)  # onto nothing, or an empty folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_target(target: Path, overwrite: bool) -> None:
    blocked = next((parent for parent in target.parents if parent.exists() and not parent.is_dir()), None)
    if blocked:
        raise ValueError(f"{target} cannot be made: {blocked} is a file, not a folder; name another target")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target} exists; name another target, or give --overwrite (overwrite=True) to replace it")
    foreign = [p.name for p in target.iterdir() if not any(p.match(ours) for ours in _OURS)] if target.is_dir() else []
    if not target.is_dir() or foreign:
        what = f"holds {foreign[0]}, which is no part of a checkpoint" if foreign else "is a file"
        raise ValueError(f"{target} {what}, so it is not replaced; remove it yourself or name another target")


def _umask() -> int:
    mask = os.umask(0o022)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def write_folder(
    folder: Path, files: Files, config: Mapping[str, Any] | bytes, progress: Callable[[int], None]
) -> None:
    """Write the safetensors files, their index and config.json (bytes are taken as they are)."""
    for name, contents in files.shards.items():
        write_file(folder / name, contents, files.metadata, progress)
    if files.index:
        weight_map = {tensor: name for name, contents in files.shards.items() for tensor in contents}
        index = {"metadata": {"total_size": files.nbytes}, "weight_map": weight_map}
        (folder / files.index).write_bytes(_json(index))
    (folder / "config.json").write_bytes(config if isinstance(config, bytes) else _json(config))


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def split(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> list[dict[str, LazyTensor]]:
    """Cut into shards of at most `shard_bytes`, in order; a larger tensor gets a shard of its own."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
