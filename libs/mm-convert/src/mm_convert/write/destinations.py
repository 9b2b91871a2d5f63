"""The three kinds of target: a folder, one file, files among others.

Each appears whole or not at all: it is written under a hidden name beside the target, and renamed at the end. Each has

    into, name      the folder in which it takes its place, and what its lock and its hidden folders are named after
    refuse          raises ValueError for a target that is there, or that may not be replaced; `names` are the files to
                    come, `ours` what has just been finished of a conversion that was killed
    write           gives a hidden folder to write into, whose content takes its place at the end of the block
    manifest        the name of the file that says where the others come from, or None
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mm_convert.files import read_text
from mm_convert.store.mm import MANIFEST
from mm_convert.write.install import recover, write_hidden
from mm_convert.write.lock import lock_output
from mm_convert.write.progress import readable_bytes

# What --overwrite may replace without being told: whole checkpoints that can be made again, never a training run.
_OURS = ("*.safetensors", "*.safetensors.index.json", "config.json", MANIFEST, "adapter_config.json")
_OURS += ("mp_rank_*", "release", "model_optim_rng.pt", "latest_checkpointed_iteration.txt", ".metadata", "*.distcp")
_OURS += ("mm", ".*.partial-*", ".*.lock")
_OURS += ("high_noise_model", "low_noise_model", "transformer", "transformer_2", "experts.json")  # pairs of experts
_OURS += ("chat_options.json",)  # beside weights that answer: how mm_train asked them


@dataclass(frozen=True)
class Folder:
    """A folder of its own.

    `pointer`: a file beside it, and its text, which says that this folder is the one to read; written last.
    """

    path: Path
    pointer: tuple[Path, str] | None = None

    @property
    def into(self) -> Path:
        return self.path.resolve().parent

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def manifest(self, ours: Collection[str] = ()) -> str | None:
        return MANIFEST

    def refuse(self, overwrite: bool, names: Collection[str], ours: Collection[str] = ()) -> None:
        if self.pointer:
            file, text = self.pointer
            if file.exists() and (said := read_text(file, limit=4096).strip()) != text:
                raise ValueError(f"{file} says {said}: a training run's; name another target, so that it stays")
        refuse_target(self.path, overwrite or bool(ours), replaceable=names)

    @contextmanager
    def write(self, names: Collection[str]) -> Iterator[Path]:
        moves = [self.name, *([self.pointer[0].name] if self.pointer else [])]
        with write_hidden(self.into, self.name, moves) as hidden:
            (hidden / self.name).mkdir()
            yield hidden / self.name
            if self.pointer:
                (hidden / self.pointer[0].name).write_text(self.pointer[1], encoding="utf-8")


@dataclass(frozen=True)
class OneFile:
    """One file; its manifest has a longer name."""

    path: Path

    @property
    def into(self) -> Path:
        return self.path.absolute().parent

    @property
    def name(self) -> str:
        return self.path.name

    def manifest(self, ours: Collection[str] = ()) -> str | None:
        return f"{self.name}.{MANIFEST}"

    def refuse(self, overwrite: bool, names: Collection[str], ours: Collection[str] = ()) -> None:
        refuse_target(self.path, overwrite or bool(ours), folder=False)

    @contextmanager
    def write(self, names: Collection[str]) -> Iterator[Path]:
        # A file alone may not say all that it is, so it comes last; an old one must not be told by a new manifest.
        manifest, there = f"{self.name}.{MANIFEST}", self.path.exists()
        moves = [self.name, manifest] if there else [manifest, self.name]
        with write_hidden(self.into, self.name, moves, stale=manifest if there else "") as hidden:
            yield hidden


@dataclass(frozen=True)
class Among:
    """Files in a folder that holds other things, those that they are made from; it has its own manifest, or none."""

    path: Path

    @property
    def into(self) -> Path:
        return self.path.resolve()

    @property
    def name(self) -> str:
        return self.into.name

    def manifest(self, ours: Collection[str] = ()) -> str | None:
        return None if (self.path / MANIFEST).exists() and MANIFEST not in ours else MANIFEST

    def refuse(self, overwrite: bool, names: Collection[str], ours: Collection[str] = ()) -> None:
        there = [path.name for path in self.path.glob("*.safetensors*")]
        there += [name for name in names if (self.path / name).exists()]
        there = [name for name in there if name not in ours]
        if there:
            raise ValueError(f"{self.path / there[0]} exists, beside the source; name another target")

    @contextmanager
    def write(self, names: Collection[str]) -> Iterator[Path]:
        moves = sorted(names, key=lambda name: (name.endswith(".json"), name))  # an index after what it names
        with write_hidden(self.into, self.name, moves) as hidden:
            yield hidden


Destination = Folder | OneFile | Among


@contextmanager
def claim(destination: Destination, nbytes: int) -> Iterator[set[str]]:
    """Keep a destination for this process, and see to its disk; gives what was finished of a killed conversion.

    Raises ValueError when another process writes there, and for a disk with fewer than `nbytes` bytes left.
    """
    into, target = destination.into, destination.path
    _refuse_blocked(target)
    if not into.is_dir():
        _refuse_full(target, nbytes)
        into.mkdir(parents=True, exist_ok=True)
    with lock_output(target, into / f".{destination.name}.lock") as locked:
        ours = recover(into, destination.name) if locked else set()  # or a living process may be at it
        _refuse_full(target, nbytes)
        yield ours


def _refuse_full(target: Path, nbytes: int) -> None:
    free = free_space(target)
    if free < nbytes:
        raise ValueError(f"{target} needs {readable_bytes(nbytes)}, its disk has {readable_bytes(free)} left")


def _refuse_blocked(target: Path) -> None:
    blocked = next((parent for parent in target.parents if parent.exists() and not parent.is_dir()), None)
    if blocked:
        raise ValueError(f"{target} cannot be made: {blocked} is a file, not a folder; name another target")


def free_space(target: Path) -> int:
    """Bytes left on the disk that a target, which need not exist, would be on."""
    return shutil.disk_usage(next(parent for parent in target.absolute().parents if parent.exists())).free


def refuse_target(target: Path, overwrite: bool, folder: bool = True, replaceable: Collection[str] = ()) -> None:
    """Raises ValueError for a target that is there, or that may not be replaced.

    A folder may be replaced if it holds checkpoints alone, besides files of the names `replaceable`.
    """
    _refuse_blocked(target)
    if not target.exists() or (folder and target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(
            f"{target} exists; name another target, or replace it with --overwrite true (from Python: overwrite=True)"
        )
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
