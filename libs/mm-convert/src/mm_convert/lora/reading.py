"""Reading an adapter, whatever its layout and format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_convert.files import read_json, read_toml
from mm_convert.lora.adapter import Adapter, LowRank
from mm_convert.lora.base import read_base
from mm_convert.lora.names import FILES, Names, is_lora, join_first, read_names
from mm_convert.lora.strength import find_alphas
from mm_convert.read.experts import FOLDERS, HALF
from mm_convert.read.source import Source, find
from mm_convert.store.mm import MANIFEST, name_of
from mm_convert.store.safetensors import read_file
from mm_convert.tensors.mapping import Tensors
from mm_convert.tensors.rules import Row, Sizes
from mm_convert.tensors.views import LazyTensor


def open_lora(
    path: str | Path, *, alpha: float | None = None, rank: int | None = None, family: str = "", expert: str = ""
) -> Adapter:
    """The low-rank adapter at a path, lazily; a mapping of our names (`….lora_A.weight`) to tensors.

    Args:
        path: a folder or a file of peft, diffusers, ComfyUI, kohya or DiffSynth, ours, a tree of MindSpeed-MM, or a
            checkpoint of a training run.
        alpha: where the files do not say it and no loader takes it for the rank. Compared with them where they do.
        rank: compared with the factors.
        family: the one to take where the names fit several alike: Wan is a part of VACE.
        expert: "high" or "low", of two experts that for which it is wanted: of a folder with a file for each, by their
            names, that one is read.

    Raises ValueError, naming up to five modules, for what is no adapter, is not plain LoRA, belongs to no known family,
    is not whole, is for the other expert, or says two things of its rank or alpha.
    """
    halves = find_halves(Path(path)) if expert else {}
    path = halves.get(expert, path)
    adapter = find_lora(path, alpha=alpha, rank=rank, family=family)
    if adapter is None:
        raise ValueError(f"{path} holds no LoRA adapter: no tensor in it has the name of a factor (….lora_A.weight)")
    if expert == "high" and adapter.expert == "low":
        raise ValueError(
            f"{path} is for the expert for low noise, as its names say, and not for that for high noise: name the "
            f"folder of the expert that it is for; or put it into {FOLDERS['low']}/, and that for high noise into "
            f"{FOLDERS['high']}/ beside it"
        )
    return adapter


def find_lora(
    path: str | Path, *, alpha: float | None = None, rank: int | None = None, family: str = ""
) -> Adapter | None:
    """The adapter at a path, in whatever layout and format; None where a whole model is. Errors as `read_lora`."""
    source = find_source(Path(path))
    if not is_lora(source.tensors):
        return None
    beside = source.folder / "adapter_config.json"
    # Of a file under another name, the config beside it may be somebody else's.
    known = beside.exists() and source.files[0].stem == Path(FILES["peft"]).stem
    metadata = source.metadata | _said_beside(source)
    config = read_json(beside) if known else None
    training = source.layout == "dcp" or source.is_part
    return read_lora(source.tensors, metadata, config, str(path), alpha, rank, guess=not training, family=family)


def find_source(path: Path) -> Source:
    """As `find`; two files of adapters in a folder, for high and for low noise, are refused in words of their own."""
    if halves := find_halves(path):
        high, low = halves["high"], halves["low"]
        raise ValueError(
            f"{path} holds two adapters, by their names {high.name} for high noise and {low.name} for low noise: "
            f"name one of them ({high}); or put them into {path / FOLDERS['high']} and {path / FOLDERS['low']}, "
            f"and name {path} for both"
        )
    return find(path)


def find_halves(path: Path) -> dict[str, Path]:
    """The files of two adapters in a folder, by "high" and "low" in their names; empty where it holds anything else."""
    files = [] if not path.is_dir() or any(path.glob("*.index.json")) else sorted(path.glob("*.safetensors"))
    if len(files) != 2:
        return {}
    halves = {match[1].lower(): file for file in files for match in HALF.finditer(file.stem)}
    alike = set(halves) == {"high", "low"} and all(is_lora(read_file(file)[0]) for file in halves.values())
    return halves if alike else {}


def _said_beside(source: Source) -> dict[str, str]:
    """Rank, alpha and base, which MindSpeed-MM's tree has no place for, nor the tensors of a run of mm_train."""
    settings = source.folder / "config.toml"
    if source.layout == "dcp" and settings.is_file():
        said = read_toml(settings)
        lora = said["lora"] if isinstance(said.get("lora"), dict) else {}
        numbers = {name: str(lora[name]) for name in ("rank", "alpha") if name in lora}
        return numbers | {"base": name_of(Path(str(said.get("weights", ""))))}
    for folder in (source.folder, source.folder.parent) if source.layout == "mindspeed" else ():
        if (folder / MANIFEST).exists():
            return dict(read_json(folder / MANIFEST).get("metadata", {}))
    return {}


def read_lora(
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    adapter_config: Mapping[str, Any] | None,
    where: str,
    alpha: float | None = None,
    rank: int | None = None,
    *,
    guess: bool = True,
    family: str = "",
) -> Adapter:
    """Recognise an adapter, in whatever format.

    Args:
        tensors: by their names in the file.
        metadata: the free text of its header.
        adapter_config: of peft, if it lies beside the file.
        where: the file, for messages.
        alpha: needed where the file does not say it and no loader takes it for the rank: for MindSpeed-MM's.
        rank: only compared with the factors.
        family: as in `open_lora`.
        guess: whether alpha may be taken to be the rank, where all loaders of the format do so.

    Raises ValueError, naming up to five modules, when this is not plain LoRA, belongs to no known family, is not whole,
    does not fit together, or says two things of its rank or alpha.
    """
    names = read_names(tensors, where, family)
    factors = {module: (tensors[parts["A"]], tensors[parts["B"]]) for module, parts in names.parts.items()}
    _check_shapes(names, tensors, factors, where)
    alphas, notes = find_alphas(names, tensors, metadata, adapter_config, where, rank, alpha, guess)
    config = adapter_config or {}
    base = metadata.get("base") or config.get("base_model_name_or_path") or ""
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"the adapter_config.json of {where} says lora_dropout {dropout!r:.60}; it must be 0 <= x < 1")
    modules = {names.modules[m][0]: LowRank(a, b, alphas[m]) for m, (a, b) in factors.items()}
    whole = Tensors({ours: tensors[name] for name, (ours, _) in names.differences.items()})
    said = (str(base), float(dropout), tuple(notes), names.expert)
    return Adapter(names.family, names.format, names.dialect, modules, *said, whole, read_base(metadata, where))


def _check_shapes(
    names: Names,
    tensors: Mapping[str, LazyTensor],
    factors: Mapping[str, tuple[LazyTensor, LazyTensor]],
    where: str,
) -> None:
    problems, sizes = [], Sizes()
    for module, (a, b) in factors.items():
        shapes = f"{module} has A {list(a.shape)} and B {list(b.shape)}"
        if len(a.shape) < 2 or len(b.shape) != len(a.shape) or any(side != 1 for side in b.shape[2:]):
            problems.append(f"{shapes}; expected are [rank, in] and [out, rank]")
        elif a.shape[0] != b.shape[1] or not a.shape[0]:
            problems.append(f"{shapes}, of rank {a.shape[0]} and {b.shape[1]}")
        elif problem := sizes.solve(module, _as_solvable(names.modules[module][1]), (b.shape[0], *a.shape[1:])):
            problems.append(problem)
    for name, (_, row) in names.differences.items():
        if problem := sizes.solve(name, _as_solvable(row), tensors[name].shape):
            problems.append(problem)
    if problems:
        raise ValueError(f"{where} does not fit together: {join_first(problems)}")


def _as_solvable(row: Row) -> Row:
    """A row where a product of several sizes counts as one: an adapter has too few tensors to tell them apart."""

    def has_several(side: str) -> bool:
        return sum(not factor.isdecimal() for factor in side.split("*")) > 1

    sides = [side.replace("*", "·") if has_several(side) else side for side in row.shape.split()]
    return Row(row.names, " ".join(sides), row.group)
