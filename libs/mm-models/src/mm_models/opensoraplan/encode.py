"""What an Open-Sora-Plan model is told besides noise and text: for training, validation and sampling alike.

t2v     nothing but which rows of the text are no padding, and which latents
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_models.diffusion.ddpm import DDPM
from mm_models.diffusion.objective import Diffusion, Pixels, pad_text
from mm_models.encoders.text import TextEncoder
from mm_models.opensoraplan.captions import clean
from mm_models.opensoraplan.config import OpenSoraPlanConfig


class Conditioning:
    """An `mm_models.diffusion.objective.Conditioning`: there are no conditions, and text has a mask."""

    stored: Mapping[str, int] = {}

    def __init__(self, config: OpenSoraPlanConfig, task: str) -> None:
        self.config, self.task = config, task
        self.always = {"latents": config.out_channels, "text": config.text_dim}
        self.text_tokens = config.text_tokens

    def encode(
        self, pixels: Pixels, encode: Callable[[Tensor], Tensor], see: Callable[[Tensor], Tensor] | None = None
    ) -> list[dict[str, Tensor]]:
        """Nothing, for each video."""
        return [{}]

    def find_misfit(self, names: Collection[str]) -> str:
        """Why features with conditions of these names are not for this task; empty where they are."""
        return f"holds {', '.join(sorted(names))}, and {self.task} takes no condition" if names else ""

    def to_store(self, latents: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": latents, **conditions}

    def complete(self, latents: Tensor, conditions: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return conditions

    def hold(self, latents: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        return latents

    def inputs(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor,
        conditions: Mapping[str, Tensor],
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The model's arguments, by name.

        Args:
            latents: B C F H W, noisy.
            t: B, in 0..999.
            text: B S D with S <= `config.text_tokens`, to which it is padded, so that all batches have one shape.
            text_mask: B S bool. None: all S rows are text, and what is added is padding.
            video_mask: B F H W bool, if some latents are padding. Where none is, leave it out: masked attention of
                videos is slower.
        """
        padded = pad_text(text, self.config.text_tokens)
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        given = {
            "video": latents,
            "t": t,
            "text": padded,
            "text_mask": F.pad(text_mask, (0, padded.shape[1] - text.shape[1])),
        }
        return given if video_mask is None else given | {"video_mask": video_mask}

    def learned(self, x: Tensor) -> Tensor:
        return x

    def frames_before(self, conditions: Mapping[str, Tensor]) -> int:
        return 0


def text_encoder(config: OpenSoraPlanConfig, path: Path, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
    """mT5, for as many rows as the model reads, of prompts in the form of the captions of training."""
    return TextEncoder(path, device, dtype, config.text_tokens, kind="mt5", cleaner=clean)


def objective(
    config: OpenSoraPlanConfig,
    task: str,
    *,
    expert: str | None = None,
    boundary: float | None = None,
    snr_gamma: float | None,
    noise_offset: float,
) -> Diffusion:
    """DDPM for a task. There are no two experts. snr_gamma: see `DDPM`; noise_offset: see `Diffusion`."""
    schedule = DDPM(config.prediction_type, snr_gamma)
    return Diffusion(schedule, Conditioning(config, task), noise_offset)
