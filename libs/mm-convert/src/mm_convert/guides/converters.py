"""The converters of MindSpeed-MM's guides: what each command asks for, and what it does.

Options are the guides' own. Each command also takes what `Writing` says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mm_convert.guides.writing import Writing, carry_out, made_layout, of_family
from mm_convert.read.checkpoint import Checkpoint, open_checkpoint
from mm_convert.store.torch_file import SUFFIXES
from mm_convert.write.conversion import plan_conversion, plan_like
from mm_convert.write.outputs import Plan

Layout = Literal["mm", "mindspeed"]
Layers = list[int] | list[list[int]]


@dataclass
class Parallel:
    """How the target is split."""

    pp_layers: Layers = field(default_factory=list)
    "layers of each pipeline stage: [10,10,10,10], or one list per virtual stage: [[5,5,5,5],[5,5,5,5]]; []: no stages"


@dataclass
class TensorParallel:
    """How the target is split."""

    tp_size: int = 1
    "tensor-parallel ranks"


@dataclass
class ToMM:
    """Where from, where to."""

    source_path: Path
    "published files, of any names; of two experts (A14B), the folder of one"
    target_path: Path
    "the folder to make; the same as source_path: published files stay, the others go beside them"
    target_layout: Layout = "mm"
    "mm: our own files; mindspeed: MindSpeed-MM's tree, names and slices"
    target_parallel_config: Parallel = field(default_factory=Parallel)


@dataclass(kw_only=True)
class HfToMM(Writing):
    """Published files to our own layout, or to MindSpeed-MM's."""

    cfg: ToMM


@dataclass
class ToMMTensorParallel(ToMM):
    """Where from, where to."""

    target_parallel_config: TensorParallel = field(default_factory=TensorParallel)


@dataclass(kw_only=True)
class HfToMMTensorParallel(Writing):
    """Published files to our own layout, or to MindSpeed-MM's."""

    cfg: ToMMTensorParallel


@dataclass
class ToHF:
    """Where from, where to."""

    source_path: Path
    "our own folder, a MindSpeed-MM tree, a torch DCP folder, or a run of mm_train; however it is split"
    target_path: Path
    "the folder to make; a name in .pt or .safetensors makes one file"
    hf_dir: Path | None = None
    "the published model, whose names, grouping into files, config.json and tokenizer are taken; null: its names alone"


@dataclass(kw_only=True)
class MMToHf(Writing):
    """Our own layout, or MindSpeed-MM's, to published names and files."""

    cfg: ToHF


@dataclass
class ToOther:
    """Where from, where to."""

    source_path: Path
    "our own folder, a MindSpeed-MM tree, or a torch DCP folder; however it is split"
    target_path: Path
    "the folder to make"
    target_layout: Layout | None = None
    "mm: our own files; mindspeed: MindSpeed-MM's tree; null: as the source"
    target_parallel_config: Parallel = field(default_factory=Parallel)


@dataclass(kw_only=True)
class Resplit(Writing):
    """The same weights, split otherwise; the present split is seen from the files."""

    cfg: ToOther


@dataclass
class ToOtherTensorParallel(ToOther):
    """Where from, where to."""

    target_parallel_config: TensorParallel = field(default_factory=TensorParallel)


@dataclass(kw_only=True)
class ResplitTensorParallel(Writing):
    """The same weights, split otherwise (the guide's split and merge); the present split is seen in the files."""

    cfg: ToOtherTensorParallel


@dataclass(kw_only=True)
class LayerZeroToMM(Writing):
    """A sharded training checkpoint (torch DCP, or joined by MindSpeed's convert_to_megatron.py) to our own layout."""

    cfg: ToOther
    iteration: int | None = None
    "the training step to take; null: the newest"
    prefix: str = ""
    "what the names of the model begin with, if with something else than predictor or model"
    ema_model: bool = False
    "the moving average of the weights instead of the last ones"


@dataclass
class FromTo:
    """Where from, where to."""

    source_path: Path
    "any checkpoint of this family"
    target_path: Path
    "the folder to make"


@dataclass(kw_only=True)
class MMToDcp(Writing):
    """To a torch DCP folder with MindSpeed-MM's names, of which every rank reads its own part."""

    cfg: FromTo


@dataclass
class VaeToMM:
    """Where from, where to."""

    source_path: Path
    "checkpoint.ckpt of the VAE, or its folder"
    target_path: Path
    "the folder to make"
    target_layout: Layout = "mm"
    "mm: our own files; mindspeed: casualvae_mm.pt"


@dataclass(kw_only=True)
class VaeConvert(Writing):
    """The VAE of Open-Sora-Plan 1.2."""

    cfg: VaeToMM
    use_ema_model: bool = True
    "take the moving average, where the file has one"


def hf_to_mm(family: str, options: HfToMM | HfToMMTensorParallel) -> None:
    cfg = options.cfg
    checkpoint = of_family(open_checkpoint(cfg.source_path, published=True), family)
    _split(checkpoint, cfg.target_path, cfg.target_layout, cfg.target_parallel_config, options)


def resplit(family: str, options: Resplit | ResplitTensorParallel) -> None:
    cfg = options.cfg
    checkpoint = of_family(open_checkpoint(cfg.source_path), family)
    layout = made_layout(checkpoint, cfg.target_layout)
    _split(checkpoint, cfg.target_path, layout, cfg.target_parallel_config, options)


def mm_to_hf(family: str, options: MMToHf, to: str) -> None:
    cfg = options.cfg
    model = of_family(open_checkpoint(cfg.hf_dir, published=True), family) if cfg.hf_dir else None
    checkpoint = of_family(open_checkpoint(cfg.source_path, config=model.config if model else None), family)
    if model:
        carry_out(plan_like(checkpoint, cfg.target_path, model, dtype=options.dtype), checkpoint.notes, options)
    else:
        carry_out(plan_conversion(checkpoint, cfg.target_path, to, dtype=options.dtype), checkpoint.notes, options)


def layerzero_to_mm(family: str, options: LayerZeroToMM) -> None:
    cfg, part = options.cfg, "ema" if options.ema_model else "model"
    source = cfg.source_path
    if options.iteration is not None:
        source = source / f"iter_{options.iteration:07d}"
    elif steps := sorted(source.glob("iter_*")):
        source = steps[-1]
    checkpoint = of_family(open_checkpoint(source, part=part, prefix=options.prefix), family)
    _split(checkpoint, cfg.target_path, cfg.target_layout or "mm", cfg.target_parallel_config, options)


def mm_to_dcp(family: str, options: MMToDcp) -> None:
    checkpoint = of_family(open_checkpoint(options.cfg.source_path), family)
    plan = plan_conversion(checkpoint, options.cfg.target_path, "dcp", dtype=options.dtype)
    carry_out(plan, checkpoint.notes, options)


def vae_convert(options: VaeConvert) -> None:
    cfg = options.cfg
    vae, plan = plan_vae(cfg.source_path, cfg.target_path, cfg.target_layout, options.use_ema_model, options.dtype)
    carry_out(plan, vae.notes, options)


def plan_vae(
    source: Path, target: Path, to: Layout, use_ema_model: bool = True, dtype: str | None = None
) -> tuple[Checkpoint, Plan]:
    """The VAE of Open-Sora-Plan 1.2, which MindSpeed-MM has as one file."""
    checkpoint = open_checkpoint(source, part="ema_state_dict" if use_ema_model else "state_dict")
    checkpoint = of_family(checkpoint, "opensoraplan-vae")
    if to == "mindspeed" and target.suffix not in SUFFIXES:
        target = target / "casualvae_mm.pt"
    return checkpoint, plan_conversion(checkpoint, target, to, dtype=dtype)


def _split(
    checkpoint: Checkpoint, target: Path, to: str, parallel: Parallel | TensorParallel, options: Writing
) -> None:
    plan = plan_conversion(
        checkpoint,
        target,
        to,
        pp_layers=parallel.pp_layers if isinstance(parallel, Parallel) else (),
        tp_size=parallel.tp_size if isinstance(parallel, TensorParallel) else 1,
        dtype=options.dtype,
    )
    carry_out(plan, checkpoint.notes, options)
