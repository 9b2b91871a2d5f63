"""A sample that nobody has made: shapes and dtypes of what features of an Open-Sora-Plan hold."""

import torch
from torch import Tensor

from mm_models.family import ClipSize
from mm_models.opensoraplan.config import OpenSoraPlanConfig
from mm_models.opensoraplan.vae_config import STRIDE


def example(config: OpenSoraPlanConfig, task: str, size: ClipSize) -> dict[str, Tensor]:
    """The tensors of one sample on the meta device: latents C F H W and text S D."""
    grid = size.latents(STRIDE, config.patch_size)
    rows = config.text_tokens if size.text is None else size.text
    shapes = {"latents": (config.out_channels, *grid), "text": (rows, config.text_dim)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
