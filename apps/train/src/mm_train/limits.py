"""What a value must be: limits of numbers, stated with the field that they belong to, and folders of encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any

from mm_models.folder import check_parts


def limited(default: Any, *, least: float | None = None, above: float | None = None, below: float | None = None) -> Any:
    """A field of a dataclass whose value (or each number of it) must be at least, above or below these."""
    return field(default=default, metadata={"least": least, "above": above, "below": below})


def check_limits(config: Any, prefix: str = "--") -> None:
    """Raise ValueError for the first number of `config`, a dataclass of dataclasses, that is outside its limits."""
    for one in fields(config):
        value, name = getattr(config, one.name), f"{prefix}{one.name}"
        if is_dataclass(value):
            check_limits(value, f"{name}.")
            continue
        least, above, below = (one.metadata.get(limit) for limit in ("least", "above", "below"))
        several = isinstance(value, tuple | list)
        for number in value if several else (value,):
            if (
                (least is not None and not number >= least)
                or (above is not None and not number > above)
                or (below is not None and not number < below)
            ):
                raise ValueError(
                    f"{name} {'contains' if several else 'is'} {number}; it must {_say(least, above, below)}"
                )


def _say(least: float | None, above: float | None, below: float | None) -> str:
    if below is not None:
        return f"lie in {least} <= x < {below}" if least is not None else f"lie between {above} and {below}"
    if above is not None:
        return "be positive" if above == 0 else f"be more than {above}"
    return f"be at least {least}"


def check_encoders(path: Path | None, folders: Sequence[str], flag: str) -> None:
    """Raise ValueError unless a diffusers directory holds these folders, and nothing in them must not be done."""
    missing = [f"{folder}/" for folder in folders if path is None or not (path / folder).is_dir()]
    if missing:
        wanted = ", ".join(f"{folder}/" for folder in folders)
        raise ValueError(f"{flag} {path} has no {', '.join(missing)}: give the diffusers directory with {wanted}")
    check_parts(path, folders)
