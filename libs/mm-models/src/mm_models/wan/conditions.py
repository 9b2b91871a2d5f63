"""What a Wan model is told besides noise and text, task by task: the same for training, validation and sampling.

    t2v     nothing
    i2v     condition: latents of [image, grey …]; with a CLIP branch also image, its CLIP tokens
    flf2v   condition_both: latents of [first, grey …, last]; with a CLIP branch also image, the CLIP tokens of both
    ti2v    first: latents of the image; they stand in the first latent frame, clean, at timestep 0
    v2v     nothing: sampling begins with latents of the video, see `mm_models.diffusion.sampling`
    vace    control: latents of what is kept and of what changes; control_mask: which is which

These named tensors are a sample's *conditions*; a feature cache keeps them as they are (see `stored`), `inputs` makes
arguments of the model of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from mm_models.wan.config import WanConfig

Task = Literal["t2v", "i2v", "flf2v", "ti2v", "v2v", "vace"]
TASKS: tuple[Task, ...] = get_args(Task)
CONDITION = {"i2v": "condition", "flf2v": "condition_both"}  # two names: features of one are none of the other
MASK_SIDE = 8  # pixels per latent, along which VACE's mask is folded into channels


def tasks(config: WanConfig) -> tuple[Task, ...]:
    """What a model can be asked for, the usual first."""
    if config.vace_layers:
        return ("vace",)
    if config.in_channels == config.out_channels:
        return ("t2v", "ti2v", "v2v")
    if config.image_dim is None:
        return ("i2v", "flf2v")
    return ("flf2v",) if config.image_tokens > 257 else ("i2v",)


def stored(config: WanConfig, task: Task) -> dict[str, int]:
    """The conditions of a sample that a feature cache has to hold for training, with their channels (or rows).

    Nothing for ti2v: its condition is the first latent frame of the sample itself, as the VAE is causal.
    """
    if task == "vace":
        return {"control": 2 * config.out_channels, "control_mask": MASK_SIDE**2}
    if task in ("i2v", "flf2v"):
        image = {"image": config.image_tokens} if config.image_dim else {}
        return {CONDITION[task]: config.out_channels} | image
    return {}


def inputs(
    config: WanConfig, task: Task, latents: Tensor, t: Tensor, text: Tensor, conditions: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The model's arguments, by name.

    Args:
        latents: B C F H W, noisy. For ti2v with a clean first frame, see `hold`.
        t: B, in 0..1000.
        conditions: batched: condition or condition_both B C F H W, image B S D, control B 2C F H W, control_mask
            B 64 F H W (numbers in 0..1, or bytes in 0..255), first B C 1 H W.
    """
    given = {"video": latents, "t": t, "text": text}
    if task in ("i2v", "flf2v"):
        mask = keep_mask(latents, last=task == "flf2v")
        given["video"] = torch.cat((latents, mask, conditions[CONDITION[task]].to(latents)), dim=1)
        if config.image_dim is not None:
            given["image"] = conditions["image"]
    elif task == "ti2v":
        given["t"] = first_frame_at_zero(t, latents.shape[2:], config.patch_size)
    elif task == "vace":
        mask = conditions["control_mask"]
        mask = mask / 255 if mask.dtype == torch.uint8 else mask
        given["control"] = torch.cat((conditions["control"].to(latents), mask.to(latents)), dim=1)
    return given


def hold(task: Task, latents: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The latents with what is given in its place: for ti2v the clean first frame, else as they are."""
    if task != "ti2v":
        return latents
    return torch.cat((conditions["first"].to(latents), latents[:, :, 1:]), dim=2)


def learned_frames(task: Task) -> slice:
    """The latent frames that a loss is taken over: for ti2v not the first, which is given and not predicted.

    (As DiffSynth does now. MindSpeed-MM 2.3 counts it with target 0, DiffSynth at the guides' commit noises it.)
    """
    return slice(1, None) if task == "ti2v" else slice(None)


def keep_mask(latents: Tensor, last: bool = False) -> Tensor:
    """B 4 F H W, one where pixels are given: the first frame, and the last for flf2v.

    By pixel frames, four per latent frame; the first stands for the four of the first latent frame.
    """
    mask = latents.new_zeros((latents.shape[0], 4, *latents.shape[2:]))
    mask[:, :, 0] = 1
    if last:
        mask[:, 3, -1] = 1
    return mask


def first_frame_at_zero(t: Tensor, size: Sequence[int], patch: Sequence[int]) -> Tensor:
    """t B -> B L: 0 for the tokens of the first latent frame. `size` F H W of the latents."""
    frames, rows, columns = (n // p for n, p in zip(size, patch, strict=True))
    per_token = t[:, None].repeat(1, frames * rows * columns)
    per_token[:, : rows * columns] = 0
    return per_token


def condition_video(frames: int, first: Tensor, last: Tensor | None = None) -> Tensor:
    """What i2v and flf2v have encoded: B 3 F H W in [-1, 1], grey (0) but for the first frame, and the last if given.

    first, last: B 3 H W.
    """
    video = first.new_zeros((*first.shape[:2], frames, *first.shape[2:]))
    video[:, :, 0] = first
    if last is not None:
        video[:, :, -1] = last
    return video


def parted(video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(what is kept, what changes) of a control video B 3 F H W in [-1, 1], for VACE: grey where it is the other's.

    mask: B 1 F H W in 0..1; above a half, pixels change.
    """
    changes = (mask > 0.5).to(video)
    return video * (1 - changes), video * changes


def fold_mask(mask: Tensor, frames: int) -> Tensor:
    """VACE's mask by latents: B 1 F H W -> B 64 F' H/8 W/8 (channel = 8 · row + column of the pixel in its square).

    `frames` is F'. A latent frame takes the pixel frame nearest to its middle, not the group of four that the VAE packs
    into it: so the released weights were trained.
    """
    folded = rearrange(mask, "b 1 f (h p) (w q) -> b (p q) f h w", p=MASK_SIDE, q=MASK_SIDE)
    chosen = [(2 * k + 1) * mask.shape[2] // (2 * frames) for k in range(frames)]
    return folded[:, :, chosen]


def encoded_control(encode: Callable[[Tensor], Tensor], source: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """VACE's (control B 2C F' h w, control_mask B 64 F' h w) of a source B 3 F H W and a mask B 1 F H W in 0..1.

    encode: pixels to latents, as `VideoVAE.encode`. The mask halves the videos at 0.5, but is folded as it is: so VACE
    was trained.
    """
    control = torch.cat([encode(part) for part in parted(source, mask)], dim=1)
    return control, fold_mask(mask, control.shape[2]).to(control)


def references_in(control: Tensor) -> int:
    """How many reference frames stand before a control (… 2C F H W): those in which nothing changes, exactly."""
    frames = control.narrow(-4, control.shape[-4] // 2, control.shape[-4] // 2).movedim(-3, 0).flatten(1)
    return int(frames.eq(0).all(1).cumprod(0).sum())


def with_references(control: Tensor, control_mask: Tensor, references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """VACE's control with reference images before it, one latent frame each, in the order given.

    control B 2C F H W; control_mask B 64 F H W; references B C 1 H W each. A reference is kept (its latents stand in
    the first half of the channels), and nothing of it changes (mask 0).
    """
    if not references:
        return control, control_mask
    before = torch.cat(list(references), dim=2)
    kept = torch.cat((before, torch.zeros_like(before)), dim=1)
    empty = control_mask.new_zeros((*control_mask.shape[:2], len(references), *control_mask.shape[3:]))
    return torch.cat((kept, control), dim=2), torch.cat((empty, control_mask), dim=2)
