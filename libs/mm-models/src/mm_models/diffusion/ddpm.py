"""DDPM, the training side: noise is added in 1000 levels, of which 0 is almost clean and 999 almost nothing but noise.

A noisy sample is sqrt(a) x0 + sqrt(1 - a) noise, where a is the product of 1 - beta up to its level. The table is that
of diffusers' `DDPMScheduler`, bit for bit in float32: with it the weights were trained, and with it they are sampled.
Ho et al. 2020, https://arxiv.org/abs/2006.11239
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mm_models.diffusion.objective import Level, squared_error

LEVELS = 1000
BETAS = (1e-4, 2e-2)
"""The first and the last; between them they rise evenly."""


@dataclass(frozen=True)
class DDPM:
    """An `mm_models.diffusion.objective.Schedule`; what Open-Sora-Plan 1.2 and Stable Diffusion are trained with."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """epsilon: the noise. v_prediction: sqrt(a) noise - sqrt(1 - a) x0."""
    snr_gamma: float | None = 5.0
    """Min-SNR: no error weighs more than if its signal-to-noise ratio were this. None or 0: all weigh alike.
    https://arxiv.org/abs/2303.09556
    """

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {self.prediction_type!r}: there are 'epsilon' and 'v_prediction'")
        if self.snr_gamma is not None and self.snr_gamma < 0:
            raise ValueError(f"snr gamma is {self.snr_gamma}, but must not be negative; 5 is usual, 0 weighs all alike")

    @cached_property
    def alphas(self) -> Tensor:
        """sqrt(a) of each level: what is left of the sample."""
        return self._products.sqrt()

    @cached_property
    def sigmas(self) -> Tensor:
        """sqrt(1 - a) of each level: how much is noise."""
        return (1 - self._products).sqrt()

    @cached_property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio of each level, from 9997.3 (0) over 8.54 (100) to 4.036e-5 (999)."""
        return (self.alphas / self.sigmas) ** 2

    @cached_property
    def weights(self) -> Tensor:
        """The weight of the error at each level: min(snr, gamma) / snr, or / (snr + 1) for v-prediction."""
        if not self.snr_gamma:
            return torch.ones(LEVELS, device="cpu")
        return self.snr.clamp(max=self.snr_gamma) / (self.snr + (self.prediction_type == "v_prediction"))

    @property
    def _products(self) -> Tensor:
        return (1 - torch.linspace(*BETAS, LEVELS, dtype=torch.float32, device="cpu")).cumprod(0)

    def draw_index(self, generator: torch.Generator) -> Tensor:
        """A level, all as likely."""
        return torch.randint(0, LEVELS, (), generator=generator)

    @property
    def share(self) -> float:
        """All levels are trained."""
        return 1.0

    def at(self, positions: int) -> "DDPM":
        """One schedule for all sizes."""
        return self

    def level(self, index: Tensor) -> Level:
        """The levels with these numbers, B; a number is also the timestep that the model is told."""
        return Level(index.float(), self.alphas[index], self.sigmas[index], self.weights[index])

    def level_at(self, t: Tensor) -> Level:
        """The levels at timesteps B, whole numbers in 0..999; every error weighs 1. ValueError for others."""
        index = t.long()
        if not (torch.equal(index.to(t), t) and ((index >= 0) & (index < LEVELS)).all()):
            raise ValueError(f"timesteps {t.tolist()}: the levels of DDPM are the whole numbers 0 to {LEVELS - 1}")
        return self.level(index)._replace(weight=torch.ones(len(index)))

    def middles(self, parts: int = 5) -> list[int]:
        """The levels in the middle of equal parts of all."""
        return [round(LEVELS * (2 * part + 1) / (2 * parts)) for part in range(parts)]

    def describe(self) -> str:
        """What is trained on, in words."""
        weighting = f"min-SNR {self.snr_gamma:g}" if self.snr_gamma else "all levels weigh the same"
        return f"DDPM, levels 0 to {LEVELS - 1}, {self.prediction_type}, {weighting}"

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """What the model should predict, B C F H W."""
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = (part.view(-1, *[1] * (x0.ndim - 1)) for part in (level.alpha, level.sigma))
        return alpha * noise - sigma * x0

    def loss(self, prediction: Tensor, target: Tensor, level: Level, mask: Tensor | None = None) -> Tensor:
        """Weighted mean squared error of each sample, in float32: B."""
        return level.weight * squared_error(prediction, target, mask)
