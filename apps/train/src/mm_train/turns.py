"""What a run trains: one model, or two experts that take turns.

Of two, a draw by (seed, step) says whose turn it is, as often as timesteps fall into its part of the schedule; within
its part, it draws as the whole schedule does. So over many steps timesteps have the density of one model's. The other
expert waits on the host, with its moments and its average: it moves when the turn changes, and for evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mm_data.random import uniform
from mm_models.diffusion.experts import Experts
from mm_models.objective import Objective
from mm_parallel import Pipeline
from mm_parallel.fsdp import drop_gathered
from mm_train.config import Config
from mm_train.optim import EMA, AnyOptimizer, Together, parts_of
from mm_train.validate import Validation


@dataclass
class Trainee:
    """A model that is trained, with all that is its own."""

    config: Config
    """With its own `expert`."""
    objective: Objective
    model: nn.Module | Pipeline
    """Is called."""
    parameters: nn.Module
    """Holds this rank's parameters."""
    optimizer: AnyOptimizer
    average: EMA
    validation: Validation

    def __post_init__(self) -> None:
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        """The highest of each group."""

    @property
    def name(self) -> str:
        return self.config.expert or ""

    @torch.no_grad()
    def move(self, device: torch.device) -> None:
        """Parameters, moments and average; no value changes."""
        drop_gathered(self.parameters)
        self.parameters.to(device)
        for part in parts_of(self.optimizer):
            for state in part.state.values():
                for key, value in state.items():
                    # what is not fused counts its steps on the host
                    if isinstance(value, Tensor) and (key != "step" or part.defaults.get("fused")):
                        state[key] = value.to(device)
        for name, value in self.average.average.items():
            self.average.average[name] = value.to(device)


class Whole(NamedTuple):
    """All that is trained, as a checkpoint holds it: of two experts, names begin with `high.` and `low.`"""

    parameters: nn.Module
    optimizer: AnyOptimizer
    average: EMA | Averages


class Averages:
    """Of two experts."""

    def __init__(self, model: nn.Module, averages: dict[str, EMA]) -> None:
        self.model, self.averages = model, averages

    @property
    def average(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": value for name, ema in self.averages.items() for key, value in ema.average.items()}

    @contextmanager
    def apply(self) -> Iterator[None]:
        with ExitStack() as stack:
            for ema in self.averages.values():
                stack.enter_context(ema.apply())
            yield


class Turns:
    """`now` is the trainee whose turn it is, on the device."""

    def __init__(self, trainees: list[Trainee], config: Config, device: torch.device) -> None:
        self.trainees, self.seed, self.every, self.device = trainees, config.seed, config.expert_steps, device
        self.now = trainees[-1]  # was built last

    @property
    def alone(self) -> bool:
        return len(self.trainees) == 1

    @cached_property
    def whole(self) -> Whole:
        if self.alone:
            return Whole(self.now.parameters, self.now.optimizer, self.now.average)
        modules = nn.ModuleDict({one.name: one.parameters for one in self.trainees})
        optimizer = Together(*(part for one in self.trainees for part in parts_of(one.optimizer)))
        return Whole(modules, optimizer, Averages(modules, {one.name: one.average for one in self.trainees}))

    def take(self, index: int) -> Trainee:
        """The trainee of step `index` of the data, moved to the device."""
        if self.alone:
            return self.now
        return self.bring(
            self.trainees[not draw_high(self.seed, index // self.every, self.trainees[0].objective.share)]
        )

    def bring(self, trainee: Trainee) -> Trainee:
        if trainee is not self.now:
            if self.device.type != "cpu":
                self.now.move(torch.device("cpu"))  # first, or the device would have to hold both
                trainee.move(self.device)
            self.now = trainee
        return trainee

    def visit(self) -> Iterator[Trainee]:
        """All, one after the other on the device."""
        for one in self.trainees:
            yield self.bring(one)

    def sampler(self, boundary: float | None) -> nn.Module | Pipeline:
        """What makes a video: the model, or both experts."""
        return self.now.model if self.alone else _Sampler(self, boundary)


class _Sampler(Experts):
    """Brings the expert of each step."""

    def __init__(self, turns: Turns, boundary: float) -> None:
        super().__init__(*(one.model for one in turns.trainees), boundary)
        self.turns = turns

    def at(self, t: float, device: torch.device) -> nn.Module:
        return self.turns.bring(self.turns.trainees[not self.is_high(t)]).model


def draw_high(seed: int, turn: int, share: float) -> bool:
    """Whether a turn is the high-noise expert's: a function of its arguments alone. share: of all turns."""
    return uniform(seed, turn, "", "expert") < share
