"""How fast a step was: tokens and floating-point operations per second, share of the device's peak, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mm_data import Batch
from mm_models.families import family_of
from mm_parallel.device import max_memory, peak_flops


class Speed:
    """Counts the operations that training needs; recomputation does not raise the MFU."""

    def __init__(self, model: nn.Module, device: torch.device, world: int, compiles: bool = False):
        """model: whole. compiles: whether steps may compile, which is told."""
        self.device, self.world, self.compiles = device, world, compiles
        self.graphs = 0
        self.cost = family_of(model.config).cost(model)
        self.peak = peak_flops(device, model.compute_dtype or torch.float32)

    def count(self, micro: Sequence[Batch]) -> tuple[float, float]:
        """(tokens, operations) of training on this rank's batches."""
        counts = [self.cost(batch.tensors) for batch in micro]
        return sum(tokens for tokens, _ in counts), sum(operations for _, operations in counts)

    def measure(
        self, tokens: float, operations: float, counts: Mapping[str, float], seconds: float, data_seconds: float
    ) -> tuple[dict[str, float], str]:
        """(numbers to keep, text for the line) of a step; tokens, operations and counts are those of all ranks.

        counts: see `Objective.count`. Of padding the share of all that is computed on is kept.
        """
        row: dict[str, float] = dict(counts)
        if "padding" in counts:
            row["padding"] = counts["padding"] / max(1, counts["padding"] + counts["tokens"])
        row |= {"tokens_per_second": tokens / seconds, "tflops": operations / seconds / 1e12}
        pace = f"{seconds:.3f} s/step (data {data_seconds:.3f}) | {row['tokens_per_second']:,.0f} tok/s"
        others = [f"{counts[name] / seconds:,.0f} {name}/s" for name in ("label_tokens", "patches") if name in counts]
        text = " | ".join([pace, *others, f"{row['tflops']:.3g} TFLOP/s"]).replace("_", " ")
        if self.peak:
            row["mfu"] = operations / seconds / (self.peak * self.world)
            text += f" (MFU {100 * row['mfu']:.1f} %)"
        row["memory_gib"] = max_memory(self.device) / 2**30
        text += f" | {row['memory_gib']:.2f} GiB"
        if compiled := self._compiled():
            row["compiled_graphs"] = compiled
            text += f" | {compiled} graphs compiled meanwhile"
        return row, text

    def _compiled(self) -> int:
        """Graphs that this process has compiled since it was last asked."""
        if not self.compiles:
            return 0
        from mm_parallel.compile import count_graphs

        before, self.graphs = self.graphs, count_graphs()
        return self.graphs - before
