"""Training a diffusion model: noise a sample, and weigh how far the model's prediction is off.

Two things vary, and are handed in: the schedule (flow matching; others behind the same methods), and what the model is
told besides noise and text (`Conditioning`, one for each task of a family).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_models.objective import Generators


class Level(NamedTuple):
    """How noisy each sample of a batch is: B each."""

    t: Tensor  # what the model is told
    alpha: Tensor  # a noisy sample is alpha · sample + sigma · noise
    sigma: Tensor
    weight: Tensor  # of the loss


class Schedule(Protocol):
    """Which noise levels are drawn, how a sample is noised, what is predicted, and how an error counts."""

    def at(self, positions: int) -> "Schedule":
        """The schedule for latents of so many positions: frames x rows x columns."""

    @property
    def share(self) -> float:
        """How much of what the whole table would give falls into the part that is trained."""

    def draw_index(self, generator: torch.Generator) -> Tensor:
        """A point of the table of levels, a scalar integer."""

    def level(self, index: Tensor) -> Level:
        """The levels at points of the table, B."""

    def level_at(self, t: Tensor) -> Level:
        """The levels at timesteps B; every error weighs 1."""

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """What the model is to predict."""

    def loss(self, prediction: Tensor, target: Tensor, level: Level, mask: Tensor | None = None) -> Tensor:
        """The weighted error of each sample, a mean over its latents: B, float32.

        mask: B F H W (or B 1 F H W), bool, True for latents that count; None: all do.
        """

    def middles(self) -> Sequence[int]:
        """Timesteps at which validation measures: the middles of equal parts of what is trained."""

    def describe(self) -> str:
        """The part of the noise that is trained on, in words."""


@dataclass(frozen=True)
class Pixels:
    """What the videos of a batch are made from, B of each, in [-1, 1]. None: it is not given."""

    size: tuple[int, int, int]
    """Frames, height and width of the videos."""
    image: Tensor | None = None
    """B 3 H W: the first frame."""
    last_image: Tensor | None = None
    """B 3 H W"""
    video: Tensor | None = None
    """B 3 F H W: a source."""
    mask: Tensor | None = None
    """B 1 F H W in 0..1, 1 where the source changes."""
    references: Sequence[Sequence[Tensor]] = ()
    """Of each video, images 3 H W of what is to appear."""


class Conditioning(Protocol):
    """What a model is told besides noise and text, for one task: the same for training, validation and sampling.

    *Conditions* are named tensors; a feature cache keeps those of `stored` as they are.
    """

    task: str

    @property
    def always(self) -> Mapping[str, int]:
        """What every sample holds, whatever the task: channels of `latents`, width of `text`."""

    @property
    def text_tokens(self) -> int | None:
        """The most rows of text that the model reads; None: any number."""

    @property
    def stored(self) -> Mapping[str, int]:
        """The conditions of a sample that must be stored for training, with their channels (or rows)."""

    def encode(
        self, pixels: Pixels, encode: Callable[[Tensor], Tensor], see: Callable[[Tensor], Tensor] | None
    ) -> list[dict[str, Tensor]]:
        """The conditions of each video of a batch, without a batch dim.

        encode: pixels B 3 F H W to latents. see: images B 3 H W to the tokens of an image encoder B S D.
        """

    def find_misfit(self, names: Collection[str]) -> str:
        """Why features with conditions of these names are not for this task; empty where they are."""

    def to_store(self, latents: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of one sample: `latents`, and its conditions."""

    def complete(self, latents: Tensor, conditions: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The conditions with those that clean latents B C F H W hold themselves."""

    def hold(self, latents: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The latents with what is given in its place."""

    def inputs(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor,
        conditions: Mapping[str, Tensor],
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The model's arguments: latents B C F H W with what is held, t B, text B S D, conditions B …

        text_mask: B S, bool, True for a token; None: all are. video_mask: B F H W of the latents, bool, True for what
        is video and not padding; None: all is. ValueError for one that the model cannot use and must not ignore.
        """

    def learned(self, x: Tensor) -> Tensor:
        """The part of a prediction or a target that a loss is taken over."""

    def frames_before(self, conditions: Mapping[str, Tensor]) -> int:
        """Latent frames that stand before the video and are no part of it."""


def blend(x0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """alpha x0 + sigma noise: the noisy sample, B C F H W."""
    alpha, sigma = (part.view(-1, *[1] * (x0.ndim - 1)) for part in (level.alpha, level.sigma))
    return alpha * x0 + sigma * noise


def pad_text(text: Tensor, tokens: int) -> Tensor:
    """Text B S D with rows of zeros up to `tokens`, so that all batches have one shape.

    ValueError for more rows than that: the end of a prompt is never dropped in silence.
    """
    rows = text.shape[1]
    if rows > tokens:
        raise ValueError(
            f"a prompt was encoded to {rows} rows, but this model is made to read {tokens}: "
            f"ask for text_tokens {rows} or more, or encode the prompts again for {tokens}"
        )
    return F.pad(text, (0, 0, 0, tokens - rows))


def squared_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of the squared errors of each sample B C F H W, in float32: B.

    mask: B 1 F H W, bool, True for latents that count; a sample of which none does has no error.
    """
    error = (prediction.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)
    return (error.mean(1, keepdim=True) * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


class Drawn(NamedTuple):
    level: Level
    noise: Tensor  # B C F H W


@dataclass(frozen=True)
class Diffusion:
    """An `mm_models.objective.Objective`. A batch holds latents B C F H W, text B S D, and the conditions.

    It may hold masks as well: text_mask B S, True for a token, and video_mask B F H W of the latents, True for what is
    video and not padding. With a video mask, every latent that is video weighs the same in a step; all batches of a run
    have one then, or none has.
    """

    schedule: Schedule
    conditioning: Conditioning
    noise_offset: float = 0.0
    """In training, so much noise more that is the same in all of a channel; the target includes it."""
    task: str = field(init=False)
    host: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", self.conditioning.task)

    @property
    def stored(self) -> Mapping[str, int]:
        return {**self.conditioning.always, **self.conditioning.stored}

    @property
    def share(self) -> float:
        """How much of what the whole schedule would draw falls into the part that is trained."""
        return self.schedule.share

    @property
    def points(self) -> Sequence[int]:
        return self.schedule.middles()

    def draw(self, tensors: Mapping[str, Tensor], generators: Generators) -> Drawn:
        count = range(len(tensors["latents"]))
        schedule = self.schedule.at(tensors["latents"].shape[2:].numel())
        index = torch.stack([schedule.draw_index(generators(i, "timestep")) for i in count])
        noise = self._noise(tensors, generators)
        if self.noise_offset:
            shape = (noise.shape[1], *[1] * (noise.ndim - 2))
            offset = torch.stack([torch.randn(shape, generator=generators(i, "noise_offset")) for i in count])
            noise = noise + self.noise_offset * offset
        return Drawn(schedule.level(index), noise)

    def draw_at(self, tensors: Mapping[str, Tensor], points: Sequence[float], generators: Generators) -> Drawn:
        """points: timesteps. The noise has no offset, as in sampling: so runs with other offsets compare."""
        return Drawn(self.schedule.level_at(torch.tensor(points).float()), self._noise(tensors, generators))

    def inputs(self, tensors: Mapping[str, Tensor], drawn: Drawn) -> dict[str, Tensor]:
        clean, level, noise = _aligned(tensors, drawn)
        stored = {name: tensors[name] for name in self.conditioning.stored}
        conditions = self.conditioning.complete(clean, stored)
        noisy = self.conditioning.hold(blend(clean, noise, level), conditions)
        masks = {name: tensors[name] for name in ("text_mask", "video_mask") if name in tensors}
        return self.conditioning.inputs(noisy, level.t, tensors["text"], conditions, **masks)

    def weigh(self, tensors: Mapping[str, Tensor]) -> Tensor:
        mask = self._mask(tensors)
        return torch.ones(len(tensors["latents"])) if mask is None else mask.flatten(1).sum(1).float()

    def losses(self, output: Tensor, tensors: Mapping[str, Tensor], drawn: Drawn) -> Tensor:
        clean, level, noise = _aligned(tensors, drawn)
        learned, mask = self.conditioning.learned, self._mask(tensors)
        target = learned(self.schedule.target(clean, noise, level))
        losses = self.schedule.loss(learned(output), target, level, mask)
        return losses if mask is None else losses * mask.flatten(1).sum(1)

    def count(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        return {}

    def describe(self) -> str:
        offset = f", noise offset {self.noise_offset:g}" if self.noise_offset else ""
        return self.schedule.describe() + offset

    def _mask(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """B 1 F H W, True for latents that a loss is taken over; None: all are."""
        if "video_mask" not in tensors:
            return None
        return self.conditioning.learned(tensors["video_mask"][:, None])

    @staticmethod
    def _noise(tensors: Mapping[str, Tensor], generators: Generators) -> Tensor:
        shape = tensors["latents"].shape[1:]
        noise = [torch.randn(shape, generator=generators(i, "noise")) for i in range(len(tensors["latents"]))]
        return torch.stack(noise)


def _aligned(tensors: Mapping[str, Tensor], drawn: Drawn) -> tuple[Tensor, Level, Tensor]:
    """(clean latents in float32, level, noise) where the latents are."""
    clean = tensors["latents"].float()
    return clean, Level(*(part.to(clean.device) for part in drawn.level)), drawn.noise.to(clean.device)
