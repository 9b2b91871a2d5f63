"""What happens before the first step: the run directory, the model with its weights, and checks that need both."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mm_convert.arguments import dump
from mm_models import build, plan
from mm_models.diffusion.flow import POINTS
from mm_models.layers import cast_weights
from mm_models.lora import LoRAConfig, add_lora
from mm_parallel import Pipeline, load_parameters, parallelize
from mm_parallel.mesh import describe, rank_in, size
from mm_parallel.weights import allocate
from mm_train.checkpoint import latest
from mm_train.config import Config
from mm_train.data import TrainingData
from mm_train.objective import Objective, expert_boundary
from mm_train.ranks import gathered
from mm_train.start import Start, freeze

# Settings that are part of what a checkpoint means: with another value the rest of the run would be another run.
FIXED = (
    "model",
    "expert",
    "architecture",
    "trained",
    "seed",
    "data.global_batch",
    "objective.task",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
)


def find_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """(The checkpoint that this run continues, what was changed since). ValueError where it would be another run."""
    found = latest(config.run_dir / "checkpoints")
    if found is None:
        return None, []
    if config.checkpoint.resume == "never":
        raise ValueError(
            f"{config.run_dir} holds a run ({found.name}) and --checkpoint.resume is never: choose another "
            "--output, or delete it"
        )
    saved, now = _flat(tomllib.loads((found / "config.toml").read_text())), _flat(tomllib.loads(dump(config)))
    changed = {key: (saved.get(key), now.get(key)) for key in saved | now if saved.get(key) != now.get(key)}
    # What is trained means nothing without the rest that it was trained beside.
    fixed = (*FIXED, "weights") if has_frozen(config) else FIXED
    for key, (old, new) in changed.items():
        average_appears_or_goes = key == "optim.ema" and not (old and new)
        if average_appears_or_goes or any(key == f or key.startswith(f"{f}.") for f in fixed):
            raise ValueError(
                f"{found} was made with {key} {old}, this command says {new}: that would not be the same run. Give the "
                "old value to continue, or a new --output to start a run of its own"
            )
    step = json.loads((found / "progress.json").read_text())["step"]
    if step > config.steps:
        raise ValueError(f"{found} is past --steps {config.steps}: give more than {step} steps, or a new --output")
    return found, [f"{key} {old} -> {new}" for key, (old, new) in changed.items()]


def check_output(config: Config) -> None:
    """Raise ValueError where the output holds what this run would overwrite or mix with: one model where there are two
    experts, experts beside one model, or an expert that was trained up to another boundary.
    """
    made = config.artifact
    pair = [p for p in (made / "experts.json", config.output / "high", config.output / "low") if p.exists()]
    one = [
        p for p in (config.output / "metrics.jsonl", made / "config.json", made / "adapter_config.json") if p.exists()
    ]
    if other := one if config.expert else pair:
        kinds = ("one model", "an expert of two") if config.expert else ("two experts", "one model")
        raise ValueError(f"{other[0]} belongs to {kinds[0]}, and this run trains {kinds[1]}: choose another --output")
    if not config.expert or not (made / "experts.json").exists():
        return
    said, wanted = json.loads((made / "experts.json").read_text()).get("boundary"), expert_boundary(config)
    if said != wanted:
        raise ValueError(
            f"{made} holds experts that part at noise level {said}; this run would part at {wanted}. Give "
            f"--objective.boundary {said}, or another --output"
        )


def has_frozen(config: Config) -> bool:
    """Whether a run trains only a part of its model, so that its checkpoints hold only that."""
    return bool(config.lora.rank) or config.trained != ("*",)


class Built(NamedTuple):
    """A model that is cut over the ranks."""

    model: nn.Module  # holds this rank's parameters
    run: nn.Module | Pipeline  # is called: the model, or the pipeline that it is a part of
    parameters: int  # of the whole model
    trained: int
    begins: str = ""  # what a person should know of the values it begins with


def build_model(config: Config, mesh: DeviceMesh | None, device: torch.device, continuing: bool) -> Built:
    """The model of a run.

    It is cut over the mesh and filled tensor by tensor; no rank ever holds all of it. Continuing, it is left empty, for
    the checkpoint to fill; but the base below an adapter is read again.
    """
    dtype = getattr(torch, config.dtype)
    model = build(config.model, device="meta", **config.architecture)
    model.compute_dtype = dtype
    if config.lora.rank:
        cast_weights(model, dtype)  # a frozen base needs no float32 masters
        add_lora(model, LoRAConfig(config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets))
    elif has_frozen(config):
        freeze(model, config.trained, dtype)
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) for frozen in (True, False)]
    check_space(sizes[1], config)
    source = None if continuing and not has_frozen(config) else Start(model, config.weights, config.expert, config.seed)
    if source is not None:
        source.check_open(model)
    named = {name for name, p in model.named_parameters() if p.requires_grad}
    cut = (plan(model), mesh, config.parallel, config.memory, dtype)
    pipelined = size(mesh, "pp") > 1
    run = Pipeline(model, *cut) if pipelined else parallelize(model, *cut)
    idle = gathered([] if named & {name for name, _ in model.named_parameters()} else [rank_in(mesh, "pp")])
    if idle:
        raise ValueError(
            f"pipeline stages {sorted(set(idle))} would hold nothing that is trained: "
            "choose other --parallel.pp_layers, or train something in every stage (--lora.targets, --trained)"
        )
    if source is None:
        allocate(model, device, config.memory.offload_params)
        return Built(model.train(), run, *sizes)
    elsewhere = run.elsewhere if pipelined else ()
    load_parameters(model, source, device, elsewhere, config.memory.offload_params)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not torch.isfinite(local).all():
            raise ValueError(f"--weights {config.weights}: {name} holds numbers that are not finite")
    ladder = " (a plain Wan: its control ladder begins as a copy that changes nothing)" if source.made else ""
    return Built(model.train(), run, *sizes, ladder)


def _levels(goal: Objective) -> str:
    """Which noise is trained on, in words."""
    first, end = goal.flow.index_range
    low = goal.flow.sigmas[end].item() if end < POINTS else 0.0
    return (
        f"noise from {goal.flow.sigmas[first].item():.3f} down to {low:.3f} (points {first} to {end - 1} of {POINTS})"
    )


def check_space(trained: int, config: Config) -> None:
    """Raise ValueError if not even one checkpoint fits on the disk of the output directory."""
    needed = trained * (16 if config.optim.ema else 12)  # float32: weights, two moments, and the average
    free = shutil.disk_usage(config.run_dir).free
    if needed > free:
        raise ValueError(
            f"a checkpoint needs {needed / 2**20:,.0f} MiB and {config.output} has {free / 2**20:,.0f} MiB free: "
            "free some, or choose another --output"
        )


def seed_dropout(*place: int) -> None:
    """Seeds the only ambient draw there is, the adapters' dropout, by (seed, step, ranks of data and context,
    micro-batch).
    """
    torch.manual_seed(int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=7).digest(), "big"))


def summary(
    config: Config,
    goal: Objective,
    built: Built,
    data: TrainingData,
    mesh: DeviceMesh | None,
    data_size: int,
    micro_batches: int,
    found: Path | None,
    changed: list[str],
) -> str:
    """What is about to happen, in a few lines."""
    lines = [
        f"model      {config.model}: {built.parameters:,} parameters, {built.trained:,} trained, "
        f"matrices in {config.dtype}",
        f"task       {goal.task}{f', expert {config.expert}' if config.expert else ''}, {_levels(goal)}",
        f"weights    {f'{found} (continuing)' if found else config.weights}{built.begins}",
        *(f"changed    {change}" for change in changed),
        f"data       {len(data.ids):,} samples in {len(set(data.shapes))} shapes, {data.name}",
        f"ranks      {describe(mesh)}",
        f"step       {config.data.global_batch} samples = {data_size} x {micro_batches} micro-batches of "
        f"{config.data.micro_batch}",
    ]
    return "\n".join(lines)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows = {}
    for key, value in table.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows
