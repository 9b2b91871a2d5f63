"""Which published model a configuration is."""

from __future__ import annotations

from mm_convert.families.family import Config, Family


def name_preset(family: Family, config: Config) -> str:
    """The names of the presets with this configuration; without one, the nearest and what sets it apart."""
    apart = {
        name: {field: value for field, value in fields.items() if config.get(field) != value}
        for name, fields in family.presets.items()
    }
    if not apart:
        return "none known"
    if same := [name for name, differences in apart.items() if not differences]:
        return ", ".join(same)
    nearest = min(apart, key=lambda name: len(apart[name]))
    said = ", ".join(f"{field} {config.get(field)} instead of {value}" for field, value in apart[nearest].items())
    return f"none; nearest {nearest}, with {said}"


def published_boundary(family: Family, config: Config) -> tuple[float | None, str]:
    """Of the published pair whose experts have this configuration, and its name; (None, "") if there is none."""
    names = [name for name in name_preset(family, config).split(", ") if name in family.boundaries]
    return (family.boundaries[names[0]], names[0]) if names else (None, "")
