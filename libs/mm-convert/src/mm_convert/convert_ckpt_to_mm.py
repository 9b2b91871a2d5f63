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

from mm_convert.cli import guarded
from mm_convert.cli.arguments import parse
from mm_convert.guides.converters import Layout, plan_vae
from mm_convert.guides.writing import Writing, carry_out, of_family
from mm_convert.read.checkpoint import open_checkpoint
from mm_convert.write.conversion import plan_conversion

PROGRAM = "convert_ckpt_to_mm.py"


@dataclass(kw_only=True)
class ConvertCkptToMM(Writing):
    """Open-Sora-Plan 1.2: published files to our own layout or MindSpeed-MM's, and its ranks joined again."""

    mode: Literal["split", "merge"] = "split"
    "split: from the published files, for tp_size ranks; merge: ranks into one"
    tp_size: int = 1
    "split: tensor-parallel ranks to make; merge: those that there are, if given"
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
    to, dtype = options.target_layout, options.dtype
    if options.mode == "merge":
        checkpoint = of_family(open_checkpoint(options.dit_mm_weight_path), "opensoraplan")
        found = checkpoint.split.get("tp", options.tp_size)
        if options.tp_size not in (1, found):
            raise ValueError(f"{options.dit_mm_weight_path} is said to have tp_size {options.tp_size}, it has {found}")
        carry_out(plan_conversion(checkpoint, options.dit_merge_save_path, to, dtype=dtype), checkpoint.notes, options)
        return
    transformer = of_family(open_checkpoint(options.dit_hg_weight_path, published=True), "opensoraplan")
    plan = plan_conversion(transformer, options.dit_mm_save_path, to, tp_size=options.tp_size, dtype=dtype)
    plan.refuse(options.overwrite)
    if options.vae_convert:  # looked at before the long part
        vae, vae_plan = plan_vae(options.vae_hg_weight_path, options.vae_mm_save_path, to, dtype=dtype)
        vae_plan.refuse(options.overwrite)
    carry_out(plan, transformer.notes, options)
    if options.vae_convert:
        carry_out(vae_plan, vae.notes, options)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    dashed = [word.partition("=") for word in argv]  # the guide's table has underscores, its command dashes
    argv = [f"--{flag[2:].replace('-', '_')}{e}{v}" if flag[:2] == "--" else flag + e + v for flag, e, v in dashed]
    argv = [word.lower() if word in ("True", "False") else word for word in argv]  # as the guide writes its defaults
    guarded(PROGRAM, partial(run, parse(ConvertCkptToMM, argv, prog=PROGRAM)))


if __name__ == "__main__":
    main()
