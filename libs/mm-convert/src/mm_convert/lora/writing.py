"""Adapters in the formats that others read."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mm_convert.families.family import Family
from mm_convert.lora.adapter import Adapter, LowRank
from mm_convert.lora.base import KEY
from mm_convert.lora.names import DIFFERENCES, PEFT, join_first, rename, rename_parameters
from mm_convert.store.mm import name_of
from mm_convert.tensors.views import Computed, LazyTensor

_SPELLINGS = {  # prefix, dialect ("": that of models in memory), A and B
    "mm": (PEFT, "", "lora_A", "lora_B"),
    "peft": (PEFT, "", "lora_A", "lora_B"),
    "diffusers": ("transformer.", "diffusers", "lora_A", "lora_B"),
    "comfyui": ("diffusion_model.", "original", "lora_down", "lora_up"),
    "mindspeed": ("", "mindspeed", "lora_A.default", "lora_B.default"),
}


def lora_tensors(adapter: Adapter, to: str) -> tuple[dict[str, LazyTensor], dict[str, str], dict[str, Any] | None]:
    """An adapter in the format `to`: "mm" or "peft" (they are one), "diffusers", "comfyui" or "mindspeed".

    Returns its tensors, the metadata of the header (of mindspeed: for a manifest), and adapter_config.json or None.
    Rank and alpha are in one of these, whatever the format. Raises ValueError when the family has no such names, and
    for whole differences, which comfyui alone can hold.
    """
    if to not in _SPELLINGS:
        raise ValueError(f"adapters cannot be written as {to!r}, but as {', '.join(_SPELLINGS)}")
    if adapter.differences and to != "comfyui":
        raise ValueError(
            f"this adapter adds whole differences to {len(adapter.differences)} parameters "
            f"({join_first(list(adapter.differences))}), which {to} files cannot hold: write it as comfyui, or merge "
            "it into its base (mm-convert convert BASE TARGET --lora ADAPTER)"
        )
    prefix, dialect, a, b = _SPELLINGS[to]
    theirs = rename(adapter.family, dialect or _in_memory(adapter.family), adapter.modules)
    modules = {theirs[ours]: module for ours, module in adapter.modules.items()}
    tensors: dict[str, LazyTensor] = {}
    for name, module in modules.items():
        tensors |= {f"{prefix}{name}.{a}.weight": module.a, f"{prefix}{name}.{b}.weight": module.b}
        if to == "comfyui":
            tensors[f"{prefix}{name}.alpha"] = _scalar(module.alpha)

    base = name_of(adapter.base)
    header = {"format": "pt"} | ({"base": base} if base else {})
    header |= {KEY: json.dumps(dict(adapter.trained_on), sort_keys=True)} if adapter.trained_on else {}
    if to == "comfyui":
        return tensors | _differences(adapter, prefix, dialect), header, None
    config = _config(modules, base, adapter.dropout)
    if to == "diffusers":
        header["lora_adapter_metadata"] = _json({prefix + key: value for key, value in config.items()})
    elif None not in (adapter.rank, adapter.alpha):
        header |= {"rank": str(adapter.rank), "alpha": str(adapter.alpha)}
    else:
        header["lora_adapter_metadata"] = _json(config)
    return tensors, header, config if to in ("mm", "peft") else None


def _differences(adapter: Adapter, prefix: str, dialect: str) -> dict[str, LazyTensor]:
    """`diffusion_model.head.head.diff_b` of `head.head.bias`, and so on."""
    theirs = rename_parameters(adapter.family, dialect, adapter.differences)
    found = {}
    for ours, tensor in adapter.differences.tensors.items():
        module, part = theirs[ours].rpartition(".")[0], DIFFERENCES[ours.rpartition(".")[2]]
        found[f"{prefix}{module}.{part}"] = tensor
    return found


def _in_memory(family: Family) -> str:
    return family.in_memory or family.table.dialects[0]


def _config(modules: Mapping[str, LowRank], base: str, dropout: float) -> dict[str, Any]:
    """What peft has to know. Its patterns are regular expressions for the end of a name; ^ makes it the whole."""
    rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in modules.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {f"^{name}": m.rank for name, m in modules.items() if m.rank != rank},
        "alpha_pattern": {f"^{name}": _plain(m.alpha) for name, m in modules.items() if m.alpha != alpha},
        "target_modules": list(modules),
        "lora_dropout": dropout,
        "bias": "none",
    }


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha.is_integer() else alpha


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True)


def _scalar(value: float) -> LazyTensor:
    """In float32, as everybody writes it, unless that would change it."""
    single = struct.pack("<f", value)
    if struct.unpack("<f", single)[0] == value:
        return Computed("F32", (), lambda start, stop: single)
    return Computed("F64", (), lambda start, stop: struct.pack("<d", value))
