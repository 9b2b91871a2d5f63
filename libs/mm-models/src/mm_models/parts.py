"""What of a model is meant by a word: a part of its family, the last layers of one, or a pattern of names.

vision          all parameters of the part (`Family.parts`)
language:-4     those of the last four layers in it
*.norm?.weight  those whose names fit; `*` crosses dots
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from mm_models.families import family_of, plan, suggest

OTHER = "other"
"""The part of a parameter that is in no part of its family."""

_LAST = re.compile(r"(?P<part>\w+):-(?P<count>\d+)")


def find_parameters(model: nn.Module, wanted: str, flag: str) -> list[str]:
    """The names of the parameters (and buffers that are saved) that `wanted` means, adapters among them.

    Raises ValueError, beginning with `flag`, for what means none, and for more layers than there are.
    """
    parts = family_of(model.config).parts
    names = list(model.state_dict())
    if match := _LAST.fullmatch(wanted):
        return _find_last(model, match["part"], int(match["count"]), f"{flag} {wanted!r}")
    patterns = parts.get(wanted, (wanted,))
    found = [name for name in names if any(fnmatchcase(_published(name), pattern) for pattern in patterns)]
    if not found:
        firsts = [*dict.fromkeys(name.partition(".")[0] + ".*" for name in names)]
        known = [*parts, *firsts]
        near = suggest(wanted, known)
        raise ValueError(f"{flag} {wanted!r} names no parameter{near}; there are {', '.join(known)}")
    return found


def find_linears(model: nn.Module, target: str, linears: Iterable[str]) -> list[str]:
    """Of these linears, those that a target of adapters means: the end of a name, in a part where one stands before
    it (`vision:mlp.up_proj`), or a part, which means all in it. Empty where it means none.
    """
    parts = family_of(model.config).parts
    part, colon, end = target.partition(":")
    if part not in parts:
        return [name for name in linears if name == target or name.endswith(f".{target}")]
    inside = [name for name in linears if _is_in(f"{name}.weight", parts[part])]
    return [name for name in inside if not colon or name.endswith(f".{end}")]


def divide(model: nn.Module) -> dict[str, str]:
    """Name of each parameter -> its part: the first in which it is, or `OTHER`."""
    parts = family_of(model.config).parts
    return {
        name: next((part for part, patterns in parts.items() if _is_in(name, patterns)), OTHER)
        for name, _ in model.named_parameters()
    }


def _find_last(model: nn.Module, part: str, count: int, where: str) -> list[str]:
    parts = family_of(model.config).parts
    if part not in parts:
        near = suggest(part, list(parts))
        raise ValueError(f"{where}: there is no part {part!r}{near}; there are {', '.join(parts) or 'none'}")
    layers = [
        f"{prefix}{name}."
        for prefix, ladder, own in plan(model).ladders(model)
        for name in own.modules_of(ladder, "layers")
        if _is_in(f"{prefix}{name}.weight", parts[part])
    ]
    if not 0 < count <= len(layers):
        raise ValueError(f"{where}: {part} has {len(layers)} layers; ask for 1 to {len(layers)} of them, or for {part}")
    return [name for name in model.state_dict() if name.startswith(tuple(layers[-count:]))]


def _published(name: str) -> str:
    """The name of a parameter without what adapters put into it."""
    return name.replace(".base_layer.", ".")


def _is_in(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(_published(name), pattern) for pattern in patterns)
