"""The files that a conversion will write, all of them known before the first byte."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_convert.__about__ import __version__
from mm_convert.files import open_file
from mm_convert.store.dcp import read_dcp
from mm_convert.store.mm import MANIFEST, as_json, name_of
from mm_convert.store.safetensors import read_file, write_file
from mm_convert.store.torch_file import SUFFIXES as TORCH_SUFFIXES
from mm_convert.store.torch_file import read_torch_file, write_torch_file
from mm_convert.tensors.views import LazyTensor, chunks, pieces
from mm_convert.write.destinations import Destination, Folder, claim, free_space
from mm_convert.write.progress import Progress, readable_bytes

Writer = Callable[[Path, Callable[[int], None]], None]


@dataclass(frozen=True)
class Output:
    """One file: its path in the target, its bytes (of tensors), what writes it, and its text where that is short."""

    name: str
    nbytes: int
    write: Writer
    text: str = ""


@dataclass
class Files:
    """All files of a target, known before the first byte is written, so that they can be shown and refused.

    Attributes:
        destination: where they go.
        outputs: the files, in the order in which they are written.
        manifests: folder of the target ("" is the target itself) -> where the files in it come from (see `describe`).
        needs_torch: whether writing them loads torch.
        decodes: whether quantised weights are made numbers of, with numpy.
        notes: what a person should know: what is left out, what is taken for granted.
    """

    destination: Destination
    outputs: list[Output]
    manifests: dict[str, dict[str, Any]]
    needs_torch: bool = False
    decodes: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def names(self) -> set[str]:
        return {output.name for output in self.outputs}

    def refuse(self, overwrite: bool) -> None:
        """Raises ValueError for a target that is there, or may not be replaced."""
        self.destination.refuse(overwrite, self.names)

    def write(self, *, overwrite: bool = False, show_progress: bool = False, sha256: bool = False) -> None:
        """Write everything; the target appears by renaming at the end."""
        with claim(self.destination, self.nbytes) as ours:
            self.destination.refuse(overwrite, self.names, ours)
            manifest = self.destination.manifest(ours)
            if sha256 and manifest is None:
                there = self.destination.path / MANIFEST
                raise ValueError(f"{there} is about the source, so sums cannot be noted there")
            names = self.names | ({manifest} if manifest else set())
            with self._progress(show_progress) as progress, self.destination.write(names) as folder:
                for output in self.outputs:
                    (folder / output.name).parent.mkdir(parents=True, exist_ok=True)
                    output.write(folder / output.name, progress)
                for inside, content in self.manifests.items() if manifest else ():
                    sums = {"sha256": _sums(folder / inside)} if sha256 else {}
                    (folder / inside / manifest).write_bytes(as_json({**_without_paths(content), **sums}))
                self.destination.refuse(overwrite, self.names, ours)  # what appeared meanwhile stays

    @contextmanager
    def _progress(self, show: bool) -> Iterator[Callable[[int], None]]:
        if not show:
            yield lambda _: None
            return
        with Progress(self.nbytes, self.destination.path.name) as progress:
            yield progress

    def __str__(self) -> str:
        """What would be done, for people."""
        at, lines, left = self.destination.path, [], self.outputs
        for inside, manifest in self.manifests.items():
            own = [output for output in left if output.name.startswith(inside)]
            left = [output for output in left if output not in own]
            lines += [f"from {manifest['source']} ({manifest['from']})", f"to   {at / inside} ({manifest['to']})"]
            lines += [f"  {line}" for line in _list_files(own, inside)]
            if self.destination.manifest() == MANIFEST:
                lines.append(f"  {MANIFEST}")
        lines += [f"  {at / output.name}" for output in left]
        if isinstance(self.destination, Folder) and self.destination.pointer:
            file, text = self.destination.pointer
            lines.append(f"  {file.name}: {text}")
        lines.append(
            f"disk   {readable_bytes(self.nbytes)} and headers, of {readable_bytes(free_space(at))} that are free"
        )
        without = "under 180 MB" if self.decodes else "under 100 MB"
        lines.append(f"memory {'about 350 MB, most of it torch itself' if self.needs_torch else without}")
        return "\n".join(lines)


def _list_files(outputs: list[Output], inside: str) -> list[str]:
    """A line for each, with its name in the folder `inside`."""
    names = [output.name.removeprefix(inside) for output in outputs]
    longest = max(map(len, names))
    return [
        f"{name}: {output.text}" if output.text else f"{name:<{longest}}  {readable_bytes(output.nbytes)}"
        for name, output in zip(names, outputs, strict=True)
    ]


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


def _without_paths(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What others may read: no way to a file of this machine."""
    merged = [{**one, "source": name_of(one["source"])} for one in manifest.get("merged", ())]
    return {**manifest, "source": name_of(manifest["source"])} | ({"merged": merged} if merged else {})


def copy_file(source: Path) -> Output:
    """A file as it is, under its own name."""

    def write(path: Path, progress: Callable[[int], None]) -> None:
        with open_file(source) as file, path.open("xb") as copy:
            shutil.copyfileobj(file, copy, 2**20)
        progress(path.stat().st_size)

    return Output(source.name, source.stat().st_size, write)


def text_file(name: str, content: bytes, text: str = "") -> Output:
    """A file of these bytes; `text` is what is said of it, if not its size."""

    def write(path: Path, progress: Callable[[int], None]) -> None:
        path.write_bytes(content)
        progress(len(content))

    return Output(name, len(content), write, text)


def safetensors_file(name: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Output:
    """One safetensors file; `metadata` is the free text of its header."""
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
    """The index of the hub: which tensor is in which file."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
    weight_map = {tensor: file for file, shard in shards.items() for tensor in shard}
    return text_file(name, as_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def torch_file(name: str, tensors: Mapping[str, LazyTensor]) -> Output:
    """One file that torch.load reads."""
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
