"""Two models that share the noise levels: one for the steps that are mostly noise, one for the others (Wan2.2 A14B)."""

import torch
from torch import nn


class Experts(nn.Module):
    """Stands where `denoise` takes a model. `high` makes the steps from sigma = `boundary` on, `low` those below.

    offload: keep the idle one on the host, so that the device holds one at a time; they move once in a video. Without
        it, both are where the latents are.
    """

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float, offload: bool = False) -> None:
        super().__init__()
        if not 0 < boundary < 1:
            raise ValueError(f"boundary {boundary}: must be a noise level between 0 (clean) and 1 (noise), as 0.875")
        self.high, self.low = high, low
        self.boundary, self.offload = boundary, offload

    def is_high(self, t: float) -> bool:
        """Whether a step at timestep t, 0 to 1000, is the high-noise expert's."""
        return t >= self.boundary * 1000

    def at(self, t: float, device: torch.device) -> nn.Module:
        """The expert for timestep t, on the device."""
        working, idle = (self.high, self.low) if self.is_high(t) else (self.low, self.high)
        if self.offload and next(working.parameters()).device != device:
            idle.to("cpu")  # first, or the device would have to hold both
            working.to(device)
        return working
