"""The three kinds of target: a folder, one file, files among others.

Each appears whole or not at all: it is written under a hidden name beside the target, and renamed at the end.
`refuse(overwrite, names)` raises ValueError for a target that is there, or that may not be replaced; `names` are those
of the files to come. `open(nbytes, overwrite, names)` gives a hidden folder to write into, and raises before that when
the disk has fewer than `nbytes` bytes left. `manifest` is the file that says where the others come from.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mm_convert.files import read_text
from mm_convert.store.mm import MANIFEST
from mm_convert.write.progress import readable_bytes

# What --overwrite may replace without being told: whole checkpoints that can be made again, never a training run.
_OURS = ("*.safetensors", "*.safetensors.index.json", "config.json", MANIFEST, "adapter_config.json")
_OURS += ("mp_rank_*", "release", "model_optim_rng.pt", "latest_checkpointed_iteration.txt", ".metadata", "*.distcp")
_OURS += ("mm", ".*.partial-*")
_OURS += ("high_noise_model", "low_noise_model", "transformer", "transformer_2", "experts.json")  # pairs of experts


@dataclass(frozen=True)
class Folder:
    """A folder of its own.

    `pointer`: a file beside it, and its text, which says that this folder is the one to read; written last.
    """

    path: Path
    pointer: tuple[Path, str] | None = None
    manifest = MANIFEST

    def refuse(self, overwrite: bool, names: Collection[str]) -> None:
        if self.pointer:
            file, text = self.pointer
            if file.exists() and (said := read_text(file, limit=4096).strip()) != text:
                raise ValueError(f"{file} says {said}: a training run's; name another target, so that it stays")
        refuse_target(self.path, overwrite, replaceable=names)

    @contextmanager
    def open(self, nbytes: int, overwrite: bool, names: Collection[str]) -> Iterator[Path]:
        target = self.path.resolve()
        _make_room(target, nbytes)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            folder.chmod(0o777 & ~_umask())
            yield folder
            _put(folder, target, overwrite)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.pointer:
            file, text = self.pointer
            hidden = file.with_name(f".{file.name}.partial")
            hidden.write_text(text, encoding="utf-8")
            hidden.replace(file)


@dataclass(frozen=True)
class OneFile:
    """One file; its manifest has a longer name."""

    path: Path

    @property
    def manifest(self) -> str:
        return f"{self.path.name}.{MANIFEST}"

    def refuse(self, overwrite: bool, names: Collection[str]) -> None:
        refuse_target(self.path, overwrite, folder=False)

    @contextmanager
    def open(self, nbytes: int, overwrite: bool, names: Collection[str]) -> Iterator[Path]:
        _make_room(self.path, nbytes)
        with tempfile.TemporaryDirectory(prefix=f".{self.path.name}.partial-", dir=self.path.parent) as hidden:
            yield Path(hidden)
            for name in (self.manifest, self.path.name):  # a file alone may not say all that it is
                (Path(hidden) / name).replace(self.path.parent / name)


@dataclass(frozen=True)
class Among:
    """Files in a folder that holds other things, those that they are made from; it has its own manifest, or none."""

    path: Path

    @property
    def manifest(self) -> str | None:
        return None if (self.path / MANIFEST).exists() else MANIFEST

    def refuse(self, overwrite: bool, names: Collection[str]) -> None:
        there = [path.name for path in self.path.glob("*.safetensors*")]
        there += [name for name in names if (self.path / name).exists()]
        if there:
            raise ValueError(f"{self.path / there[0]} exists, beside the source; name another target")

    @contextmanager
    def open(self, nbytes: int, overwrite: bool, names: Collection[str]) -> Iterator[Path]:
        _make_room(self.path / "file", nbytes)
        with tempfile.TemporaryDirectory(prefix=f".{self.path.name}.partial-", dir=self.path) as hidden:
            yield Path(hidden)
            # One by one: an index after what it names.
            for file in sorted(Path(hidden).iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
                refuse_target(self.path / file.name, overwrite=False, folder=False)
                file.replace(self.path / file.name)


Destination = Folder | OneFile | Among


def _put(folder: Path, target: Path, overwrite: bool) -> None:
    """Give a finished folder the target's name; what is there is taken away only once it has a successor."""
    if not (overwrite and target.exists()):
        folder.rename(target)  # onto nothing, or an empty folder
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / "checkpoint")
    try:
        folder.rename(target)
    except BaseException:
        (old / "checkpoint").rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old)


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
    made = (target / MANIFEST if folder else target.with_name(f"{target.name}.{MANIFEST}")).exists()
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
