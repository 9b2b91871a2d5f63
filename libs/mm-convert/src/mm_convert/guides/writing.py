"""What all commands that write have in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mm_convert.read.checkpoint import Checkpoint
from mm_convert.write.outputs import Plan

if TYPE_CHECKING:
    from mm_convert.write.pairs import PairPlan


@dataclass(kw_only=True)
class Writing:
    """How the target is written."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    "of all tensors of floating point in the target (needs torch); null: each keeps its own"
    overwrite: bool = False
    "replace the target if it holds a checkpoint and nothing else"
    dry_run: bool = False
    "only say what would be written: files, sizes, memory and disk"
    sha256: bool = False
    "note the sum of every written tensor in mm_convert.json"


def carry_out(plan: Plan | PairPlan, notes: Sequence[str], options: Writing) -> None:
    """Write the plan, or only print it; notes go to stderr."""
    for note in (*notes, *plan.notes):
        sys.stderr.write(f"note: {note}\n")
    if options.dry_run:
        plan.refuse(options.overwrite)
        print(plan)
    else:
        plan.execute(overwrite=options.overwrite, show_progress=True, sha256=options.sha256)


def of_family(checkpoint: Checkpoint, family: str) -> Checkpoint:
    """The checkpoint, if it is one of this family."""
    if checkpoint.family != family:
        raise ValueError(f"{checkpoint.path} is a checkpoint of {checkpoint.family}, not of {family}")
    return checkpoint


def made_layout(checkpoint: Checkpoint, said: str | None) -> str:
    """The layout that is asked for; without a word, MindSpeed-MM's for what is in it, else ours."""
    return said or ("mindspeed" if checkpoint.layout == "mindspeed" else "mm")
