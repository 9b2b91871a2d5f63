"""What cannot work, found before anything is loaded: so a mistake costs a second and not a quarter of an hour.

A list of named checks. `train` raises what the first one finds; `python -m mm_train.doctor` runs and tells them all.
Those in `flags` and `paths` need no torch; those in `looks` open data and headers.
"""

from __future__ import annotations

from typing import Any

from mm_convert.cli.checks import Check, When
from mm_models.family import later
from mm_models.libraries import check_libraries
from mm_train.checks.asked import Asked
from mm_train.checks.flags import (
    check_adapter_file,
    check_both_experts,
    check_compile,
    check_frozen,
    check_kind,
    check_layout,
    check_limits,
    check_log,
    check_model,
    check_objective,
    check_rates,
    check_trained,
)
from mm_train.checks.paths import check_data, check_output, check_samples, check_weights, check_writable
from mm_train.config import Config
from mm_train.optimizers import check_optimizer


def check(config: Config, when: When = "at once") -> list[str]:
    """Raise ValueError for what is impossible, or does not go together. Returns what a person should know of the rest,
    one line each.
    """
    asked = Asked(config)
    said = [one.run(asked) or "" for one in CHECKS if one.when == when]
    return [note for text in said for note in text.split("\n")[1:]]


def _look(name: str) -> Any:
    """A check that needs torch, which is imported when it runs."""
    return later("mm_train.checks.looks", name)


CHECKS: tuple[Check[Asked], ...] = (
    Check("libraries", "at once", lambda asked: check_libraries()),
    Check("configuration", "at once", check_limits),
    Check("model", "at once", check_model),
    Check("both experts", "at once", check_both_experts, after=("model",)),
    Check("weights", "at once", check_weights, after=("model",)),
    Check("options", "at once", check_kind, after=("model",)),
    Check("data", "at once", check_data, after=("model", "options")),
    Check("objective", "at once", check_objective, after=("model",)),
    Check("learning rate", "at once", check_rates),
    Check("optimizer", "at once", lambda asked: check_optimizer(asked.config.optim, asked.world)),
    Check("log", "at once", check_log),
    Check("what is trained", "at once", check_trained),
    Check("frozen matrices", "at once", check_frozen, after=("what is trained",)),
    Check("adapter", "at once", check_adapter_file, after=("what is trained",)),
    Check("layout", "at once", check_layout),
    Check("compile", "at once", check_compile),
    Check("samples", "at once", check_samples, after=("model", "options")),
    Check("output", "at once", check_output, after=("model",)),
    Check("resume", "when asked", check_writable, after=("output",)),
    Check("compiler", "with torch", _look("check_compiler"), after=("compile",)),
    Check("model in layout", "with torch", _look("check_cut"), after=("model", "what is trained", "layout")),
    Check("tensors", "when asked", _look("check_tensors"), after=("model", "weights", "what is trained", "resume")),
    Check("adapter in model", "when asked", _look("check_adapter"), after=("model", "adapter", "what is trained")),
    Check("sample adapter", "when asked", _look("check_sample_adapter"), after=("model", "what is trained", "samples")),
    Check("encoders", "when asked", _look("check_encoders"), after=("model", "data", "samples")),
    Check("features", "with torch", _look("check_features"), after=("model", "data", "objective")),
    Check("validation", "with torch", _look("check_validation"), after=("features",)),
    Check("sample", "when asked", _look("check_sample"), after=("model", "data", "features", "encoders")),
    Check("batches", "when asked", _look("check_batches"), after=("sample", "layout")),
    Check("disk", "when asked", _look("check_disk"), after=("model", "what is trained", "resume")),
    Check("device", "when asked", _look("check_device")),
    Check(
        "memory",
        "when asked",
        _look("check_memory"),
        after=("model", "options", "what is trained", "features", "model in layout"),
    ),
    Check("attention", "when asked", _look("check_attention"), after=("model",)),
)
