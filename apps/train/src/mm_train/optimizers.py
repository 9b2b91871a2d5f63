"""The optimizers that a run may have: what each takes, what it holds, and where it works. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, fields
from importlib.util import find_spec
from math import prod

from mm_train.config import OptimConfig

BLOCK = 128
"""Numbers of `adamw8bit` that share a scale, along the last dim of a matrix."""


@dataclass(frozen=True)
class Kind:
    """One optimizer. Bytes are those of its states in float32, masters and gradients aside."""

    takes: frozenset[str]
    """Of the options that are not for all."""
    checkpoint: float
    """Bytes a trained parameter in a checkpoint, at most, besides its own 4."""
    package: str = ""
    """Of another maker, which it is in."""
    alone: str = ""
    """Why it works on one rank only; empty: in every layout."""


_RATE = {"schedule", "min_lr", "rates"}

KINDS: dict[str, Kind] = {
    "adamw": Kind(frozenset({"betas", "eps", "kernel", "ema", *_RATE}), 8),
    "muon": Kind(frozenset({"betas", "eps", "kernel", "momentum", "ema", *_RATE}), 8),
    "adafactor": Kind(
        frozenset({"ema", *_RATE}),
        4,
        alone="torch's Adafactor takes means over rows and columns, which a parameter that is cut does not allow it",
    ),
    "adamw8bit": Kind(frozenset({"betas", "eps", "ema", *_RATE}), 3),
    "prodigy": Kind(
        frozenset({"betas", "eps", "schedule", "min_lr", "ema"}),
        16,
        package="prodigyopt",
        alone="Prodigy finds one rate from sums over all parameters, and its package sums those of one rank",
    ),
    # what it is evaluated with, and where gradients are taken, lie in a checkpoint both
    "schedulefree": Kind(frozenset({"betas", "eps", "rates"}), 12, package="schedulefree"),
}

_SPECIAL = frozenset().union(*(kind.takes for kind in KINDS.values()))


def check_optimizer(config: OptimConfig, world: int) -> str:
    """Raise ValueError for an option that the optimizer does not take, a layout in which it does not work, and a
    package that is missing. Returns what it is; what a person should know of it on lines of their own.
    """
    name, kind = config.name, KINDS[config.name]
    for one in fields(OptimConfig):
        default = one.default_factory() if callable(one.default_factory) else one.default
        if one.name in _SPECIAL - kind.takes and getattr(config, one.name) != default:
            having = " and ".join(other for other, of in KINDS.items() if one.name in of.takes)
            raise ValueError(
                f"--optim.{one.name} {getattr(config, one.name)} (perhaps of the model's recipe) is for {having}, and "
                f"--optim.name is {name}: leave it out, or give its default, {default}"
            )
    if kind.alone and world > 1:
        others = ", ".join(other for other, of in KINDS.items() if not of.alone)
        raise ValueError(
            f"--optim.name {name} works on one rank, and there are {world}: {kind.alone}. In every layout work {others}"
        )
    if kind.package and find_spec(kind.package) is None:
        raise ValueError(f"--optim.name {name} needs the package {kind.package}: pip install {kind.package}")
    if name == "prodigy" and config.lr < 0.1:
        raise ValueError(
            f"--optim.lr {config.lr:g} (perhaps of the model's recipe) with --optim.name prodigy: it multiplies the "
            "rate that Prodigy finds, so nothing would be learned. Give --optim.lr 1"
        )
    said = [name]
    if name == "adafactor" and config.lr < 1e-3:
        said.append(
            f"note: of adafactor the rate is relative to the size of each weight: 1e-2 is usual, {config.lr:g} is asked"
        )
    return "\n".join(said)


def describe(config: OptimConfig) -> str:
    """The optimizer and its rate in words."""
    how = {
        "muon": "muon for matrices of layers, adamw for all else, one rate and decay for both",
        "adafactor": "adafactor, the rate is relative to the size of each weight",
        "prodigy": "prodigy, times the rate that it finds",
        "schedulefree": "schedulefree, evaluated and saved with its average",
    }
    return f"{how.get(config.name, config.name)}, lr {config.lr:g}, {config.schedule}"


def state_bytes(name: str, matrices: Container[str]) -> Callable[[str, tuple[int, ...]], int]:
    """(name of a parameter, shape of what a rank holds of it) -> bytes of its states, as the optimizer makes them.

    matrices: names of the parameters that Muon takes.
    """

    def count(parameter: str, shape: tuple[int, ...]) -> int:
        numbers, wide = prod(shape), len(shape) > 1
        if name == "muon" and parameter in matrices:
            return 4 * numbers
        if name == "adafactor":
            return 4 + (4 * (numbers // shape[-1] + numbers // shape[-2]) if wide and numbers else 4 * numbers)
        if name == "adamw8bit" and wide:
            return 4 + 2 * numbers + 8 * shape[0] * -(-prod(shape[1:]) // BLOCK)
        return {"prodigy": 16 * numbers, "schedulefree": 8 * numbers}.get(name, 8 * numbers + 4)

    return count
