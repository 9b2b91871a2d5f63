"""Validation loss that compares across runs: fixed samples at fixed points, with fixed noise."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_data import Captions, FeatureDataset, Pick
from mm_data.random import generator
from mm_models.objective import Objective
from mm_parallel import Pipeline
from mm_parallel.mesh import data_rank, reports_loss
from mm_train.config import Config
from mm_train.ranks import all_sum

# Not the training seed: runs with different seeds are measured on the same noise.
SEED = 0

Pair = tuple[int, Any]
"""A sample, and the point of the objective at which it is measured: for diffusion a timestep."""


class Validation:
    """The objective's mean loss over pairs of samples and points, by their weights: for videos every pair weighs 1."""

    def __init__(self, config: Config, objective: Objective, mesh: DeviceMesh | None, device: torch.device):
        self.reports = reports_loss(mesh)
        rank, ranks = data_rank(mesh)
        self.every, self.steps = config.validation.every, config.steps
        self.objective, self.device = objective, device
        self.batches: list[list[Pair]] = []  # this rank's
        if config.validation.features is None:
            return
        self.data = FeatureDataset(config.validation.features, Captions(first=True))
        points = config.validation.timesteps or objective.points
        chosen = sorted(range(min(len(self.data), config.validation.max_samples)), key=lambda i: self.data.buckets[i])
        batches = []
        for _, bucket in groupby(chosen, key=lambda i: self.data.buckets[i]):
            pairs = [(i, point) for i in bucket for point in points]
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
        summed, weight = (torch.zeros((), dtype=torch.float64) for _ in range(2))
        for turn in range(self.rounds):
            counts = turn < len(self.batches)
            losses, weights = self._measure(model, self.batches[turn] if counts else self.filler)
            if counts and self.reports:
                summed, weight = summed + losses.cpu().double().sum(), weight + weights.double().sum()
        model.train()
        loss, total = all_sum(summed, weight, device=self.device)
        return loss / total

    def _measure(self, model: nn.Module | Pipeline, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        """(weighted losses, weights) of the pairs."""
        batch = self.data.batch([Pick(i, 0) for i, _ in pairs])
        points = [point for _, point in pairs]

        def generators(i: int, _: str) -> torch.Generator:
            return generator(SEED, points[i], batch.ids[i], "validation")

        drawn = self.objective.draw_at(batch.tensors, points, generators)
        tensors = {name: tensor.to(self.device) for name, tensor in batch.tensors.items()}
        output = model(**self.objective.inputs(tensors, drawn))
        return self.objective.losses(output, tensors, drawn), self.objective.weigh(batch.tensors)
