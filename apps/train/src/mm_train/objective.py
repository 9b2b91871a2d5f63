"""From a batch of features to one loss per sample.

Timestep and noise are counter-based draws from (seed, epoch, sample id): the same sample of the same epoch is trained
on the same (timestep, noise) whatever the rank, the world size, the micro-batch or the number of restarts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


def losses(
    model: nn.Module, batch: Batch, flow: FlowMatching, index: Tensor, noise: Tensor, device: torch.device
) -> Tensor:
    """Weighted flow-matching loss of every sample: B, float32."""
    clean, noise = batch.latents.to(device).float(), noise.to(device)
    index = index.to(device)
    t = flow.timesteps.to(device)[index]
    prediction = model(flow.noised(clean, noise, index), t, batch.text.to(device))
    return flow.loss(prediction, flow.target(clean, noise), index)
