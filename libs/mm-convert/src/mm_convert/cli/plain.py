"""The commands that the guides do not have: inspect, diff, and convert as the plain form of everything."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from mm_convert.guides.writing import Writing, carry_out
from mm_convert.lora import Adapter
from mm_convert.lora.files import inspect_adapter, open_adapter, plan_adapter
from mm_convert.read.checkpoint import Checkpoint, open_checkpoint
from mm_convert.read.experts import open_experts
from mm_convert.read.inspection import diff, inspect
from mm_convert.write.conversion import plan_conversion
from mm_convert.write.outputs import Plan
from mm_convert.write.pairs import inspect_pair, plan_pair

POSITIONAL = {"positional": True}
Form = Literal["mm", "mindspeed", "dcp", "original", "diffusers", "transformers", "transformers-v5", "peft", "comfyui"]


@dataclass
class Inspect:
    """Say what a checkpoint is, from its headers alone."""

    path: Path = field(metadata=POSITIONAL)
    "a folder of the hub, ours, a MindSpeed-MM tree, torch DCP, one .safetensors or .pt file; LoRA; a pair of experts"


@dataclass
class Diff:
    """Say how two checkpoints differ, whatever their forms: names, shapes, dtypes, largest difference per tensor."""

    a: Path = field(metadata=POSITIONAL)
    "a whole model, in any form"
    b: Path = field(metadata=POSITIONAL)
    "a whole model, in any form"


@dataclass(kw_only=True)
class Convert(Writing):
    """Rewrite a checkpoint, or a LoRA adapter, under other names and in other files; tensors keep their bytes."""

    source: Path = field(metadata=POSITIONAL)
    "anything that inspect reads"
    target: Path = field(metadata=POSITIONAL)
    "the folder to make; a name in .safetensors or .pt makes one file"
    to: Form = "mm"
    "mm (ours), mindspeed, dcp, or names: original, diffusers, transformers; of LoRA: mm, diffusers, comfyui, mindspeed"
    shard_gb: float | None = None
    "regroup into files of at most so many GB (10^9 bytes); null: the source's grouping"
    pp_layers: list[int] | list[list[int]] = field(default_factory=list)
    "layers of each pipeline stage, flat or one list per virtual stage (of Qwen, the language layers)"
    vit_pp_layers: list[int] | list[list[int]] = field(default_factory=list)
    "of Qwen: vision layers of each pipeline stage"
    tp_size: int = 1
    "tensor-parallel ranks"
    lora_alpha: float | None = None
    "of a LoRA adapter whose file does not say it"
    boundary: float | None = None
    "of two experts whose files do not say it: the noise level from which on the high-noise one generates"

    def __post_init__(self) -> None:
        if self.shard_gb is not None and self.shard_gb <= 0:
            raise ValueError(f"shard_gb is {self.shard_gb}; a file must hold something")


def run_inspect(options: Inspect) -> None:
    print(inspect_pair(options.path) or inspect_adapter(options.path) or inspect(options.path))


def run_diff(options: Diff) -> None:
    """Exit code 1 where the two differ."""
    compared = differing = 0
    for difference in diff(options.a, options.b):
        compared += 1
        if difference:
            differing += 1
            print(f"{difference.name}: {difference.what}", flush=True)  # a large model takes minutes
    print(f"{compared} tensors, " + (f"{differing} differ" if differing else "all equal"))
    sys.exit(1 if differing else 0)


def run_convert(options: Convert) -> None:
    if pair := open_experts(options.source):
        both = plan_pair(pair, options.target, options.to, options.boundary, partial(_plan, options))
        carry_out(both, (), options)
        return
    if options.boundary is not None:
        raise ValueError(f"{options.source} is not two experts, so it has no boundary")
    opened, plan = _plan(options, options.source, options.target)
    carry_out(plan, opened.notes, options)


def _plan(options: Convert, source: Path, target: Path) -> tuple[Checkpoint | Adapter, Plan]:
    """What lies in one folder, and what writing it would write."""
    adapter = open_adapter(source, alpha=options.lora_alpha)
    if adapter:
        inapplicable = {
            "shard_gb": options.shard_gb,
            "pp_layers": options.pp_layers,
            "vit_pp_layers": options.vit_pp_layers,
        }
        for name, value in {**inapplicable, "tp_size": options.tp_size > 1}.items():
            if value:
                raise ValueError(f"{source} is a LoRA adapter, which has no use for --{name}")
        return adapter, plan_adapter(adapter, source, target, options.to, options.dtype)
    if options.lora_alpha is not None:
        raise ValueError(f"{source} is no LoRA adapter, so it has no lora_alpha")
    checkpoint = open_checkpoint(source)
    layers = options.pp_layers
    plan = plan_conversion(
        checkpoint,
        target,
        options.to,
        pp_layers={"llm": layers, "vit": options.vit_pp_layers} if options.vit_pp_layers else layers,
        tp_size=options.tp_size,
        shard_bytes=None if options.shard_gb is None else int(options.shard_gb * 1e9),
        dtype=options.dtype,
    )
    return checkpoint, plan
