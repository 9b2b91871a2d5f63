"""Checkpoints of video models, from any form into any other, streamed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mm_convert.__about__ import __version__

if TYPE_CHECKING:
    from mm_convert.files import open_file, read_bytes, read_json, read_text, read_toml
    from mm_convert.lora.adapter import Adapter
    from mm_convert.lora.reading import open_lora
    from mm_convert.read.checkpoint import Checkpoint, open_checkpoint, read_said
    from mm_convert.read.experts import expert_of, open_experts, write_experts
    from mm_convert.read.inspection import diff, inspect
    from mm_convert.read.made_of import weight_files
    from mm_convert.store.dcp import open_dcp
    from mm_convert.store.dcp_load import load_dcp
    from mm_convert.write.install import replace_file
    from mm_convert.write.lock import lock_output
    from mm_convert.write.save import convert, save_checkpoint, save_lora

__all__ = [
    "Adapter",
    "Checkpoint",
    "__version__",
    "convert",
    "diff",
    "expert_of",
    "inspect",
    "load_dcp",
    "lock_output",
    "open_checkpoint",
    "open_dcp",
    "open_experts",
    "open_file",
    "open_lora",
    "read_bytes",
    "read_json",
    "read_said",
    "read_text",
    "read_toml",
    "replace_file",
    "save_checkpoint",
    "save_lora",
    "weight_files",
    "write_experts",
]

_HOME = {
    "Adapter": "lora.adapter",
    "Checkpoint": "read.checkpoint",
    "open_checkpoint": "read.checkpoint",
    "read_said": "read.checkpoint",
    "convert": "write.save",
    "expert_of": "read.experts",
    "open_experts": "read.experts",
    "write_experts": "read.experts",
    "diff": "read.inspection",
    "inspect": "read.inspection",
    "load_dcp": "store.dcp_load",
    "open_dcp": "store.dcp",
    "open_file": "files",
    "open_lora": "lora.reading",
    "read_bytes": "files",
    "read_json": "files",
    "read_text": "files",
    "read_toml": "files",
    "lock_output": "write.lock",
    "replace_file": "write.install",
    "save_checkpoint": "write.save",
    "save_lora": "write.save",
    "weight_files": "read.made_of",
}


def __getattr__(name: str) -> Any:  # so that `mm-convert --help` answers at once
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
