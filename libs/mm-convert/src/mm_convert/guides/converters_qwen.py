"""Qwen2_5_VLConverter of MindSpeed-MM's guides, whose options have names of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mm_convert.guides.converters import Layers, Layout
from mm_convert.guides.writing import Writing, carry_out, made_layout, of_family
from mm_convert.read.checkpoint import Checkpoint, open_checkpoint
from mm_convert.tensors.stages import Split
from mm_convert.write.conversion import plan_conversion, plan_like

FAMILY = "qwen2.5-vl"


@dataclass
class HubFolder:
    """A model of the hub."""

    hf_dir: Path
    "its folder, with *.safetensors and config.json"


@dataclass
class VisionLanguageParallel:
    """How a checkpoint is split. Lists are flat, or one list per virtual stage; [] for both: no stages."""

    llm_pp_layers: Layers = field(default_factory=list)
    "language layers of each pipeline stage"
    vit_pp_layers: Layers = field(default_factory=list)
    "vision layers of each pipeline stage"
    tp_size: int = 1
    "tensor-parallel ranks"

    @property
    def layers(self) -> dict[str, Layers]:
        return {"llm": self.llm_pp_layers, "vit": self.vit_pp_layers}


@dataclass
class QwenToMM:
    """Where from, where to."""

    mm_dir: Path
    "the folder to make"
    hf_config: HubFolder
    parallel_config: VisionLanguageParallel = field(default_factory=VisionLanguageParallel)
    target_layout: Layout = "mm"
    "mm: our own files; mindspeed: MindSpeed-MM's tree, names and slices"


@dataclass(kw_only=True)
class QwenHfToMM(Writing):
    """Published files to our own layout, or to MindSpeed-MM's."""

    cfg: QwenToMM


@dataclass
class QwenToHF:
    """Where from, where to."""

    mm_dir: Path
    "our own folder, or a MindSpeed-MM tree; however it is split"
    save_hf_dir: Path
    "the folder to make"
    hf_config: HubFolder
    parallel_config: VisionLanguageParallel = field(default_factory=VisionLanguageParallel)


@dataclass(kw_only=True)
class QwenMMToHf(Writing):
    """To the files of the hub. How mm_dir is split is seen from it; parallel_config, if given, must agree."""

    cfg: QwenToHF


@dataclass
class QwenFromTo:
    """Where from, where to."""

    source_dir: Path
    "our own folder, or a MindSpeed-MM tree"
    target_dir: Path
    "the folder to make"
    source_parallel_config: VisionLanguageParallel = field(default_factory=VisionLanguageParallel)
    target_parallel_config: VisionLanguageParallel = field(default_factory=VisionLanguageParallel)
    target_layout: Layout | None = None
    "mm: our own files; mindspeed: MindSpeed-MM's tree; null: as the source"


@dataclass(kw_only=True)
class QwenResplit(Writing):
    """The same weights, split otherwise. The present split is seen; source_parallel_config, if given, must agree."""

    cfg: QwenFromTo


def hf_to_mm(options: QwenHfToMM) -> None:
    checkpoint = of_family(open_checkpoint(options.cfg.hf_config.hf_dir, published=True), FAMILY)
    _split(checkpoint, options.cfg.mm_dir, options.cfg.target_layout, options.cfg.parallel_config, options)


def mm_to_hf(options: QwenMMToHf) -> None:
    cfg = options.cfg
    model = of_family(open_checkpoint(cfg.hf_config.hf_dir, published=True), FAMILY)
    checkpoint = of_family(open_checkpoint(cfg.mm_dir, config=model.config), FAMILY)
    _agree(checkpoint, cfg.parallel_config)
    carry_out(plan_like(checkpoint, cfg.save_hf_dir, model, dtype=options.dtype), checkpoint.notes, options)


def resplit(options: QwenResplit) -> None:
    cfg = options.cfg
    checkpoint = of_family(open_checkpoint(cfg.source_dir), FAMILY)
    _agree(checkpoint, cfg.source_parallel_config)
    layout = made_layout(checkpoint, cfg.target_layout)
    _split(checkpoint, cfg.target_dir, layout, cfg.target_parallel_config, options)


def _split(checkpoint: Checkpoint, target: Path, to: str, parallel: VisionLanguageParallel, options: Writing) -> None:
    layers = {name: said for name, said in parallel.layers.items() if said}
    plan = plan_conversion(checkpoint, target, to, pp_layers=layers, tp_size=parallel.tp_size, dtype=options.dtype)
    carry_out(plan, checkpoint.notes, options)


def _agree(checkpoint: Checkpoint, said: VisionLanguageParallel) -> None:
    """A split that a person states and the files contradict is a mistake on one side: which, only the person knows."""
    if checkpoint.layout != "mindspeed":
        return
    found = checkpoint.split
    stated = Split.of(said.layers, said.tp_size)
    different = [
        f"{name} {stated.flat(name)}, it has {found['layers'][name]}"
        for name in stated.layers
        if stated.flat(name) != found["layers"][name]
    ]
    if (stated.layers or stated.tp > 1) and stated.tp != found["tp"]:
        different.append(f"tp_size {stated.tp}, it has {found['tp']}")
    if different:
        raise ValueError(f"{checkpoint.path} is said to be split by {'; '.join(different)}")
