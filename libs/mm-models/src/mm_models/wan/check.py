"""Shapes that a Wan model takes."""

from collections.abc import Sequence

from torch import Tensor

from mm_models.wan.config import WanConfig


def check(
    config: WanConfig,
    video: Tensor,
    t: Tensor,
    text: Tensor,
    image: Tensor | None,
    control: Tensor | None = None,
    control_scale: float | Sequence[float] = 1.0,
) -> None:
    """Raises ValueError for a batch that does not fit the model, with the numbers and what would fit."""
    c = config
    if video.ndim != 5 or video.shape[1] != c.in_channels:
        raise ValueError(
            f"video has shape {tuple(video.shape)}, but this model takes B {c.in_channels} F H W"
            + (
                ": noisy latents with the channels of the condition behind them"
                if c.in_channels != c.out_channels
                else ""
            )
        )
    batch, _, *size = video.shape
    if any(s % p or s == 0 for s, p in zip(size, c.patch_size, strict=True)):
        raise ValueError(
            f"latents of {size[0]} frames, {size[1]} rows and {size[2]} columns cannot be cut into patches of "
            f"{c.patch_size}: each must be a multiple (height and width of 16 pixels, with the Wan2.2 VAE of 32)"
        )
    tokens = size[0] * size[1] * size[2] // (c.patch_size[0] * c.patch_size[1] * c.patch_size[2])
    if t.shape not in ((batch,), (batch, tokens)):
        raise ValueError(
            f"t has shape {tuple(t.shape)}, but must be ({batch},), or ({batch}, {tokens}) for one per token"
        )
    if t.ndim == 2 and not t.is_meta and not ((t == t.amin(1, True)) | (t == t.amax(1, True))).all():
        most = max(len(row.unique()) for row in t)
        raise ValueError(
            f"t has {most} different timesteps in one sample; its tokens may have two: that of what is clean (a first "
            "frame) and that of what is noisy"
        )
    if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != c.text_dim:
        raise ValueError(f"text has shape {tuple(text.shape)}, but must be {batch} S {c.text_dim}")
    if text.shape[1] > c.text_tokens:
        raise ValueError(f"text has {text.shape[1]} rows, but at most {c.text_tokens} are read: truncate it")
    if image is None and c.image_dim is not None:
        raise ValueError(f"this model needs image, the CLIP features {batch} {c.image_tokens} {c.image_dim}")
    if image is not None and c.image_dim is None:
        raise ValueError("image was given, but this model has no CLIP branch (image_dim is None): leave it out")
    if image is not None and image.shape != (batch, c.image_tokens, c.image_dim):
        raise ValueError(f"image has shape {tuple(image.shape)}, but must be {batch} {c.image_tokens} {c.image_dim}")
    if control is None and c.vace_layers:
        raise ValueError(
            f"this model needs control, {batch} {c.control_channels} {' '.join(map(str, size))}: latents of what is "
            "kept and of what changes, and the mask"
        )
    if control is not None and not c.vace_layers:
        raise ValueError("control was given, but this model has no control ladder (vace_layers is empty): leave it out")
    if control is not None and control.shape != (batch, c.control_channels, *size):
        wanted = (batch, c.control_channels, *size)
        raise ValueError(f"control has shape {tuple(control.shape)}, but must be {wanted}, as large as the video")
    if not isinstance(control_scale, int | float) and len(control_scale) != len(c.vace_layers):
        raise ValueError(
            f"control_scale has {len(control_scale)} numbers: give one, or one for each of the {len(c.vace_layers)} "
            "control blocks"
        )
