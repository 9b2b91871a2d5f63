"""Models by name."""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch

from mm_models.initial import initial
from mm_models.layers import cast_weights
from mm_models.wan import WanConfig, WanModel
from mm_models.wan.presets import BOUNDARIES, PRESETS

if TYPE_CHECKING:
    from mm_parallel.plan import ParallelPlan


def presets() -> tuple[str, ...]:
    """Names of all presets."""
    return tuple(PRESETS)


def preset(name: str) -> WanConfig:
    """The architecture behind a name. An unknown name is a ValueError that says which one may have been meant."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}{_suggest(name, presets())}; there are {', '.join(presets())}")
    return PRESETS[name]


def boundary(name: str) -> float | None:
    """The noise level (sigma) above which the high-noise expert of a model generates; None if it is one model."""
    preset(name)
    return BOUNDARIES.get(name)


def build(
    name: str, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32, **overrides
) -> WanModel:
    """A model with random weights, initialised the way its authors did (or without any weights: device="meta").

    The weights follow `torch.manual_seed`.

    Args:
        dtype: of the weights, except of what it keeps in float32 (`model.keep_fp32`).
        overrides: fields of the config to change, e.g. `num_layers=4`.
    """
    config = preset(name)
    known = [field.name for field in fields(config)]
    for field in overrides:
        if field not in known:
            raise ValueError(f"{name} has no field {field!r}{_suggest(field, known)}; there are {', '.join(known)}")
    device = torch.device("cpu" if device is None else device)
    with torch.device("meta"):
        model = WanModel(replace(config, **overrides))
    cast_weights(model, dtype)
    if device.type == "meta":
        return model
    model.to_empty(device=device)
    seed = int(torch.randint(2**63 - 1, ()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, parameter.shape, seed))
    return model


def plan(model: WanModel) -> ParallelPlan:
    """How `mm_parallel` may cut this model."""
    from mm_models.wan.plan import plan as wan_plan  # here, so that models alone need no mm_parallel

    if not isinstance(model, WanModel):
        raise ValueError(f"no plan for a {type(model).__name__}; there is one for WanModel")
    return wan_plan(model)


def _suggest(word: str, known: list[str] | tuple[str, ...]) -> str:
    close = get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
