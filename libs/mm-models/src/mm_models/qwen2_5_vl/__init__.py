"""Qwen2.5-VL: a vision tower and a language model. See README.md beside this file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mm_models.qwen2_5_vl.config import Qwen25VLConfig

if TYPE_CHECKING:
    from mm_models.qwen2_5_vl.model import Qwen25VLModel
    from mm_models.qwen2_5_vl.mrope import positions

__all__ = ["Qwen25VLConfig", "Qwen25VLModel", "positions"]

# What needs torch is imported when it is asked for: presets are looked up without it.
_HOMES = {"model": ("Qwen25VLModel",), "mrope": ("positions",)}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"mm_models.qwen2_5_vl.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
