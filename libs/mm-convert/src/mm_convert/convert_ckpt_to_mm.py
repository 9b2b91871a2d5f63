"""MindSpeed-MM's older script for Open-Sora-Plan 1.2: `python -m mm_convert.convert_ckpt_to_mm`, or by its own name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_convert.cli import report_errors
from mm_convert.cli.convert import prepare, write
from mm_convert.cli.options import Convert, read
from mm_convert.guides.table import CONVERT_CKPT_TO_MM, VAE

PROGRAM = "convert_ckpt_to_mm.py"


def conversions(mode: str, tp_size: int, paths: dict[str, Path], vae: bool, **fields: Any) -> list[Convert]:
    """What a command line asks for."""
    fields |= {"takes": "model", "family": "opensoraplan"}
    if mode == "merge":
        source, target = paths["dit_mm_weight_path"], paths["dit_merge_save_path"]
        return [Convert(source=source, target=target, source_tp_size=tp_size, **fields)]
    source, target = paths["dit_hg_weight_path"], paths["dit_mm_save_path"]
    both = [Convert(source=source, target=target, published=True, tp_size=tp_size, **fields)]
    if vae:
        source, target = paths["vae_hg_weight_path"], paths["vae_mm_save_path"]
        both.append(Convert(source=source, target=target, part="ema_state_dict", **fields | VAE))
    return both


def run(fields: dict[str, Any]) -> None:
    paths = {name: fields.pop(name) for name in list(fields) if name.endswith("_path")}
    asked = conversions(paths=paths, **fields)
    prepared = [(prepare(options), options) for options in asked]
    for files, options in prepared:
        files.refuse(options.overwrite)  # all are looked at before the first, which is long
    for files, options in prepared:
        write(files, options)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    dashed = [word.partition("=") for word in argv]  # the guide's table has underscores, its command dashes
    argv = [f"--{flag[2:].replace('-', '_')}{e}{v}" if flag[:2] == "--" else flag + e + v for flag, e, v in dashed]
    argv = [word.lower() if word in ("True", "False") else word for word in argv]  # as the guide writes its defaults
    fields = read(CONVERT_CKPT_TO_MM, argv, dict, prog=PROGRAM)
    report_errors(PROGRAM, lambda: run(fields))


if __name__ == "__main__":
    main()
