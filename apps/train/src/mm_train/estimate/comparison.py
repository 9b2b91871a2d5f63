"""The estimate of a run beside what it measures, in its first report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mm_convert import replace_file
from mm_convert.cli.terminal import one_line
from mm_data import Batch
from mm_models.objective import Objective
from mm_parallel.device import name_of
from mm_parallel.devices import recognize
from mm_parallel.frozen import count_frozen
from mm_train.config import Config
from mm_train.estimate.estimate import Estimate, Subject
from mm_train.estimate.report import gib, to_json
from mm_train.estimate.workload import Workload, of_batch
from mm_train.optim import AnyOptimizer

AFTER = 3  # steps: the first make states and choose kernels


class Comparison:
    """Made once in a run, on its first rank; on the others nothing happens.

    An estimate never ends a run: where it cannot be made, a line says so.
    """

    def __init__(self, config: Config, objective: Objective, device: torch.device, world: int, leader: bool) -> None:
        self.config, self.objective, self.device, self.world, self.leader = config, objective, device, world, leader
        self.work: Workload | None = None
        self.found: Estimate | None = None
        self.skipped = ""
        self.rows: list[Mapping[str, float]] = []

    def look(self, micro: Sequence[Batch]) -> None:
        """Remembers the shapes of the first step."""
        if self.leader and self.work is None:
            largest = max(micro, key=lambda batch: sum(x.numel() for x in batch.tensors.values()))
            self.work = of_batch(largest.tensors, len(micro), self.objective)

    def first(self) -> dict[str, float]:
        """What the first row of metrics.jsonl has besides: `estimated_memory_gib`, `estimated_seconds` where the device
        is known, and `estimate_took`, seconds. Later, and elsewhere, nothing.
        """
        if not self.leader or self.work is None or self.found or self.skipped:
            return {}
        started = time.perf_counter()
        known = None if self.device.type == "cpu" else recognize(name_of(self.device))
        try:
            one = self.config.trainees[0]  # of two, the other waits
            self.found = Subject(one).estimate(one, self.world, known, self.work)
        except Exception as error:  # whatever it is, the run goes on
            self.skipped = one_line(f"{type(error).__name__}: {error}")
            return {}
        row = {"estimated_memory_gib": self.found.peak / 2**30}
        if self.found.seconds is not None:
            row["estimated_seconds"] = self.found.seconds
        return row | {"estimate_took": time.perf_counter() - started}

    def tell(
        self,
        row: Mapping[str, float],
        parameters: nn.Module,
        optimizer: AnyOptimizer,
        average: Mapping[str, torch.Tensor],
        last: bool,
    ) -> str:
        """A line after some steps, or after the last: what was estimated and what is; "" otherwise. Written to
        `estimate.json` as well.
        """
        if not self.leader or (not self.found and not self.skipped) or len(self.rows) == AFTER:
            return ""
        self.rows.append(row)
        if len(self.rows) < AFTER and not last:
            return ""
        self.rows += [row] * (AFTER - len(self.rows))  # nothing is told again
        if self.found is None:
            return f"estimate   skipped ({self.skipped})"
        measured = {
            "parameters": _bytes(parameters.parameters()) + count_frozen(parameters),
            "moments": _bytes(x for state in optimizer.state.values() for x in state.values()),
            "average": _bytes(average.values()),
            "memory": round(row["memory_gib"] * 2**30),
            "seconds": row["seconds"],
        }
        self._write(measured)
        return _describe(self.found, measured, self.device)

    def _write(self, measured: Mapping[str, Any]) -> None:
        text = json.dumps({"estimate": to_json(self.found), "measured": measured}, indent=2)
        replace_file(self.config.run_dir / "estimate.json", text + "\n")


def _bytes(tensors: Any) -> int:
    """What this rank has of them."""
    own = [x.to_local() if isinstance(x, DTensor) else x for x in tensors if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in own)


def _describe(found: Estimate, measured: Mapping[str, Any], device: torch.device) -> str:
    rank = found.memory[0]
    held = [("parameters", rank.parameters), ("moments", rank.moments)]
    held += [("average", rank.average)] if rank.average else []
    parts = ", ".join(f"{name} {gib(size)} ({gib(measured[name])})" for name, size in held)
    process = ", of the whole process" if device.type == "cpu" else ""
    text = f"estimate   memory {gib(found.peak)} (measured {gib(measured['memory'])}{process}); {parts}"
    if found.seconds is not None:
        text += f"; {found.seconds:.3g} s/step ({measured['seconds']:.3g})"
    return text
