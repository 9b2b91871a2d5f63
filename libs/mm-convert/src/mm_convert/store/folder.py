"""Targets that appear whole or not at all: written under a hidden name beside the target, renamed at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mm_convert.progress import readable_bytes

# What --overwrite may replace: files of checkpoints, and what stands beside them on the hub.
_OURS = ("*.safetensors", "*.safetensors.index.json", "config.json", "mm_convert.json", "model_optim_rng.pt")
_OURS += ("mp_rank_*", "release", "iter_*", "latest_checkpointed_iteration.txt", ".metadata", "*.distcp")
_OURS += ("adapter_config.json", "generation_config.json", "preprocessor_config.json", "tokenizer*.json", "vocab.json")
_OURS += ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "README.md", "LICENSE*")


@contextmanager
def new_folder(target: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it takes the target's name when the block ends well.

    Raises ValueError, before anything is written, when the target exists (with `overwrite`: when it holds anything
    else than a checkpoint) or when the disk has fewer than `nbytes` bytes left.
    """
    target = target.resolve()
    refuse_target(target, overwrite)
    _make_room(target, nbytes)
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


@contextmanager
def new_file(target: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """The same for one file."""
    refuse_target(target, overwrite, folder=False)
    _make_room(target, nbytes)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent) as hidden:
        yield Path(hidden) / target.name
        (Path(hidden) / target.name).replace(target)


@contextmanager
def files_into(target: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """A hidden folder in `target`, which holds other things; what is written there moves into it when the block ends.

    The files move one by one, small ones last: an index never names what is not there.
    """
    _make_room(target / "file", nbytes)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target) as hidden:
        yield Path(hidden)
        for file in sorted(Path(hidden).iterdir(), key=lambda file: -file.stat().st_size):
            refuse_target(target / file.name, overwrite, folder=False)
            file.replace(target / file.name)


def _make_room(target: Path, nbytes: int) -> None:
    free = free_space(target)
    if free < nbytes:
        raise ValueError(f"{target} needs {readable_bytes(nbytes)}, its disk has {readable_bytes(free)} left")
    target.parent.mkdir(parents=True, exist_ok=True)


def free_space(target: Path) -> int:
    """Bytes left on the disk that a target, which need not exist, would be on."""
    return shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free


def refuse_target(target: Path, overwrite: bool, folder: bool = True) -> None:
    """Raises ValueError for a target that is there, or that may not be replaced."""
    blocked = next((parent for parent in target.parents if parent.exists() and not parent.is_dir()), None)
    if blocked:
        raise ValueError(f"{target} cannot be made: {blocked} is a file, not a folder; name another target")
    if not target.exists() or (folder and target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target} exists; name another target, or give --overwrite (overwrite=True) to replace it")
    if target.is_dir() != folder:
        raise ValueError(f"{target} is a {'file' if folder else 'folder'}; remove it yourself or name another target")
    foreign = [p.name for p in target.iterdir() if not any(p.match(ours) for ours in _OURS)] if folder else []
    if foreign:
        raise ValueError(
            f"{target} holds {foreign[0]}, which is no part of a checkpoint, so it is not replaced; "
            "remove it yourself or name another target"
        )


def _umask() -> int:
    mask = os.umask(0o022)  # there is no way to read it without setting it
    os.umask(mask)
    return mask
