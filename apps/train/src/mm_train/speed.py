"""How fast a step was: tokens and floating-point operations per second, share of the device's peak, memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mm_data import Batch
from mm_models.wan import train_flops
from mm_parallel.device import max_memory, peak_flops


class Speed:
    """Counts the operations that training needs; recomputation does not raise the MFU."""

    def __init__(self, model: nn.Module, device: torch.device, data_size: int, world: int):
        self.config, self.device, self.data_size, self.world = model.config, device, data_size, world
        self.trained = {control: _share(model, control) for control in (False, True)}
        self.peak = peak_flops(device, model.compute_dtype or torch.float32)

    def __call__(self, micro: Sequence[Batch], seconds: float, data_seconds: float) -> tuple[dict[str, float], str]:
        """(numbers to keep, text for the line); global numbers: this rank's samples times the data-parallel ranks."""
        _, _, frames, height, width = micro[0].tensors["latents"].shape
        tokens = frames * height * width // 4
        samples = sum(len(m.ids) for m in micro) * self.data_size
        operations = train_flops(self.config, tokens, self.trained[False], self.trained[True]) * samples / seconds
        row = {"tokens_per_second": tokens * samples / seconds, "tflops": operations / 1e12}
        pace = f"{seconds:.3f} s/step (data {data_seconds:.3f}) | {row['tokens_per_second']:,.0f} tok/s"
        text = f"{pace} | {row['tflops']:.3g} TFLOP/s"
        if self.peak:
            row["mfu"] = operations / (self.peak * self.world)
            text += f" (MFU {100 * row['mfu']:.1f} %)"
        row["memory_gib"] = max_memory(self.device) / 2**30
        return row, f"{text} | {row['memory_gib']:.2f} GiB"


def _share(model: nn.Module, control: bool) -> float:
    """The trained part of the model's own weights: of the control ladder, or of the rest. Adapters do not count."""
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if name.startswith("vace_") == control and ".lora_" not in name:
            sizes[parameter.requires_grad] += parameter.numel()
    return sizes[True] / max(1, sum(sizes.values()))
