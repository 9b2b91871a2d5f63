"""What a checkpoint is, from its headers alone, and how two of them differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mm_convert.families.presets import name_preset, published_boundary
from mm_convert.lora.names import is_lora
from mm_convert.lora.reading import find_source, open_lora
from mm_convert.read.alike import mixed, refuse_unlike
from mm_convert.read.checkpoint import Checkpoint, open_checkpoint
from mm_convert.read.content import fingerprint
from mm_convert.read.experts import open_experts
from mm_convert.tensors.views import LazyTensor


@dataclass(frozen=True)
class Inspection:
    """`str()` of it is for people."""

    path: Path
    family: str
    preset: str  # the published model that it is, or the nearest one with the differences
    dialect: str
    layout: str
    split: Mapping[str, Any]  # ranks and layers per stage of a MindSpeed-MM tree
    files: int
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]  # tensors of each
    fingerprint: str  # md5 of our names and shapes
    config: Mapping[str, Any]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        split = {"split": ", ".join(f"{key} {value}" for key, value in self.split.items())} if self.split else {}
        rows = {
            "family": self.family,
            "preset": self.preset,
            "names": self.dialect,
            "layout": f"{self.layout}, {self.files} file{'s' * (self.files != 1)}",
            **split,
            "tensors": f"{self.tensors:,}",
            "parameters": f"{self.parameters:,}",
            "bytes": f"{self.nbytes:,}",
            "dtype": ", ".join(f"{dtype} ({count})" for dtype, count in self.dtypes.items()),
            "fingerprint": self.fingerprint,
            **self.config,
        }
        lines = [f"{key:<14} {value}" for key, value in rows.items()] + [f"note: {note}" for note in self.notes]
        return "\n".join([str(self.path), *lines])


def inspect(path: str | Path) -> Inspection:
    """Say what a checkpoint is; reads headers only. Errors as `open_checkpoint`."""
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    return Inspection(
        path=checkpoint.path,
        family=checkpoint.family,
        preset=name_preset(checkpoint.content.family, checkpoint.content.config | checkpoint.config),
        dialect=checkpoint.dialect,
        layout=checkpoint.layout,
        split=checkpoint.split,
        files=len(checkpoint.files),
        tensors=len(tensors),
        parameters=sum(prod(t.shape) for t in tensors.values()),
        nbytes=sum(t.nbytes for t in tensors.values()),
        dtypes=dict(Counter(t.dtype for t in tensors.values()).most_common()),
        fingerprint=fingerprint({name: t.shape for name, t in tensors.items()}),
        config=checkpoint.config,
        notes=tuple(checkpoint.notes),
    )


def inspect_adapter(path: str | Path) -> str | None:
    """What an adapter is, for people; None where a whole model is. Errors as `open_lora`."""
    source = find_source(Path(path))
    if not is_lora(source.tensors):
        return None
    adapter = open_lora(path)
    whole = adapter.differences
    strengths = {(module.rank, module.alpha) for module in adapter.modules.values()}
    rows = {
        "what": "LoRA adapter",
        "family": adapter.family.name,
        "format": f"{adapter.format}, {adapter.dialect} names",
        "layout": source.layout,
        "modules": f"{len(adapter.modules)}",
        "rank, alpha": "; ".join(f"{rank}, {alpha:g}" for rank, alpha in sorted(strengths)),
        "differences": f"{len(whole)} parameters are changed whole" if whole else "",
        "parameters": f"{sum(map(prod, map(adapter.shape, adapter))) + sum(map(prod, map(whole.shape, whole))):,}",
        "base": adapter.base or "not said",
        "trained on": ", ".join(f"{name} {value}" for name, value in adapter.trained_on.items()),
    }
    lines = [f"{key:<14} {value}" for key, value in rows.items() if value]
    return "\n".join([str(path), *lines, *(f"note: {note}" for note in adapter.notes)])


def inspect_pair(path: Path) -> str | None:
    """What a pair is, for people; None where there is none."""
    pair = open_experts(path)
    if pair is None:
        return None
    said = inspect_adapter(pair.high), inspect_adapter(pair.low)
    boundary = f"{pair.boundary}" if pair.boundary else "not said"
    if not any(said):
        high, low = open_checkpoint(pair.high), open_checkpoint(pair.low)
        refuse_unlike(pair, high, low)
        published, name = published_boundary(high.content.family, high.config)
        if published and not pair.boundary:
            boundary += f"; {published} in the published {name}"
    elif not all(said):
        raise ValueError(mixed(pair))
    rows = {"what": f"two experts{', LoRA adapters' * all(said)}", "boundary": boundary}
    head = "\n".join([str(path), *(f"{key:<14} {value}" for key, value in rows.items())])
    return "\n\n".join([head, *(one or str(inspect(folder)) for one, folder in zip(said, pair[:2], strict=True))])


# --- differences


@dataclass(frozen=True)
class Difference:
    """What sets one tensor of two checkpoints apart. `name` is ours."""

    name: str
    what: str
    largest: float | None = None


def diff(a: str | Path, b: str | Path) -> Iterator[Difference | None]:
    """How two checkpoints of any form differ, tensor by tensor under our names; None for one that is the same.

    Equal bytes are compared without torch; the largest difference of values needs it.
    """
    first, second = open_checkpoint(a), open_checkpoint(b)
    for name in [*first, *(name for name in second if name not in first)]:
        yield _compare(name, first, second)


def _compare(name: str, first: Checkpoint, second: Checkpoint) -> Difference | None:
    if name not in first or name not in second:
        only = first if name in first else second
        return Difference(name, f"only in {only.path}: {only.dtype(name)} {list(only.shape(name))}")
    a, b = first.tensors[name], second.tensors[name]
    if a.shape != b.shape:
        return Difference(name, f"shape {list(a.shape)} and {list(b.shape)}")
    dtypes = "" if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}, "
    largest = _largest(a, b)
    if largest != 0 or dtypes:
        how = "by how much needs torch" if largest is None else f"largest difference {largest:.3g}"
        return Difference(name, f"{dtypes}{how}", largest)
    return None


def _largest(a: LazyTensor, b: LazyTensor) -> float | None:
    """The largest absolute difference; 0 where the bytes are the same, NaN where only one has a NaN; None unknown."""
    step = max(1, 2**22 // max(1, a.row_bytes))
    largest = 0.0
    for top in range(0, a.height, step):
        rows = top, min(top + step, a.height)
        if a.dtype == b.dtype and a.read(*rows) == b.read(*rows):
            continue
        try:
            from mm_convert.tensors.torch import rows_of
        except ImportError:
            return None  # it differs; how much, only torch could say
        x, y = rows_of(a, *rows).double(), rows_of(b, *rows).double()
        apart = (x - y).abs()
        apart[(x == y) | (x.isnan() & y.isnan())] = 0  # infinities of one sign, and NaN on both sides
        largest = max(largest, float("nan") if apart.isnan().any() else float(apart.max()), key=_nan_first)
    return largest


def _nan_first(value: float) -> tuple[bool, float]:
    return value != value, value
