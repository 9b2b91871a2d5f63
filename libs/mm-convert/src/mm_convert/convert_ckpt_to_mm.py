"""MindSpeed-MM's older script for Open-Sora-Plan 1.2: `python -m mm_convert.convert_ckpt_to_mm`, or by its own name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_convert.cli import report_errors
from mm_convert.cli.convert import prepare, write
from mm_convert.cli.options import Convert, read
from mm_convert.cli.terminal import escaped_output
from mm_convert.guides.table import CONVERT_CKPT_TO_MM, VAE

PROGRAM = "convert_ckpt_to_mm.py"


def conversions(
    *,
    mode: str,
    tp_size: int,
    dit_hg_weight_path: Path,
    dit_mm_save_path: Path,
    vae: bool,
    vae_hg_weight_path: Path,
    vae_mm_save_path: Path,
    dit_mm_weight_path: Path,
    dit_merge_save_path: Path,
    **common: Any,
) -> list[Convert]:
    """What a command line asks for: one conversion, or two."""
    dit = {**common, "takes": "model", "family": "opensoraplan"}
    if mode == "merge":
        return [Convert(source=dit_mm_weight_path, target=dit_merge_save_path, source_tp_size=tp_size, **dit)]
    split = Convert(source=dit_hg_weight_path, target=dit_mm_save_path, tp_size=tp_size, published=True, **dit)
    if not vae:
        return [split]
    common = {**common, **VAE, "part": "ema_state_dict"}
    return [split, Convert(source=vae_hg_weight_path, target=vae_mm_save_path, **common)]


def run(asked: list[Convert]) -> None:
    prepared = [(prepare(options), options) for options in asked]
    for files, options in prepared:
        files.refuse(options.overwrite)  # all are looked at before the first, which is long
    for files, options in prepared:
        write(files, options)


@escaped_output()
def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    dashed = [word.partition("=") for word in argv]  # the guide's table has underscores, its command dashes
    argv = [f"--{flag[2:].replace('-', '_')}{e}{v}" if flag[:2] == "--" else flag + e + v for flag, e, v in dashed]
    argv = [word.lower() if word in ("True", "False") else word for word in argv]  # as the guide writes its defaults
    asked = read(CONVERT_CKPT_TO_MM, argv, conversions, prog=PROGRAM)
    report_errors(PROGRAM, lambda: run(asked))


if __name__ == "__main__":
    main()
