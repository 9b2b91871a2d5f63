"""Validation loss that compares across runs: fixed samples, fixed timesteps, fixed noise, no weighting."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mm_data import FeatureDataset
from mm_data.random import generator
from mm_models.diffusion.flow import POINTS, FlowMatching
from mm_parallel import Pipeline
from mm_parallel.mesh import data_rank, reports_loss
from mm_train.config import Config
from mm_train.objective import Objective
from mm_train.ranks import totals

# Not the training seed: runs with different seeds are measured on the same noise.
SEED = 0


class Validation:
    """Mean squared error of the predicted velocity over (sample, timestep) pairs; every pair weighs the same."""

    def __init__(self, config: Config, goal: Objective, mesh: DeviceMesh | None, device: torch.device):
        self.speaks = reports_loss(mesh)
        rank, ranks = data_rank(mesh)
        self.every, self.steps = config.validation.every, config.steps
        self.goal, self.device = goal, device
        self.batches: list[list[tuple[int, int]]] = []  # this rank's batches of (sample, timestep) pairs
        if config.validation.features is None:
            return
        self.data = FeatureDataset(config.validation.features)
        chosen = sorted(range(min(len(self.data), config.validation.max_samples)), key=lambda i: self.data.shapes[i])
        batches = []
        for _, same_shape in groupby(chosen, key=lambda i: self.data.shapes[i]):
            pairs = [(i, t) for i in same_shape for t in config.validation.timesteps or middles(goal.flow)]
            batches += [pairs[k : k + config.data.micro_batch] for k in range(0, len(pairs), config.data.micro_batch)]
        # Sharded models need the same number of forwards on every rank: short ranks repeat a batch that does not count.
        self.rounds = -(-len(batches) // ranks)
        self.batches = batches[rank::ranks]
        self.filler = batches[0]

    def due(self, step: int) -> bool:
        return hasattr(self, "data") and (step % self.every == 0 or step == self.steps)

    @torch.no_grad()
    def __call__(self, model: nn.Module | Pipeline) -> float:
        model.eval()
        summed, count = torch.zeros((), dtype=torch.float64), 0
        for turn in range(self.rounds):
            counts = turn < len(self.batches)
            error = self._error(model, self.batches[turn] if counts else self.filler)
            if counts and self.speaks:
                summed, count = summed + error.cpu().double().sum(), count + len(error)
        model.train()
        error, number = totals(summed, float(count), device=self.device)
        return error / number

    def _error(self, model: nn.Module | Pipeline, pairs: list[tuple[int, int]]) -> torch.Tensor:
        items = [self.data[i] for i, _ in pairs]
        if empty := [item["id"] for item in items if not item["text"]]:
            raise ValueError(f"{self.data.path}: sample {empty[0]} has no encoded caption")
        clean = torch.stack([item["latents"] for item in items]).float()
        noise = torch.stack(
            [
                torch.randn(clean.shape[1:], generator=generator(SEED, t, item["id"], "validation"))
                for item, (_, t) in zip(items, pairs, strict=True)
            ]
        )
        text = torch.nn.utils.rnn.pad_sequence([item["text"][0] for item in items], batch_first=True)
        t = torch.tensor([float(t) for _, t in pairs], device=self.device)
        clean, noise, text = clean.to(self.device), noise.to(self.device), text.to(self.device)
        extras = {
            name: torch.stack([item["extras"][name] for item in items]).to(self.device) for name in items[0]["extras"]
        }
        sigma = (t / 1000).view(-1, 1, 1, 1, 1)
        prediction = model(**self.goal.inputs((1 - sigma) * clean + sigma * noise, clean, t, text, extras))
        error = self.goal.learned(prediction.float() - self.goal.flow.target(clean, noise))
        return error.square().flatten(1).mean(1)


def middles(flow: FlowMatching, parts: int = 5) -> list[int]:
    """Timesteps in the middle of equal parts of what is trained."""
    first, end = flow.index_range
    high = flow.timesteps[first].item()
    low = flow.timesteps[end].item() if end < POINTS else 0.0
    return [round(low + (high - low) * (2 * part + 1) / (2 * parts)) for part in range(parts)]
