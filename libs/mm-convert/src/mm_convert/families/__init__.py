"""The families of models whose checkpoints can be read, each a table of names and two of configuration."""

from __future__ import annotations

from mm_convert.families.family import Family
from mm_convert.families.wan import WAN

FAMILIES: tuple[Family, ...] = (WAN,)

__all__ = ["FAMILIES", "WAN", "Family"]
