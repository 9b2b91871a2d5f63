"""Shapes that an Open-Sora-Plan model takes."""

import torch
from torch import Tensor

from mm_models.opensoraplan.config import OpenSoraPlanConfig


def check(
    config: OpenSoraPlanConfig,
    video: Tensor,
    t: Tensor,
    text: Tensor,
    text_mask: Tensor | None = None,
    video_mask: Tensor | None = None,
) -> None:
    """Raises ValueError for a batch that does not fit the model, with the numbers and what would fit."""
    c = config
    if video.ndim != 5 or video.shape[1] != c.in_channels:
        raise ValueError(f"video has shape {tuple(video.shape)}, but this model takes B {c.in_channels} F H W, latents")
    batch, _, *size = video.shape
    if any(s % p or s == 0 for s, p in zip(size, c.patch_size, strict=True)):
        raise ValueError(
            f"latents of {size[0]} frames, {size[1]} rows and {size[2]} columns cannot be cut into patches of "
            f"{c.patch_size}: each must be a multiple (height and width of {8 * c.patch_size[1]} pixels)"
        )
    if t.shape != (batch,):
        raise ValueError(f"t has shape {tuple(t.shape)}, but must be ({batch},): a timestep for each sample")
    if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != c.text_dim or not text.shape[1]:
        raise ValueError(f"text has shape {tuple(text.shape)}, but must be {batch} S {c.text_dim}")
    if text.shape[1] > c.text_tokens:
        raise ValueError(f"text has {text.shape[1]} rows, but at most {c.text_tokens} are read: truncate it")
    _check_mask("text_mask", text_mask, (batch, text.shape[1]), "rows of text")
    _check_mask("video_mask", video_mask, (batch, *size), "latents of the video")


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], what: str) -> None:
    """Also refuses a sample of which nothing is visible: its attention would be a mean over nothing."""
    if mask is None:
        return
    if mask.shape != shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, but must be {shape}: true for {what} that are visible")
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} is {mask.dtype}, but must be torch.bool: true for {what} that are visible")
    if mask.is_meta:  # a pipeline asks for shapes
        return
    blind = (~mask.flatten(1).any(1)).nonzero().flatten().tolist()
    if blind:
        raise ValueError(
            f"{name} shows nothing of samples {blind} of {len(mask)}: leave at least one of the {what} visible, or "
            "leave the mask out"
        )
