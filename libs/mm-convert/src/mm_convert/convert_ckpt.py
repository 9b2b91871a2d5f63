"""The older script of MindSpeed-MM's Wan2.1 guide: `python -m mm_convert.convert_ckpt`, or `convert_ckpt.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from mm_convert.cli import guarded
from mm_convert.cli.arguments import parse
from mm_convert.guides import converters
from mm_convert.guides.converters import Layers, Layout
from mm_convert.guides.writing import Writing


@dataclass(kw_only=True)
class ConvertCkpt(Writing):
    """Published Wan files to our own layout or MindSpeed-MM's, and back."""

    mode: Literal["convert_to_mm", "convert_to_hf"]
    "the direction"
    source_path: Path
    "convert_to_mm: the published transformer folder; convert_to_hf: what was trained"
    target_path: Path
    "the folder to make; convert_to_mm may name source_path: what is made then stands beside the published files"
    ckpt_path: Path | None = None
    "convert_to_hf: the published transformer folder, whose names, files and config.json are taken"
    pp_vpp_layers: Layers = field(default_factory=list)
    "convert_to_mm: layers of each pipeline stage: [7,8,8,7], or one list per virtual stage: [[7,8],[7,8]]"
    target_layout: Layout = "mm"
    "convert_to_mm: mm: our own files; mindspeed: MindSpeed-MM's tree and names"


def run(options: ConvertCkpt) -> None:
    how = {"overwrite": options.overwrite, "dry_run": options.dry_run, "sha256": options.sha256, "dtype": options.dtype}
    source, target = options.source_path, options.target_path
    if options.mode == "convert_to_mm":
        if options.ckpt_path:
            raise ValueError("--ckpt_path belongs to --mode convert_to_hf")
        split = converters.Parallel(options.pp_vpp_layers)
        cfg = converters.ToMM(source, target, options.target_layout, split)
        converters.hf_to_mm("wan", converters.HfToMM(cfg=cfg, **how))
        return
    if options.pp_vpp_layers:
        raise ValueError("--pp_vpp_layers belongs to --mode convert_to_mm; how a checkpoint is split is seen from it")
    cfg = converters.ToHF(source, target, options.ckpt_path)
    converters.mm_to_hf("wan", converters.MMToHf(cfg=cfg, **how), to="diffusers")


def main(argv: Sequence[str] | None = None) -> None:
    guarded("convert_ckpt.py", partial(run, parse(ConvertCkpt, argv, prog="convert_ckpt.py")))


if __name__ == "__main__":
    main()
