"""The older script of MindSpeed-MM's Wan2.1 guide: `python -m mm_convert.convert_ckpt`, or `convert_ckpt.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm_convert.cli import report_errors
from mm_convert.cli.convert import convert
from mm_convert.cli.options import Convert, read
from mm_convert.cli.terminal import escaped_output
from mm_convert.guides.table import CONVERT_CKPT

FIXED = {
    "convert_to_mm": {"published": True},
    "convert_to_hf": {"to": "diffusers"},
}


def run(mode: str, **fields: Any) -> None:
    if mode == "convert_to_mm" and fields["like"]:
        raise ValueError("--ckpt_path belongs to --mode convert_to_hf")
    if mode == "convert_to_hf" and fields["pp_layers"]:
        raise ValueError("--pp_vpp_layers belongs to --mode convert_to_mm; how a checkpoint is split is seen from it")
    convert(Convert(**fields | FIXED[mode]))


@escaped_output()
def main(argv: Sequence[str] | None = None) -> None:
    fields = read(CONVERT_CKPT, argv, dict, prog="convert_ckpt.py")
    report_errors("convert_ckpt.py", lambda: run(**fields))


if __name__ == "__main__":
    main()
