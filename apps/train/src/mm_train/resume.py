"""Whether a command continues the run that its output directory holds; read without torch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from mm_convert import read_json, read_text, read_toml
from mm_convert.cli.arguments import dump
from mm_train.config import Config

# Settings that are part of what a checkpoint means: with another value the rest of the run would be another run.
FIXED = (
    "model",
    "expert",
    "expert_steps",
    "architecture",
    "trained",
    "seed",
    "data.global_batch",
    "data.small_buckets",
    "data.too_long",
    "data.chat",
    "optim.name",
    "objective.task",
    "objective.average",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "lora.weights",
)

_PROGRESS = {"step": int, "cursor": int, "skipped": int, "dataset": str, "contents": dict}


def latest(directory: Path) -> Path | None:
    """The checkpoint that `directory`/latest names, or None. Raises FileNotFoundError if it names one that is gone."""
    tracker = directory / "latest"
    if not tracker.exists():
        return None
    name = read_text(tracker, limit=4096).strip()
    path = directory / name
    if name != path.name or name in ("", ".."):
        raise ValueError(f"{tracker} names {name!r:.60}, which is no checkpoint beside it: write step-… into it")
    if not (path / "progress.json").is_file():
        there = ", ".join(p.name for p in sorted(directory.glob("step-*"))) or "none"
        raise FileNotFoundError(
            f"{tracker} names {path.name}, which is not there or not complete; checkpoints there: {there}. To continue "
            f"from one of them, write its name into {tracker}; to start anew, choose another --output"
        )
    return path


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
    saved, now = flat(read_toml(found / "config.toml")), flat(tomllib.loads(dump(config)))
    changed = {key: (saved.get(key), now.get(key)) for key in saved | now if saved.get(key) != now.get(key)}
    # What is trained means nothing without the rest that it was trained beside.
    fixed = (*FIXED, "weights") if config.has_frozen else FIXED
    for key, (old, new) in changed.items():
        average_appears_or_goes = key == "optim.ema" and not (old and new)
        if average_appears_or_goes or any(key == f or key.startswith(f"{f}.") for f in fixed):
            raise ValueError(
                f"{found} was made with {key} {old}, this command says {new}: that would not be the same run. Give the "
                "old value to continue, or a new --output to start a run of its own"
            )
    step = read_progress(found)["step"]
    if step > config.steps:
        raise ValueError(f"{found} is past --steps {config.steps}: give more than {step} steps, or a new --output")
    return found, [f"{key} {old} -> {new}" for key, (old, new) in changed.items()]


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Where a run was, see `mm_train.run.Progress`. Raises ValueError for what no run has written."""
    path = checkpoint / "progress.json"
    said = read_json(path)
    if missing := [name for name in ("step", "cursor", "dataset") if name not in said]:
        raise ValueError(f"{path} does not say {', '.join(missing)}: it is not that of a run")
    for name, value in said.items():
        kind = _PROGRESS.get(name)
        fits = kind and type(value) is kind and (kind is not int or value >= 0)
        if not fits or (kind is dict and not all(_is_texts(those) for those in value.values())):
            raise ValueError(f"{path} says {name} {value!r:.60}: it is not that of a run")
    return said


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows = {}
    for key, value in table.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows
