"""The commands of WanConverter that are about LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mm_convert.guides.converters import Layout, Parallel
from mm_convert.guides.writing import Writing, carry_out, made_layout, of_family
from mm_convert.lora import Adapter
from mm_convert.lora.files import open_adapter, plan_adapter, plan_merge
from mm_convert.read.checkpoint import open_checkpoint


@dataclass
class BaseAndLora:
    """Where from, where to."""

    source_path: Path
    "the base: any checkpoint of the family"
    lora_path: Path
    "the adapter, in any format"
    target_path: Path
    "the folder to make"
    target_layout: Layout | None = None
    "mm: our own files; mindspeed: MindSpeed-MM's tree; null: as the base if that is MindSpeed-MM's, else ours"
    target_parallel_config: Parallel = field(default_factory=Parallel)


@dataclass(kw_only=True)
class MergeLora(Writing):
    """Add an adapter to its base: W becomes W + alpha/rank * B A, summed in float32 (needs torch)."""

    cfg: BaseAndLora
    lora_rank: int | None = None
    "as trained; null: from the files. Compared with them."
    lora_alpha: float | None = None
    "as trained; null: from the files, which must say it then. Compared with them where they do."


@dataclass
class LoraFromTo:
    """Where from, where to."""

    source_path: Path
    "the adapter, in any format: a file or folder"
    target_path: Path
    "the folder to make"


@dataclass(kw_only=True)
class LoraToMM(Writing):
    """A published adapter (diffusers, ComfyUI, DiffSynth, peft) to our own format, or to MindSpeed-MM's."""

    cfg: LoraFromTo
    target_layout: Layout = "mm"
    "mm: a folder that peft reads too; mindspeed: MindSpeed-MM's tree and names"
    lora_alpha: float | None = None
    "as trained, where the file does not say it"


@dataclass(kw_only=True)
class LoraToHF(Writing):
    """Our adapter, or MindSpeed-MM's, to a published format; a target in .safetensors makes one file."""

    cfg: LoraFromTo
    to: Literal["diffusers", "comfyui", "peft"] = "diffusers"
    "the format"
    lora_alpha: float | None = None
    "as trained, where the file does not say it"


def merge_lora(family: str, options: MergeLora) -> None:
    cfg = options.cfg
    if options.lora_rank is not None and options.lora_rank < 1:
        raise ValueError(f"LoRA rank can not be {options.lora_rank}: it is at least 1")
    base = of_family(open_checkpoint(cfg.source_path), family)
    adapter = _adapter(cfg.lora_path, options.lora_alpha, options.lora_rank)
    to = made_layout(base, cfg.target_layout)
    where, parallel = cfg.lora_path.resolve(), cfg.target_parallel_config
    plan = plan_merge(base, adapter, where, cfg.target_path, to, parallel.pp_layers, options.dtype)
    carry_out(plan, [*base.notes, *adapter.notes, f"{len(adapter.modules)} weights are merged"], options)


def lora_to_mm(family: str, options: LoraToMM) -> None:
    _convert(family, options.cfg, options.target_layout, options.lora_alpha, options)


def lora_to_hf(family: str, options: LoraToHF) -> None:
    _convert(family, options.cfg, options.to, options.lora_alpha, options)


def _convert(family: str, cfg: LoraFromTo, to: str, alpha: float | None, options: Writing) -> None:
    adapter = _adapter(cfg.source_path, alpha, None)
    if adapter.family.name != family:
        raise ValueError(f"{cfg.source_path} is for {adapter.family.name}, not for {family}")
    plan = plan_adapter(adapter, cfg.source_path, cfg.target_path, to, options.dtype)
    carry_out(plan, adapter.notes, options)


def _adapter(path: Path, alpha: float | None, rank: int | None) -> Adapter:
    adapter = open_adapter(path, alpha=alpha, rank=rank)
    if adapter is None:
        raise ValueError(f"{path} holds no LoRA adapter, but a whole model")
    return adapter
