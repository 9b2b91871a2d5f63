"""What a conversion will write: planned whole before the first byte, so that it can be shown and refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_convert.__about__ import __version__
from mm_convert.store.dcp import read_dcp
from mm_convert.store.safetensors import read_file, write_file
from mm_convert.store.torch_file import SUFFIXES as TORCH_SUFFIXES
from mm_convert.store.torch_file import read_torch_file, write_torch_file
from mm_convert.tensors.views import LazyTensor, chunks, pieces
from mm_convert.write.folder import files_into, free_space, new_file, new_folder, refuse_target
from mm_convert.write.progress import Progress, readable_bytes

MANIFEST = "mm_convert.json"

Writer = Callable[[Path, Callable[[int], None]], None]


@dataclass(frozen=True)
class Output:
    """One file: its path in the target, the bytes of its tensors, and what writes it."""

    name: str
    nbytes: int
    write: Writer


@dataclass
class Plan:
    """All files of a target, and what will be said about where they come from.

    `inside`: the files go into this folder of the target, which stays as it is otherwise; `pointer`, a file of the
    target and its text, is written last. `among_others`: the files go into the target itself, which holds other things.
    """

    target: Path
    outputs: list[Output]
    manifest: dict[str, Any]
    inside: str = ""
    pointer: tuple[str, str] | None = None
    single_file: bool = False
    among_others: bool = False
    needs_torch: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def folder(self) -> Path:
        return self.target / self.inside

    def refuse(self, overwrite: bool) -> None:
        """Raises ValueError for a target that is there, or may not be replaced."""
        pointer = self.target / self.pointer[0] if self.pointer and self.inside else None
        if pointer and pointer.exists() and (said := pointer.read_text().strip()) != self.pointer[1]:
            raise ValueError(f"{pointer} says {said}: a training run's; name another target, so that it stays")
        if self.among_others:
            there = [path.name for path in self.target.glob("*.safetensors*")]
            there += [o.name for o in self.outputs if (self.target / o.name).exists()]
            if there:
                raise ValueError(f"{self.target / there[0]} exists, beside the source; name another target")
        elif self.single_file:
            refuse_target(self.target, overwrite, folder=False)
        else:
            refuse_target(self.folder, overwrite, replaceable=self._names())

    def _names(self) -> set[str]:
        return {output.name for output in self.outputs}

    def execute(self, *, overwrite: bool = False, show_progress: bool = False, sha256: bool = False) -> None:
        """Write everything; the target appears by renaming at the end."""
        self.refuse(overwrite)
        if sha256 and self.among_others and (self.target / MANIFEST).exists():
            raise ValueError(f"{self.target / MANIFEST} is about the source, so sums cannot be noted there")
        with self._progress(show_progress) as progress:
            if self.single_file:
                with new_file(self.target, self.nbytes, overwrite) as path:
                    self.outputs[0].write(path, progress)
                    beside = self.target.with_name(f"{self.target.name}.{MANIFEST}")
                    beside.write_bytes(as_json(self._manifest(path.parent, sha256)))
                return
            replacing = new_folder(self.folder, self.nbytes, overwrite, self._names())
            with files_into(self.target, self.nbytes) if self.among_others else replacing as folder:
                for output in self.outputs:
                    (folder / output.name).parent.mkdir(parents=True, exist_ok=True)
                    output.write(folder / output.name, progress)
                if not (self.among_others and (self.target / MANIFEST).exists()):  # which is about the source
                    (folder / MANIFEST).write_bytes(as_json(self._manifest(folder, sha256)))
                if self.pointer and not self.inside:
                    (folder / self.pointer[0]).write_text(self.pointer[1], encoding="utf-8")
            if self.pointer and self.inside:
                hidden = self.target / f".{self.pointer[0]}.partial"
                hidden.write_text(self.pointer[1], encoding="utf-8")
                hidden.replace(self.target / self.pointer[0])

    @contextmanager
    def _progress(self, show: bool) -> Iterator[Callable[[int], None]]:
        if not show:
            yield lambda _: None
            return
        with Progress(self.nbytes, self.target.name) as progress:
            yield progress

    def _manifest(self, folder: Path, sha256: bool) -> dict[str, Any]:
        return {**self.manifest, "sha256": _sums(folder)} if sha256 else self.manifest

    def __str__(self) -> str:
        """What would be done, for people."""
        longest = max(len(output.name) for output in self.outputs)
        at = self.target if self.single_file else self.folder
        lines = [f"{output.name:<{longest}}  {readable_bytes(output.nbytes)}" for output in self.outputs]
        if not self.single_file:
            lines.append(MANIFEST)
        if self.pointer:
            lines.append(f"{self.pointer[0]}: {self.pointer[1]}")
        source = f"{self.manifest['source']} ({self.manifest['from']})"
        return "\n".join(
            [
                f"from {source}",
                f"to   {at} ({self.manifest['to']})",
                *(f"  {line}" for line in lines),
                f"disk   {readable_bytes(self.nbytes)} and headers, of {readable_bytes(free_space(at))} that are free",
                f"memory {'about 350 MB, most of it torch itself' if self.needs_torch else 'under 100 MB'}",
            ]
        )


def describe(source: str, family: str, config: Mapping[str, Any], from_: str, to: str, **more: Any) -> dict[str, Any]:
    """The manifest: where the files come from, and what reading them back may need to know."""
    return {
        "tool": "mm-convert",
        "version": __version__,
        "source": source,
        "from": from_,
        "to": to,
        "family": family,
        "config": dict(config),
        **{key: value for key, value in more.items() if value},
    }


def as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def copied_file(source: Path) -> Output:
    def write(path: Path, progress: Callable[[int], None]) -> None:
        shutil.copyfile(source, path)
        progress(path.stat().st_size)

    return Output(source.name, source.stat().st_size, write)


def text_file(name: str, content: bytes) -> Output:
    def write(path: Path, progress: Callable[[int], None]) -> None:
        path.write_bytes(content)
        progress(len(content))

    return Output(name, len(content), write)


def safetensors_file(name: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Output:
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Output(name, nbytes, lambda path, progress: write_file(path, tensors, metadata, progress))


def safetensors_files(
    stem: str, shards: list[dict[str, LazyTensor]], metadata: Mapping[str, str], always_index: bool = False
) -> list[Output]:
    """The hub's file names: `stem.safetensors`, or `stem-00001-of-00003.safetensors`, … and an index."""
    if len(shards) == 1 and not always_index:
        return [safetensors_file(f"{stem}.safetensors", shards[0], metadata)]
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    named = dict(zip(names, shards, strict=True))
    outputs = [safetensors_file(name, shard, metadata) for name, shard in named.items()]
    return [*outputs, index_file(f"{stem}.safetensors.index.json", named)]


def index_file(name: str, shards: Mapping[str, Mapping[str, LazyTensor]]) -> Output:
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
    weight_map = {tensor: file for file, shard in shards.items() for tensor in shard}
    return text_file(name, as_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def torch_file(name: str, tensors: Mapping[str, LazyTensor]) -> Output:
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Output(name, nbytes, lambda path, progress: write_torch_file(path, tensors, progress))


def split_shards(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> list[dict[str, LazyTensor]]:
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


def _sums(folder: Path) -> dict[str, dict[str, str]]:
    """sha256 of every tensor in every file, read back from the disk."""
    if (folder / ".metadata").exists():
        return {"dcp": {name: _sha256(tensor) for name, tensor in read_dcp(folder).items()}}
    sums: dict[str, dict[str, str]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        found: dict[str, Any] = {}
        if file.suffix == ".safetensors":
            found = dict(read_file(file)[0])
        elif file.suffix in TORCH_SUFFIXES:
            content = read_torch_file(file)
            models = {k: v for k, v in content.items() if isinstance(v, Mapping)}
            found = {f"{k}:{n}": t for k, v in models.items() for n, t in v.items()} if models else content
        tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, LazyTensor)}
        if tensors:
            sums[str(file.relative_to(folder))] = {name: _sha256(tensor) for name, tensor in tensors.items()}
    return sums


def _sha256(tensor: LazyTensor) -> str:
    digest = hashlib.sha256()
    for chunk in chunks(pieces([tensor])):
        digest.update(chunk)
    return digest.hexdigest()
