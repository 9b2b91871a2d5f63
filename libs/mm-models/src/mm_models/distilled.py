"""Distilled weights and adapters by the names of their files: with how many steps, and how, they sample.

This file imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_models.family import Distilled, Published

NEAR = 3
"""Parts of a path that are looked at, from its end: an adapter's file may be called after its expert alone."""


def find_distilled(known: Sequence[Distilled], paths: Iterable[Path]) -> Distilled | None:
    """The first of those that are known whose pattern the name of one of these files or folders has, if any has."""
    names = ["/".join(path.absolute().parts[-NEAR:]).lower() for path in paths]
    return next((one for one in known if any(re.search(one.pattern, name) for name in names)), None)


def settle_distilled(published: Published, distilled: Distilled | None) -> Published:
    """What is sampled with where nothing is asked."""
    return published if distilled is None else replace(published, **distilled.settings)


def describe_distilled(distilled: Distilled, asked: Mapping[str, Any], flag: str = "--") -> str:
    """`4 steps, guidance 1, flow_shift 5, sampler euler: known of Wan2.2-Lightning (…); --steps, … override`.

    asked: settings that the user gives, which are left out; flag: stands before their names.
    """
    taken = {name: value for name, value in distilled.settings.items() if asked.get(name) is None}
    if not taken:
        return f"{distilled.name} is known by its name, and all its settings are overridden"
    said = ", ".join(
        f"{value} steps" if name == "steps" else f"{name} {_plain(value)}" for name, value in taken.items()
    )
    flags = ", ".join(f"{flag}{name}" for name in taken)
    return f"{said}: known of {distilled.name} ({distilled.source}); {flags} override{'s' * (len(taken) == 1)}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
