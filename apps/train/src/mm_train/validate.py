"""Validation loss that compares across runs: fixed samples at fixed points, with fixed noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_data import Captions, FeatureDataset, Pick
from mm_data.random import generator
from mm_models.objective import Objective
from mm_parallel import Pipeline
from mm_parallel.mesh import data_rank, reports_loss
from mm_train.config import Config
from mm_train.held_out import HeldOut
from mm_train.objective import build_objective
from mm_train.ranks import all_sum
from mm_train.step import OnDevice

# Not the training seed: runs with different seeds are measured on the same noise.
SEED = 0


class Measured(NamedTuple):
    """A batch of the validation set."""

    asked: tuple[Any, ...]
    """What the data set's `batch` is asked with."""
    points: list[Any]
    """The point of the objective at which each sample of it is measured: for diffusion a timestep."""


class Validation:
    """The objective's mean loss over samples and points, by their weights: for videos every pair of them weighs 1, for
    conversations every token that is trained.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        held_out: HeldOut | None,
        mesh: DeviceMesh | None,
        device: torch.device,
    ):
        self.reports, self.held_out = reports_loss(mesh), held_out
        rank, ranks = data_rank(mesh)
        self.every, self.steps = config.validation.every, config.steps
        self.objective, self.device = objective, device
        if config.validation.features is not None:
            self.data = FeatureDataset(config.validation.features, Captions(first=True))
            batches = list(_pairs(self.data, objective, config))
        elif held_out is not None:  # whatever a run is trained by, so that runs compare
            self.objective = build_objective(replace(config, objective=replace(config.objective, average=None)))
            self.data = held_out.data
            batches = [Measured(pack, []) for pack in held_out.packs(config.validation.max_samples)]
        else:
            return
        # Sharded models need the same number of forwards on every rank: short ranks repeat a batch that does not count.
        self.rounds = -(-len(batches) // ranks)
        self.batches = batches[rank::ranks]  # this rank's
        self.filler = batches[0]

    def due(self, step: int) -> bool:
        return hasattr(self, "data") and (step % self.every == 0 or step == self.steps)

    @torch.no_grad()
    def __call__(self, model: nn.Module | Pipeline) -> float:
        """NaN where nothing weighs anything. All ranks must call it."""
        model.eval()
        summed, weight = (torch.zeros((), dtype=torch.float64) for _ in range(2))
        for turn in range(self.rounds):
            counts = turn < len(self.batches)
            losses, weights = self._measure(model, self.batches[turn] if counts else self.filler)
            if counts and self.reports:
                summed, weight = summed + losses.cpu().double().sum(), weight + weights.double().sum()
        model.train()
        loss, total = all_sum(summed, weight, device=self.device)
        if self.held_out is not None:
            self.held_out.refusals.tell()
            self.held_out.refusals.write()
        return loss / total if total else float("nan")

    def _measure(self, model: nn.Module | Pipeline, measured: Measured) -> tuple[Tensor, Tensor]:
        """(weighted losses, weights) of the samples."""
        batch, points = self.data.batch(*measured.asked), measured.points

        def generators(i: int, _: str) -> torch.Generator:
            return generator(SEED, points[i], batch.ids[i], "validation")

        drawn = self.objective.draw_at(batch.tensors, points, generators)
        tensors = OnDevice(batch.tensors, self.device, self.objective.host)
        output = model(**self.objective.inputs(tensors, drawn))
        return self.objective.losses(output, tensors, drawn), self.objective.weigh(batch.tensors)


def _pairs(data: FeatureDataset, objective: Objective, config: Config) -> Iterator[Measured]:
    """Every sample at every point, in batches of one shape."""
    points, size = config.validation.timesteps or objective.points, config.data.micro_batch
    chosen = sorted(range(min(len(data), config.validation.max_samples)), key=lambda i: data.buckets[i])
    for _, bucket in groupby(chosen, key=lambda i: data.buckets[i]):
        pairs = [(Pick(i, 0), point) for i in bucket for point in points]
        for start in range(0, len(pairs), size):
            picks, at = zip(*pairs[start : start + size], strict=True)
            yield Measured((list(picks),), list(at))
