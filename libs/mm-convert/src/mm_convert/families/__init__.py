"""The families of models whose checkpoints can be read, each a table of names and two of configuration.

Of two families that know equally many names of a checkpoint the earlier one is meant: all names of Wan are VACE's too,
and all of mT5 are UMT5's.
"""

from __future__ import annotations

from mm_convert.families.family import Family
from mm_convert.families.opensoraplan import OPENSORAPLAN
from mm_convert.families.opensoraplan_vae import OPENSORAPLAN_VAE
from mm_convert.families.qwen2_5_vl import QWEN2_5_VL
from mm_convert.families.t5 import MT5, UMT5
from mm_convert.families.vace import VACE
from mm_convert.families.wan import WAN
from mm_convert.families.wan_vae import WAN_2_2_VAE, WAN_VAE

FAMILIES: tuple[Family, ...] = (
    *(WAN, VACE, OPENSORAPLAN, QWEN2_5_VL),
    *(MT5, UMT5, WAN_VAE, WAN_2_2_VAE, OPENSORAPLAN_VAE),
)

__all__ = [
    "FAMILIES",
    "MT5",
    "OPENSORAPLAN",
    "OPENSORAPLAN_VAE",
    "QWEN2_5_VL",
    "UMT5",
    "VACE",
    "WAN",
    "WAN_2_2_VAE",
    "WAN_VAE",
    "Family",
]
