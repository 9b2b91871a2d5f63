"""Two experts as one: converted expert by expert into one directory, and inspected. Of models, or of adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mm_convert.families.family import Config, Family
from mm_convert.lora import Adapter
from mm_convert.lora.files import inspect_adapter
from mm_convert.read.checkpoint import Checkpoint, open_checkpoint, read_json
from mm_convert.read.experts import DIFFUSERS, FILE, FOLDERS, INDEX, Pair, experts_json, open_experts
from mm_convert.read.inspection import inspect, preset
from mm_convert.write.folder import new_folder, refuse_target
from mm_convert.write.outputs import Plan, as_json

PlanOne = Callable[[Path, Path], tuple[Checkpoint | Adapter, Plan]]


@dataclass
class PairPlan:
    """What will be written: a plan for each folder of the target, and what lies beside them."""

    target: Path
    experts: dict[str, Plan]
    beside: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(plan.nbytes for plan in self.experts.values())

    def refuse(self, overwrite: bool) -> None:
        """Raises ValueError for a target that is there, or may not be replaced."""
        refuse_target(self.target, overwrite, replaceable=set(self.beside))

    def execute(self, *, overwrite: bool = False, show_progress: bool = False, sha256: bool = False) -> None:
        """Write both experts; the target appears when both are whole."""
        with new_folder(self.target, self.nbytes, overwrite, set(self.beside)) as folder:
            for name, plan in self.experts.items():
                replace(plan, target=folder / name).execute(show_progress=show_progress, sha256=sha256)
            for name, content in self.beside.items():
                (folder / name).write_bytes(content)

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.experts.values()), *(f"{self.target / name}" for name in self.beside)])


def plan_pair(pair: Pair, target: Path, to: str, boundary: float | None, plan_one: PlanOne) -> PairPlan:
    """What converting a pair would write.

    Args:
        to: the form; diffusers has other names for the folders, and the boundary in model_index.json.
        boundary: where the files do not say it; without, that of the published model, if it is one.
        plan_one: opens the expert in one folder, and plans writing it into another.

    Raises ValueError for experts that are not of one kind and architecture, for a boundary that contradicts the files,
    and for a target that is no folder or the source.
    """
    source = pair.high.parent
    if target.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin"):
        raise ValueError(f"{target} is one file, and {source} holds two experts: name a folder, or convert each alone")
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the source; name another target, or convert each expert in place: {pair.high}")
    names = DIFFUSERS if to == "diffusers" else FOLDERS
    high, high_plan = plan_one(pair.high, target / names["high"])
    low, low_plan = plan_one(pair.low, target / names["low"])
    _refuse_unlike(pair, high, low)
    plan = PairPlan(target, {names["high"]: high_plan, names["low"]: low_plan})
    both = {note: None for opened, p in ((high, high_plan), (low, low_plan)) for note in (*opened.notes, *p.notes)}
    plan.notes = list(both)

    if None not in (boundary, pair.boundary) and boundary != pair.boundary:
        raise ValueError(f"{source} says boundary {pair.boundary}, not {boundary}: leave --boundary out")
    known = pair.boundary or boundary
    if known is None and isinstance(high, Checkpoint):
        known, name = published_boundary(high.content.family, high.config)
        if known:
            plan.notes.append(f"the boundary is not said and taken to be {known}, that of the published {name}")
    if known is None:
        plan.notes.append("the boundary is not known, so it is not written: give --boundary")
    if to == "diffusers" and isinstance(high, Checkpoint):
        plan.beside = {INDEX: as_json(_model_index(source, high, known))}
    elif known is not None:
        plan.beside = {FILE: experts_json(known).encode()}
    return plan


def published_boundary(family: Family, config: Config) -> tuple[float | None, str]:
    """Of the published pair whose experts have this configuration, and its name; (None, "") if there is none."""
    names = [name for name in preset(family, config).split(", ") if name in family.boundaries]
    return (family.boundaries[names[0]], names[0]) if names else (None, "")


def inspect_pair(path: Path) -> str | None:
    """What a pair is, for people; None where there is none."""
    pair = open_experts(path)
    if pair is None:
        return None
    said = inspect_adapter(pair.high), inspect_adapter(pair.low)
    boundary = f"{pair.boundary}" if pair.boundary else "not said"
    if not any(said):
        high, low = open_checkpoint(pair.high), open_checkpoint(pair.low)
        _refuse_unlike(pair, high, low)
        published, name = published_boundary(high.content.family, high.config)
        if published and not pair.boundary:
            boundary += f"; {published} in the published {name}"
    elif not all(said):
        raise ValueError(_mixed(pair))
    rows = {"what": f"two experts{', LoRA adapters' * all(said)}", "boundary": boundary}
    head = "\n".join([str(path), *(f"{key:<14} {value}" for key, value in rows.items())])
    return "\n\n".join([head, *(one or str(inspect(folder)) for one, folder in zip(said, pair[:2], strict=True))])


def _refuse_unlike(pair: Pair, high: Checkpoint | Adapter, low: Checkpoint | Adapter) -> None:
    if isinstance(high, Checkpoint) != isinstance(low, Checkpoint):
        raise ValueError(_mixed(pair))
    if isinstance(high, Adapter) or isinstance(low, Adapter):
        return  # one may stand beside other linears than the other
    if high.family != low.family:
        raise ValueError(f"{pair.high} is a checkpoint of {high.family} and {pair.low} of {low.family}: no pair")
    apart = [field for field in high.config if high.config[field] != low.config.get(field)]
    if apart:
        values = ", ".join(f"{field} {high.config[field]} and {low.config.get(field)}" for field in apart)
        raise ValueError(f"{pair.high} and {pair.low} are no pair: they have {values}")


def _mixed(pair: Pair) -> str:
    return f"of {pair.high} and {pair.low}, one is a whole model and the other a LoRA adapter: no pair"


def _model_index(source: Path, expert: Checkpoint, boundary: float | None) -> dict[str, Any]:
    """That of the source, or what diffusers has to know of a pair; the boundary in it."""
    said = read_json(source / INDEX) if (source / INDEX).is_file() else {}
    made = expert.content.family.write_config["diffusers"](expert.config)["_class_name"]
    image = expert.config["in_channels"] != expert.config["out_channels"]
    pipeline = {"vace": "WanVACEPipeline", "wan": "WanImageToVideoPipeline" if image else "WanPipeline"}
    experts = {name: ["diffusers", made] for name in DIFFUSERS.values()}
    index = {"_class_name": pipeline[expert.family], **experts}
    return index | said | ({} if boundary is None else {"boundary_ratio": boundary})
