"""From a batch of features to one loss per sample.

Timestep and noise are counter-based draws from (seed, epoch, sample id): the same sample of the same epoch is trained
on the same (timestep, noise) whatever the rank, the world size, the micro-batch or the number of restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_data import Batch
from mm_data.random import generator
from mm_models.diffusion.flow import FlowMatching


def draw(batch: Batch, flow: FlowMatching, seed: int) -> tuple[Tensor, Tensor]:
    """(index B in the schedule, noise B C F H W), one independent draw per sample."""
    low, high = flow.index_range
    indices, noise = [], []
    for latents, sample, epoch in zip(batch.latents, batch.ids, batch.epochs, strict=True):
        indices.append(torch.randint(low, high, (), generator=generator(seed, epoch, sample, "timestep")))
        noise.append(torch.randn(latents.shape, generator=generator(seed, epoch, sample, "noise")))
    return torch.stack(indices), torch.stack(noise)


class Work:
    """The micro-batches of one step, as `mm_parallel.forward_backward` asks for them.

    A pipeline asks for inputs on its first stage and for losses on its last; draws are made where they are needed.
    Texts are padded to `text_rows`, as the model would: then all micro-batches of a step have one shape.
    """

    def __init__(
        self,
        micro: Sequence[Batch],
        flow: FlowMatching,
        seed: int,
        device: torch.device,
        text_rows: int,
        before: Callable[[int], None] = lambda number: None,
    ):
        self.micro, self.flow, self.seed, self.device, self.before = micro, flow, seed, device, before
        self.text_rows = text_rows
        self.drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def _draw(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """(clean latents, index, noise) on the device."""
        if number not in self.drawn:
            self.drawn[number] = draw(self.micro[number], self.flow, self.seed)
        index, noise = self.drawn[number]
        clean = self.micro[number].latents.to(self.device).float()
        return clean, index.to(self.device), noise.to(self.device)

    def inputs(self, number: int) -> dict[str, Tensor]:
        """What the model is called with; `before(number)` is called first."""
        self.before(number)
        clean, index, noise = self._draw(number)
        t = self.flow.timesteps.to(self.device)[index]
        text = self.micro[number].text.to(self.device)
        text = F.pad(text, (0, 0, 0, self.text_rows - text.shape[1]))
        return {"video": self.flow.noised(clean, noise, index), "t": t, "text": text}

    def losses(self, prediction: Tensor, number: int) -> Tensor:
        """Weighted flow-matching loss of every sample: B, float32."""
        clean, index, noise = self._draw(number)
        del self.drawn[number]
        return self.flow.loss(prediction, self.flow.target(clean, noise), index)
