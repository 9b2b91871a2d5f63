"""Targets that appear whole or not at all: written under a hidden name beside the target, renamed at the end."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mm_convert.write.progress import readable_bytes

# What --overwrite may replace without being told: whole checkpoints that can be made again, never a training run.
_OURS = ("*.safetensors", "*.safetensors.index.json", "config.json", "mm_convert.json", "adapter_config.json")
_OURS += ("mp_rank_*", "release", "model_optim_rng.pt", "latest_checkpointed_iteration.txt", ".metadata", "*.distcp")
_OURS += ("mm", ".*.partial-*")
_OURS += ("high_noise_model", "low_noise_model", "transformer", "transformer_2", "experts.json")  # pairs of experts


@contextmanager
def new_folder(target: Path, nbytes: int, overwrite: bool, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it takes the target's name when the block ends well.

    Raises ValueError, before anything is written, when the target exists (with `overwrite`: when it holds anything
    else than a checkpoint) or when the disk has fewer than `nbytes` bytes left.
    """
    target = target.resolve()
    refuse_target(target, overwrite, replaceable=replaceable)
    _make_room(target, nbytes)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        if overwrite and target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            target.rename(old / "checkpoint")
            try:
                folder.rename(target)
            except BaseException:
                (old / "checkpoint").rename(target)
                old.rmdir()
                raise
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
def files_into(target: Path, nbytes: int) -> Iterator[Path]:
    """A hidden folder in `target`, which holds other things; what is written there moves into it when the block ends.

    The files move one by one, an index after what it names.
    """
    _make_room(target / "file", nbytes)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target) as hidden:
        yield Path(hidden)
        for file in sorted(Path(hidden).iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
            refuse_target(target / file.name, overwrite=False, folder=False)
            file.replace(target / file.name)


def _make_room(target: Path, nbytes: int) -> None:
    free = free_space(target)
    if free < nbytes:
        raise ValueError(f"{target} needs {readable_bytes(nbytes)}, its disk has {readable_bytes(free)} left")
    target.parent.mkdir(parents=True, exist_ok=True)


def free_space(target: Path) -> int:
    """Bytes left on the disk that a target, which need not exist, would be on."""
    return shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free


def refuse_target(target: Path, overwrite: bool, folder: bool = True, replaceable: Collection[str] = ()) -> None:
    """Raises ValueError for a target that is there, or that may not be replaced.

    A folder may be replaced if it holds checkpoints alone, besides files of the names `replaceable`.
    """
    blocked = next((parent for parent in target.parents if parent.exists() and not parent.is_dir()), None)
    if blocked:
        raise ValueError(f"{target} cannot be made: {blocked} is a file, not a folder; name another target")
    if not target.exists() or (folder and target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target} exists; name another target, or give --overwrite (overwrite=True) to replace it")
    if target.is_dir() != folder:
        raise ValueError(f"{target} is a {'folder' if folder else 'file'}; remove it yourself or name another target")
    if folder and any(target.glob("*.safetensors")) and any((target / made).is_dir() for made in ("release", "mm")):
        raise ValueError(f"{target} holds published files and what was made of them; remove what you mean yourself")
    made = (target / "mm_convert.json" if folder else target.with_name(f"{target.name}.mm_convert.json")).exists()
    training = re.fullmatch(r"(iter|step)[-_]\d+", target.name) or (target / ".metadata").exists()
    if not made and (training or not folder):
        what = "may be of a training run" if training else "may hold more than weights"
        raise ValueError(f"{target} was not made by mm-convert and {what}; remove it yourself or name another target")
    foreign = _foreign(target, replaceable) if folder else None
    if foreign:
        raise ValueError(
            f"{target} holds {foreign.relative_to(target)}, which is no part of a checkpoint that a conversion makes, "
            "so it is not replaced; remove it yourself or name another target"
        )


def _foreign(folder: Path, replaceable: Collection[str]) -> Path | None:
    """The first thing in a folder that a conversion does not make."""
    for path in folder.iterdir():
        if (path.name in replaceable and path.is_file()) or path.match(".*.partial-*"):
            continue
        if not any(path.match(ours) for ours in _OURS):
            return path
        if path.is_dir() and (inside := _foreign(path, ())):
            return inside
    return None


def _umask() -> int:
    mask = os.umask(0o022)  # there is no way to read it without setting it
    os.umask(mask)
    return mask
