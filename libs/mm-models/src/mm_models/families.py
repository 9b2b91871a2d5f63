"""All families, in one tuple, and models by name. A new family is a folder of its own and one entry here."""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from mm_models.family import Family, Preset
from mm_models.opensoraplan.family import OPENSORAPLAN
from mm_models.qwen2_5_vl.family import QWEN2_5_VL
from mm_models.wan.family import WAN

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mm_parallel.plan import ParallelPlan

FAMILIES: tuple[Family, ...] = (WAN, OPENSORAPLAN, QWEN2_5_VL)


def presets() -> tuple[str, ...]:
    """Names of all presets."""
    return tuple(name for family in FAMILIES for name in family.presets)


def preset(name: str) -> Any:
    """The architecture behind a name. An unknown name is a ValueError that says which one may have been meant."""
    return find(name)[1].config


def find(name: str) -> tuple[Family, Preset]:
    """The family of a preset, and the preset with all that was published. ValueError for an unknown name."""
    for family in FAMILIES:
        if name in family.presets:
            return family, family.presets[name]
    raise ValueError(f"there is no preset {name!r}{suggest(name, presets())}; there are {', '.join(presets())}")


def boundary(name: str) -> float | None:
    """The noise level (sigma) above which the high-noise expert of a model generates; None if it is one model."""
    return find(name)[1].boundary


def family_of(config: Any) -> Family:
    """The family of a configuration. ValueError for what is none of ours."""
    for family in FAMILIES:
        if isinstance(config, family.config):
            return family
    raise ValueError(f"{type(config).__name__} is the configuration of no family; there are {_names()}")


def family_of_weights(checkpoint: str) -> Family:
    """The family of weights that mm_convert calls `checkpoint`. ValueError where there is none to run them."""
    for family in FAMILIES:
        if checkpoint in family.checkpoints:
            return family
    raise ValueError(
        f"weights of {checkpoint} can be converted, but not be run here; families that can are {_names()}: of a "
        "diffusers directory name the whole, or its transformer/"
    )


def published_like(config: Any, experts: bool) -> Preset:
    """The preset that weights are most like: first in what they can do, then in their number, then in most fields (of
    a field of several numbers, such as a size, each counts for its part).

    experts: whether there are two of them. Of several that are as near, the first: 480p before 720p.
    """
    family = family_of(config)

    def nearness(candidate: Preset) -> tuple[float, ...]:
        other = candidate.config
        return (
            family.tasks(other) == family.tasks(config),
            (candidate.boundary is not None) == experts,
            sum(_likeness(getattr(other, name), value) for name, value in vars(config).items()),
        )

    return max(family.presets.values(), key=nearness)  # the first of equals


def _likeness(one: Any, other: Any) -> float:
    """0 to 1."""
    if isinstance(one, tuple) and isinstance(other, tuple) and 0 < len(one) == len(other):
        return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
    return one == other


def build(
    name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **overrides: Any
) -> nn.Module:
    """A model with random weights, initialised the way its authors did (or without any weights: device="meta").

    The weights follow `torch.manual_seed`.

    Args:
        dtype: of the weights (default: float32), except those of `model.keep_fp32`, which stay at least float32.
        overrides: fields of the config to change, e.g. `num_layers=4`.
    """
    import torch

    from mm_models.layers import cast_weights

    family, chosen = find(name)
    config = override(name, chosen.config, overrides)
    device = torch.device("cpu" if device is None else device)
    with torch.device("meta"):
        model = family.build(config)
    cast_weights(model, dtype or torch.float32)
    if device.type == "meta":
        return model
    model.to_empty(device=device)
    seed = int(torch.randint(2**63 - 1, ()))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(family.start().initial(parameter_name, parameter.shape, seed))
    return model


def override(name: str, config: Any, overrides: dict[str, Any]) -> Any:
    """The configuration with some fields replaced. ValueError for one that it does not have."""
    known = [field.name for field in fields(config)]
    for field in overrides:
        if field not in known:
            raise ValueError(f"{name} has no field {field!r}{suggest(field, known)}; there are {', '.join(known)}")
    return replace(config, **overrides)


def plan(model: nn.Module) -> ParallelPlan:
    """How `mm_parallel` may cut this model. ValueError for a model of no family."""
    config = getattr(model, "config", None)
    if not any(isinstance(config, family.config) for family in FAMILIES):
        raise ValueError(f"no plan for a {type(model).__name__}; there are plans for the models of {_names()}")
    return family_of(config).plan(model)


def _names() -> str:
    return ", ".join(family.name for family in FAMILIES)


def suggest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`, did you mean 'x'?` for the known word that is nearest; empty where none is near."""
    close = get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
