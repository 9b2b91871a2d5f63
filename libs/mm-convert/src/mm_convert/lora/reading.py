"""Reading an adapter, whatever its layout and format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_convert.files import read_json
from mm_convert.lora.adapter import Adapter, LowRank
from mm_convert.lora.names import FILES, Names, is_lora, join_first, read_names
from mm_convert.lora.strength import find_alphas
from mm_convert.read.source import Source, find
from mm_convert.store.mm import MANIFEST
from mm_convert.tensors.rules import Row, Sizes
from mm_convert.tensors.views import LazyTensor


def open_lora(path: str | Path, *, alpha: float | None = None, rank: int | None = None) -> Adapter:
    """The low-rank adapter at a path, lazily; a mapping of our names (`….lora_A.weight`) to tensors.

    Args:
        path: a folder or a file of peft, diffusers, ComfyUI, kohya or DiffSynth, ours, a tree of MindSpeed-MM, or a
            checkpoint of a training run.
        alpha: where the files do not say it and no loader takes it for the rank. Compared with them where they do.
        rank: compared with the factors.

    Raises ValueError, naming up to five modules, for what is no adapter, is not plain LoRA, belongs to no known family,
    is not whole, or says two things of its rank or alpha.
    """
    adapter = find_lora(path, alpha=alpha, rank=rank)
    if adapter is None:
        raise ValueError(f"{path} holds no LoRA adapter, but a whole model")
    return adapter


def find_lora(path: str | Path, *, alpha: float | None = None, rank: int | None = None) -> Adapter | None:
    """The adapter at a path, in whatever layout and format; None where a whole model is. Errors as `read_lora`."""
    source = find(Path(path))
    if not is_lora(source.tensors):
        return None
    if source.layout == "dcp" and alpha is None:
        raise ValueError(f"{path} is a training checkpoint, which does not say alpha: give --lora_alpha, or export it")
    beside = source.folder / "adapter_config.json"
    # Of a file under another name, the config beside it may be somebody else's.
    known = beside.exists() and source.files[0].name == FILES["peft"]
    metadata = source.metadata | _manifest_metadata(source)
    return read_lora(source.tensors, metadata, read_json(beside) if known else None, str(path), alpha, rank)


def _manifest_metadata(source: Source) -> dict[str, str]:
    """Rank and alpha, which MindSpeed-MM's tree has no place for."""
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
) -> Adapter:
    """Recognise an adapter, in whatever format.

    Args:
        tensors: by their names in the file.
        metadata: the free text of its header.
        adapter_config: of peft, if it lies beside the file.
        where: the file, for messages.
        alpha: needed where the file does not say it and no loader takes it for the rank: for MindSpeed-MM's.
        rank: only compared with the factors.

    Raises ValueError, naming up to five modules, when this is not plain LoRA, belongs to no known family, is not whole,
    does not fit together, or says two things of its rank or alpha.
    """
    names = read_names(tensors, where)
    factors = {module: (tensors[parts["A"]], tensors[parts["B"]]) for module, parts in names.parts.items()}
    _check_shapes(names, factors, where)
    alphas, notes = find_alphas(names, tensors, metadata, adapter_config, where, rank, alpha)
    config = adapter_config or {}
    base = metadata.get("base") or config.get("base_model_name_or_path") or ""
    dropout = config.get("lora_dropout") or 0.0
    modules = {names.modules[m][0]: LowRank(a, b, alphas[m]) for m, (a, b) in factors.items()}
    return Adapter(names.family, names.format, names.dialect, modules, str(base), float(dropout), tuple(notes))


def _check_shapes(names: Names, factors: Mapping[str, tuple[LazyTensor, LazyTensor]], where: str) -> None:
    problems, sizes = [], Sizes()
    for module, (a, b) in factors.items():
        shapes = f"{module} has A {list(a.shape)} and B {list(b.shape)}"
        if len(a.shape) < 2 or len(b.shape) != len(a.shape) or any(side != 1 for side in b.shape[2:]):
            problems.append(f"{shapes}; expected are [rank, in] and [out, rank]")
        elif a.shape[0] != b.shape[1] or not a.shape[0]:
            problems.append(f"{shapes}, of rank {a.shape[0]} and {b.shape[1]}")
        elif problem := sizes.solve(module, _as_solvable(names.modules[module][1]), (b.shape[0], *a.shape[1:])):
            problems.append(problem)
    if problems:
        raise ValueError(f"{where} does not fit together: {join_first(problems)}")


def _as_solvable(row: Row) -> Row:
    """A row where a product of several sizes counts as one: an adapter has too few tensors to tell them apart."""

    def has_several(side: str) -> bool:
        return sum(not factor.isdecimal() for factor in side.split("*")) > 1

    sides = [side.replace("*", "·") if has_several(side) else side for side in row.shape.split()]
    return Row(row.names, " ".join(sides), row.group)
