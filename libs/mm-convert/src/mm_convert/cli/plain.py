"""The commands that only read: inspect and diff."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from mm_convert.cli.options import POSITIONAL
from mm_convert.read.inspection import diff, inspect, inspect_adapter, inspect_pair


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
