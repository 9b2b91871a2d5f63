"""Open-Sora-Plan 1.2: a video diffusion transformer and its VAE. See README.md beside this file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mm_models.opensoraplan.config import OpenSoraPlanConfig

if TYPE_CHECKING:
    from mm_models.opensoraplan.cost import flops
    from mm_models.opensoraplan.model import OpenSoraPlanModel, Stream

__all__ = ["OpenSoraPlanConfig", "OpenSoraPlanModel", "Stream", "flops"]

# What needs torch is imported when it is asked for: presets are looked up without it.
_HOMES = {"cost": ("flops",), "model": ("OpenSoraPlanModel", "Stream")}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"mm_models.opensoraplan.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
