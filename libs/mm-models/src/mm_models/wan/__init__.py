"""Wan2.1 and its relatives: video diffusion transformers. See README.md beside this file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mm_models.wan.config import WanConfig

if TYPE_CHECKING:
    from mm_models.wan.cost import flops, train_flops
    from mm_models.wan.model import Stream, WanModel

__all__ = ["Stream", "WanConfig", "WanModel", "flops", "train_flops"]

# What needs torch is imported when it is asked for: presets are looked up without it.
_HOMES = {"cost": ("flops", "train_flops"), "model": ("Stream", "WanModel")}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"mm_models.wan.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
