"""What a run trains its model to do: the family's objective for the model, task and expert that were asked for."""

from __future__ import annotations

from typing import Any

from mm_convert.cli.values import check_fields
from mm_models.families import find, override
from mm_models.family import Family
from mm_models.objective import Objective
from mm_train.config import Config


def architecture(config: Config) -> tuple[Family, Any]:
    """The family of a run's model, and its configuration. ValueError for an unknown name or field, or a wrong value."""
    family, preset = find(config.model)
    fields = check_fields(family.config, config.architecture, "--architecture: ")
    return family, override(config.model, preset.config, fields)


def choose_task(model: str, family: Family, shape: Any, asked: str, flag: str) -> str:
    """The task asked for, or for "auto" the usual one. ValueError for one that the model is not trained for."""
    can = [task.name for task in family.tasks(shape) if task.trained]
    if asked != "auto" and asked not in can:
        raise ValueError(f"{flag} {asked}: {model} can be trained for {', '.join(can)}")
    return can[0] if asked == "auto" else asked


def expert_boundary(config: Config) -> float | None:
    """The noise level at which the parts of two experts meet, in training and then when they generate."""
    return config.objective.boundary or find(config.model)[1].boundary


def build_objective(config: Config) -> Objective:
    """The objective of a run, of both experts the whole; ValueError for a task that the model was not made for."""
    family, shape = architecture(config)
    task = choose_task(config.model, family, shape, config.objective.task, "--objective.task")
    expert = None if config.expert == "both" else config.expert
    boundary = expert_boundary(config) if expert else None
    return family.objective(shape, task, expert=expert, boundary=boundary, **choose_options(config, family))


def choose_options(config: Config, family: Family) -> dict[str, Any]:
    """The options of the family's objective: what was asked for, else its own. ValueError for one that it has not."""
    given = {name: value for name, value in vars(config.objective).items() if value is not None}
    given = {name: value for name, value in given.items() if name not in ("task", "boundary")}
    for name in given.keys() - family.objective_options.keys():
        having = ", ".join(f"--objective.{option}" for option in family.objective_options) or "none"
        raise ValueError(
            f"--objective.{name} {given[name]}: {config.model} is trained otherwise; its options: {having}"
        )
    return {**family.objective_options, **given}
