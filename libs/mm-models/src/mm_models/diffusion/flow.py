"""Flow matching, the training side: which noise levels are drawn, what is predicted, how errors are weighed.

A sample moves on a straight line from clean latents x0 (sigma 0) to noise (sigma 1); the model predicts the direction
noise - x0. Noise levels are an integer index into a table of 1000 of them, from pure noise (0) to almost clean (999).
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import exp, sqrt
from typing import Literal

import torch
from torch import Tensor

from mm_models.diffusion.objective import Level, squared_error

POINTS = 1000


def expert_range(expert: Literal["high", "low"], boundary: float, shift: float) -> tuple[float, float]:
    """The part of the table that an expert is trained on: for high all levels from `boundary` on, for low the rest.

    With shift 5 and 0.875 they are (0, 0.417) and (0.417, 1), with 0.9 (0, 0.358) and (0.358, 1), as in MindSpeed-MM.
    """
    if not 0 < boundary < 1:
        raise ValueError(f"the boundary between two experts is {boundary}, but must be a noise level between 0 and 1")
    cut = int((FlowMatching(shift).sigmas >= boundary).sum()) / POINTS
    return (0.0, cut) if expert == "high" else (cut, 1.0)


@dataclass(frozen=True)
class FlowMatching:
    """The schedule that Wan is finetuned with."""

    shift: float = 5.0
    """Above 1 gives more of the table to high noise. MindSpeed-MM trains with 5, whatever it samples with."""
    range: tuple[float, float] = (0.0, 1.0)
    """Part of the table to train on, as fractions: (0, 0.417) are the noisiest levels, e.g. for a high-noise expert."""
    weighting: Literal["bsmntw", "none"] = "bsmntw"
    """bsmntw: a bell over the timestep, highest in the middle, mean 1, zero for pure noise. none: all alike."""
    sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How often the points of the table are drawn. uniform: all alike. logit_normal: as sigmoid(mean + std z) of a
    normal z falls between them, before the shift. https://arxiv.org/abs/2403.03206
    """
    logit: tuple[float, float] = (0.0, 1.0)
    """Mean and std of logit_normal. A mean above 0 gives more of the draws to high noise."""
    shift_by: Literal["fixed", "sqrt", "flux"] = "fixed"
    """fixed: one shift. sqrt: `shift` holds for `shift_tokens`, and grows with the root of a sample's tokens, as in the
    paper of Stable Diffusion 3. flux: exp of a line through 0.5 at 256 tokens and 1.15 at 4096, as FLUX was published.
    """
    shift_tokens: int | None = None
    patch: int = 1
    """Positions of the latents in a token, so that tokens can be counted."""
    expert: tuple[Literal["high", "low"], float] | None = None
    """Of two experts, which one is trained, and the noise level at which they part, so that a shift by size cuts the
    range anew.
    """

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"flow shift is {self.shift}, but must be positive; 1 shifts nothing, 5 is usual")
        low, high = self.range
        if not 0 <= low < high <= 1 or self.index_range[0] == self.index_range[1]:
            raise ValueError(
                f"the range of noise levels is {low} to {high}, but must be two rising fractions between 0 (noise) "
                f"and 1 (clean), at least {1 / POINTS} apart"
            )
        if (self.shift_tokens is None) == (self.shift_by == "sqrt"):
            raise ValueError(f"flow shift by {self.shift_by} with shift_tokens {self.shift_tokens}: sqrt, and only it")
        if not self.logit[1] > 0:
            raise ValueError(
                f"the std of logit-normal sampling is {self.logit[1]}, but must be more than 0; 1 is usual"
            )
        if self.weighting not in ("bsmntw", "none"):
            raise ValueError(f"loss weighting {self.weighting!r} is not known; there are 'bsmntw' and 'none'")

    @cached_property
    def sigmas(self) -> Tensor:
        """1000 noise levels, from 1 down to almost 0."""
        u = 1 - torch.arange(POINTS, dtype=torch.float64, device="cpu") / POINTS
        return (self.shift * u / (1 + (self.shift - 1) * u)).float()

    @cached_property
    def timesteps(self) -> Tensor:
        """What the model is told: 1000 sigma."""
        return self.sigmas * POINTS

    @cached_property
    def weights(self) -> Tensor:
        """The weight of the loss at each level; mean 1."""
        if self.weighting == "none":
            return torch.ones(POINTS, device="cpu")
        bell = torch.exp(-2 * ((self.timesteps.double() - POINTS / 2) / POINTS) ** 2)
        bell = bell - bell.min()
        return (bell * POINTS / bell.sum()).float()

    @property
    def index_range(self) -> tuple[int, int]:
        """Indices to draw from: first, and one past the last."""
        low, high = self.range
        return round(low * POINTS), round(high * POINTS)  # int() would make 289 of 0.29 · 1000

    @cached_property
    def measure(self) -> Tensor:
        """How much of all draws lies before each point of the table: 1001 rising numbers from 0 to 1, float64."""
        u = 1 - torch.arange(POINTS + 1, dtype=torch.float64, device="cpu") / POINTS
        if self.sampling == "uniform":
            return 1 - u
        mean, std = self.logit
        return 1 - torch.special.ndtr((torch.logit(u) - mean) / std)

    @property
    def share(self) -> float:
        """How much of all draws falls into the part that is trained on."""
        low, high = self.index_range
        return (self.measure[high] - self.measure[low]).item()

    def draw_index(self, generator: torch.Generator) -> Tensor:
        """A point of the part that is trained on."""
        low, high = self.index_range
        if self.sampling == "uniform":
            return torch.randint(low, high, (), generator=generator)
        first, end = self.measure[low], self.measure[high]
        at = first + (end - first) * torch.rand((), generator=generator, dtype=torch.float64)
        return (torch.searchsorted(self.measure, at, right=True) - 1).clamp(low, high - 1)

    def at(self, positions: int) -> "FlowMatching":
        """The schedule for latents of so many positions (frames x rows x columns): with the shift that they have."""
        return self if self.shift_by == "fixed" else _shifted(self, positions // self.patch)

    def level(self, index: Tensor) -> Level:
        """The levels at points of the table, B."""
        sigma = self.sigmas[index]
        return Level(self.timesteps[index], 1 - sigma, sigma, self.weights[index])

    def level_at(self, t: Tensor) -> Level:
        """The levels at timesteps B in 0..1000; every error weighs 1."""
        sigma = t / POINTS
        return Level(t, 1 - sigma, sigma, torch.ones_like(t))

    def middles(self, parts: int = 5) -> list[int]:
        """Timesteps in the middle of equal parts of what is trained."""
        first, end = self.index_range
        high = self.timesteps[first].item()
        low = self.timesteps[end].item() if end < POINTS else 0.0
        return [round(low + (high - low) * (2 * part + 1) / (2 * parts)) for part in range(parts)]

    def describe(self) -> str:
        """The part of the noise that is trained on, in words."""
        first, end = self.index_range
        mean, std = self.logit
        drawn = f", drawn logit-normal ({mean:g}, {std:g})" if self.sampling == "logit_normal" else ""
        if self.shift_by != "fixed":
            how = (
                "as FLUX"
                if self.shift_by == "flux"
                else f"{self.shift:g} at {self.shift_tokens:,} tokens, by their root"
            )
            return f"noise shifted by size ({how}){drawn}"
        low = self.sigmas[end].item() if end < POINTS else 0.0
        part = f"noise from {self.sigmas[first].item():.3f} down to {low:.3f} (points {first} to {end - 1} of {POINTS})"
        return part + drawn

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """What the model should predict, at every level."""
        return noise - x0

    def loss(self, prediction: Tensor, target: Tensor, level: Level, mask: Tensor | None = None) -> Tensor:
        """Weighted mean squared error of each sample, in float32: B. Their mean is what is trained on."""
        return level.weight * squared_error(prediction, target, mask)


@cache
def _shifted(flow: FlowMatching, tokens: int) -> FlowMatching:
    if flow.shift_by == "flux":
        shift = exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    else:
        shift = flow.shift * sqrt(tokens / flow.shift_tokens)
    part = expert_range(*flow.expert, shift) if flow.expert else flow.range
    return replace(flow, shift=shift, shift_by="fixed", shift_tokens=None, range=part)
