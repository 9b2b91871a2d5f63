"""Fields that shapes cannot tell: from a config.json, which may be wrong, or as published weights have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mm_convert.files import brief


def is_count(value: Any) -> bool:
    """A whole number above 0."""
    return type(value) is int and value > 0


def is_small(value: Any) -> bool:
    """A number between 0 and 1, as an eps."""
    return type(value) in (int, float) and 0 < value < 1


def settle(config: dict[str, Any], field: str, published: Any, fits: Callable[[Any], bool]) -> list[str]:
    """Put the published value where the configuration has none or one that cannot be; notes on what was replaced."""
    said = config.get(field)
    if said is not None and fits(said):
        return []
    config[field] = published
    return [] if said is None else [f"{field} is said to be {brief(said)}, which cannot be: {published} is taken"]


def settle_heads(config: dict[str, Any], head_dim: int) -> list[str]:
    """Take out a number of heads that does not divide `dim`; where there is none, that of heads with so many channels.

    `num_heads` stays absent if `dim` is no multiple of that either.
    """
    dim, said, notes = config["dim"], config.get("num_heads"), []
    if said is not None and not (is_count(said) and dim % said == 0):
        why = f"does not divide dim {dim}" if is_count(said) else "cannot be"
        notes.append(f"num_heads is said to be {brief(said)}, which {why}: it is left out")
        del config["num_heads"]
    if "num_heads" not in config and dim % head_dim == 0:
        config["num_heads"] = dim // head_dim
        notes.append(f"num_heads is {dim // head_dim} if heads have {head_dim} channels, as in all published weights")
    elif "num_heads" not in config:
        notes.append(f"num_heads of dim {dim} is unknown; a config.json beside the tensors could say it")
    return notes
