"""The older script of the Open-Sora-Plan 1.2 guide: `python -m mm_convert.convert_ckpt_to_mm`, or under its own name.

Its defaults are the guide's, where the published files are under ./raw_ckpt and what is made goes under ./ckpt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from mm_convert import converters
from mm_convert.arguments import parse
from mm_convert.cli import guarded
from mm_convert.converters import Layout, TensorParallel
from mm_convert.writing import Writing

PROGRAM = "convert_ckpt_to_mm.py"


@dataclass(kw_only=True)
class ConvertCkptToMM(Writing):
    """Open-Sora-Plan 1.2: published files to our own layout or MindSpeed-MM's, and its ranks joined again."""

    mode: Literal["split", "merge"] = "split"
    "split: from the published files, for tp_size ranks; merge: ranks into one"
    tp_size: int = 1
    "tensor-parallel ranks of the target of split"
    dit_hg_weight_path: Path = Path("raw_ckpt/open-sora-plan/93x480p/diffusion_pytorch_model.safetensors")
    "split: the published transformer, a file or folder"
    dit_mm_save_path: Path = Path("ckpt/open-sora-plan-12/93x480p")
    "split: the folder to make of it"
    vae_convert: bool = True
    "split: convert the VAE too"
    vae_hg_weight_path: Path = Path("raw_ckpt/open-sora-plan/vae/checkpoint.ckpt")
    "split: the published VAE"
    vae_mm_save_path: Path = Path("ckpt/vae")
    "split: the folder to make of it"
    dit_mm_weight_path: Path = Path("ckpt/open-sora-plan-12/93x480p")
    "merge: what is split"
    dit_merge_save_path: Path = Path("ckpt/open-sora-plan-12/merge")
    "merge: the folder to make"
    target_layout: Layout = "mm"
    "mm: our own files; mindspeed: MindSpeed-MM's tree, names and slices"


def run(options: ConvertCkptToMM) -> None:
    how = {"overwrite": options.overwrite, "dry_run": options.dry_run, "sha256": options.sha256, "dtype": options.dtype}
    if options.mode == "merge":
        cfg = converters.ToOtherTensorParallel(
            options.dit_mm_weight_path, options.dit_merge_save_path, options.target_layout
        )
        converters.resplit("opensoraplan", converters.ResplitTensorParallel(cfg=cfg, **how))
        return
    if options.vae_convert and not options.vae_hg_weight_path.exists():  # before the long part
        raise ValueError(f"{options.vae_hg_weight_path} does not exist; name it, or give --vae_convert false")
    cfg = converters.ToMMTensorParallel(
        options.dit_hg_weight_path, options.dit_mm_save_path, options.target_layout, TensorParallel(options.tp_size)
    )
    converters.hf_to_mm("opensoraplan", converters.HfToMMTensorParallel(cfg=cfg, **how))
    if options.vae_convert:
        vae = converters.VaeToMM(options.vae_hg_weight_path, options.vae_mm_save_path, options.target_layout)
        converters.vae_convert(converters.VaeConvert(cfg=vae, **how))


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    dashed = [word.partition("=") for word in argv]  # the guide's table has underscores, its command dashes
    argv = [f"--{flag[2:].replace('-', '_')}{e}{v}" if flag[:2] == "--" else flag + e + v for flag, e, v in dashed]
    guarded(PROGRAM, partial(run, parse(ConvertCkptToMM, argv, prog=PROGRAM)))


if __name__ == "__main__":
    main()
