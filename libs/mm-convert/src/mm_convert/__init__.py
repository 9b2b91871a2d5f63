"""Checkpoints of video models, from any form into any other, streamed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mm_convert.__about__ import __version__

if TYPE_CHECKING:
    from mm_convert.checkpoint import Checkpoint, open_checkpoint
    from mm_convert.conversion import convert
    from mm_convert.experts import expert_of, open_experts, write_experts
    from mm_convert.inspection import diff, inspect
    from mm_convert.save import save_checkpoint

__all__ = [
    "Checkpoint",
    "__version__",
    "convert",
    "diff",
    "expert_of",
    "inspect",
    "open_checkpoint",
    "open_experts",
    "save_checkpoint",
    "write_experts",
]

_HOME = {
    "Checkpoint": "checkpoint",
    "open_checkpoint": "checkpoint",
    "convert": "conversion",
    "expert_of": "experts",
    "open_experts": "experts",
    "write_experts": "experts",
    "diff": "inspection",
    "inspect": "inspection",
    "save_checkpoint": "save",
}


def __getattr__(name: str) -> Any:  # so that `mm-convert --help` answers at once
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
