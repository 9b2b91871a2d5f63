"""From a batch of features to one loss per sample.

Timestep and noise are counter-based draws from (seed, epoch, sample id): the same sample of the same epoch is trained
on the same (timestep, noise) whatever the rank, the world size, the micro-batch or the number of restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_data import Batch
from mm_data.random import generator
from mm_models import boundary
from mm_models.diffusion.flow import FlowMatching, expert_range
from mm_models.wan import WanConfig
from mm_models.wan.conditions import Task, hold, inputs, learned_frames, tasks
from mm_train.config import Config


@dataclass(frozen=True)
class Objective:
    """What a model is trained to do."""

    model: WanConfig
    task: Task
    flow: FlowMatching

    def inputs(
        self, noisy: Tensor, clean: Tensor, t: Tensor, text: Tensor, conditions: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the model is called with. Texts are padded as the model would: then all have one shape."""
        text = F.pad(text, (0, 0, 0, self.model.text_tokens - text.shape[1]))
        if self.task == "ti2v":
            conditions = {"first": clean[:, :, :1]}
        noisy = hold(self.task, noisy, conditions)
        return inputs(self.model, self.task, noisy, t, text, conditions)

    def learned(self, x: Tensor) -> Tensor:
        """The latent frames of a prediction or a target that count."""
        return x[:, :, learned_frames(self.task)]


def expert_boundary(config: Config) -> float:
    """The noise level at which the parts of two experts meet, in training and then when they generate."""
    return config.objective.boundary or boundary(config.model)


def objective(config: Config, model: WanConfig) -> Objective:
    """The objective of a run. ValueError for a task that the model was not made for."""
    can = tasks(model)
    task = can[0] if config.objective.task == "auto" else config.objective.task
    if task not in can:
        trainable = [other for other in can if other != "v2v"]  # which only begins otherwise
        raise ValueError(f"--objective.task {task}: {config.model} can be trained for {', '.join(trainable)}")
    o = config.objective
    part = o.range or (0.0, 1.0)
    if config.expert and o.range is None:
        part = expert_range(config.expert, expert_boundary(config), o.shift)
    return Objective(model, task, FlowMatching(o.shift, part, o.weighting))


def draw(batch: Batch, flow: FlowMatching, seed: int) -> tuple[Tensor, Tensor]:
    """(index B in the schedule, noise B C F H W), one independent draw per sample."""
    low, high = flow.index_range
    indices, noise = [], []
    for latents, sample, epoch in zip(batch.tensors["latents"], batch.ids, batch.epochs, strict=True):
        indices.append(torch.randint(low, high, (), generator=generator(seed, epoch, sample, "timestep")))
        noise.append(torch.randn(latents.shape, generator=generator(seed, epoch, sample, "noise")))
    return torch.stack(indices), torch.stack(noise)


class Work:
    """The micro-batches of one step, as `mm_parallel.forward_backward` asks for them.

    A pipeline asks for inputs on its first stage and for losses on its last; draws are made where they are needed.
    """

    def __init__(
        self,
        micro: Sequence[Batch],
        objective: Objective,
        seed: int,
        device: torch.device,
        before: Callable[[int], None] = lambda number: None,
    ):
        self.micro, self.objective, self.seed, self.device, self.before = micro, objective, seed, device, before
        self.flow = objective.flow
        self.drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def _draw(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """(clean latents, index, noise) on the device."""
        if number not in self.drawn:
            self.drawn[number] = draw(self.micro[number], self.flow, self.seed)
        index, noise = self.drawn[number]
        clean = self.micro[number].tensors["latents"].to(self.device).float()
        return clean, index.to(self.device), noise.to(self.device)

    def inputs(self, number: int) -> dict[str, Tensor]:
        """What the model is called with; `before(number)` is called first."""
        self.before(number)
        clean, index, noise = self._draw(number)
        t = self.flow.timesteps.to(self.device)[index]
        given = {name: tensor.to(self.device) for name, tensor in self.micro[number].tensors.items()}
        text = given.pop("text")
        del given["latents"]  # what is left are the conditions
        noisy = self.flow.noised(clean, noise, index)
        return self.objective.inputs(noisy, clean, t, text, given)

    def losses(self, prediction: Tensor, number: int) -> Tensor:
        """Weighted flow-matching loss of every sample: B, float32."""
        clean, index, noise = self._draw(number)
        del self.drawn[number]
        learned = self.objective.learned
        return self.flow.loss(learned(prediction), learned(self.flow.target(clean, noise)), index)
