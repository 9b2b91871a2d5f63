"""A sample that nobody has made: shapes and dtypes of what features of a Wan hold."""

import torch
from torch import Tensor

from mm_models.family import ClipSize
from mm_models.wan.config import WanConfig
from mm_models.wan.tasks import HIGH_VAE_CHANNELS, stored


def example(config: WanConfig, task: str, size: ClipSize) -> dict[str, Tensor]:
    """The tensors of one sample on the meta device: latents C F H W, text S D, and the conditions of the task.

    Of VACE it has no reference images, which would stand before its latents, a latent frame each.
    """
    side = 16 if config.out_channels == HIGH_VAE_CHANNELS else 8
    grid = size.latents((4, side, side), config.patch_size)
    rows = config.text_tokens if size.text is None else size.text
    shapes = {"latents": (config.out_channels, *grid), "text": (rows, config.text_dim)}
    for name, channels in stored(config, task).items():
        shapes[name] = (channels, config.image_dim) if name == "image" else (channels, *grid)
    bytes_ = {"control_mask"}
    return {
        name: torch.empty(shape, device="meta", dtype=torch.uint8 if name in bytes_ else torch.float32)
        for name, shape in shapes.items()
    }
