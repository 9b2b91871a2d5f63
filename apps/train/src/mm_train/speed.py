"""How fast a step was: tokens and floating-point operations per second, share of the device's peak, memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mm_data import Batch
from mm_models.families import family_of
from mm_parallel.device import max_memory, peak_flops


class Speed:
    """Counts the operations that training needs; recomputation does not raise the MFU."""

    def __init__(self, model: nn.Module, device: torch.device, data_size: int, world: int):
        self.device, self.data_size, self.world = device, data_size, world
        self.cost = family_of(model.config).cost(model)
        self.peak = peak_flops(device, model.compute_dtype or torch.float32)

    def __call__(self, micro: Sequence[Batch], seconds: float, data_seconds: float) -> tuple[dict[str, float], str]:
        """(numbers to keep, text for the line); global numbers: this rank's samples times the data-parallel ranks."""
        tokens, operations = self.cost(micro[0].tensors)
        samples = sum(len(m.ids) for m in micro) * self.data_size
        operations = operations * samples / seconds
        row = {"tokens_per_second": tokens * samples / seconds, "tflops": operations / 1e12}
        pace = f"{seconds:.3f} s/step (data {data_seconds:.3f}) | {row['tokens_per_second']:,.0f} tok/s"
        text = f"{pace} | {row['tflops']:.3g} TFLOP/s"
        if self.peak:
            row["mfu"] = operations / (self.peak * self.world)
            text += f" (MFU {100 * row['mfu']:.1f} %)"
        row["memory_gib"] = max_memory(self.device) / 2**30
        return row, f"{text} | {row['memory_gib']:.2f} GiB"
