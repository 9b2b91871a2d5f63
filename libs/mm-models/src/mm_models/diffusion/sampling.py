"""From noise to latents: the one sampling loop, used for generation and for sample videos during training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_models.diffusion.experts import Experts
from mm_models.diffusion.objective import Conditioning
from mm_models.diffusion.schedulers import Grid, Sampler, scheduler

Guidance = float | tuple[float, float]
"""One number, or of two experts that of the high-noise one and that of the low-noise one."""


def noise(seed: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The noise of one video, C F H W in float32: a function of the seed alone, not of device, rank or batch."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(device)


@torch.no_grad()
def denoise(
    model: nn.Module | Experts,
    latents: Tensor,
    text: Tensor,
    negative: Tensor | None = None,
    *,
    conditioning: Conditioning,
    conditions: Mapping[str, Tensor] = {},
    arguments: Mapping[str, Any] = {},
    steps: int,
    guidance: Guidance,
    flow_shift: float,
    sampler: Sampler = "unipc",
    grid: Grid = "guides",
    start: int = 0,
    progress: Callable[[int, Tensor], None] | None = None,
    pair: dist.ProcessGroup | None = None,
) -> Tensor:
    """Turns noise into latents.

    Args:
        model: a model, what calls one under parallel training (`mm_parallel.Pipeline`), or two of them (`Experts`).
        latents: B C F H W, noise; see `noise`. F counts the frames that stand before the video (`frames_before`).
        text, negative: B S D, encoded prompts and what to move away from (usually the encoding of ""); without guidance
            `negative` may be None. Everything else is the same in both passes.
        conditioning, conditions: what the video is made from; conditions are batched, on the device of the latents.
        arguments: of the model, as they are, e.g. the strength of a control.
        guidance: v = v_negative + guidance · (v_text - v_negative), in two passes; 1 or less asks for one pass only.
        flow_shift, sampler, grid: see `scheduler`.
        start: steps that are left out; `latents` are then what is there before step `start`, see `partly_noised`.
        progress: called after each step with the number of steps done and the latents.
        pair: a group of two ranks, of which each makes one of the two passes; both return the same.

    Returns:
        latents, as large as given, in float32. Frames before the video still stand in front.
    """
    weights = guidance if isinstance(guidance, tuple | list) else (guidance, guidance)
    if len(weights) != 2 or (weights[0] != weights[1] and not isinstance(model, Experts)):
        raise ValueError(f"guidance {guidance}: give one number, or for two experts that of high and that of low noise")
    if max(weights) > 1 and negative is None:
        raise ValueError(
            f"guidance {guidance} needs the encoding of a negative prompt (that of '' will do); 1 needs none"
        )
    schedule = scheduler(sampler, steps, flow_shift, grid, latents.device, start)
    latents = latents.float()
    training = model.training
    model.eval()  # adapters may have dropout
    try:
        for done, t in enumerate(schedule.timesteps[start:], 1):
            latents = conditioning.hold(latents, conditions)
            times = t.float().expand(latents.shape[0])
            is_low = isinstance(model, Experts) and not model.is_high(float(t))
            expert = model.at(float(t), latents.device) if isinstance(model, Experts) else model

            def velocity(text: Tensor, expert=expert, latents=latents, times=times) -> Tensor:
                return expert(**conditioning.inputs(latents, times, text, conditions), **arguments).float()

            if weights[is_low] <= 1:
                v = velocity(text)
            else:
                v, away = _both(velocity, text, negative, pair)
                v = away + weights[is_low] * (v - away)
            latents = schedule.step(v, t, latents, return_dict=False)[0]
            if progress is not None:
                progress(done, latents)
    finally:
        model.train(training)
    return conditioning.hold(latents, conditions)


def _both(
    velocity: Callable[[Tensor], Tensor], text: Tensor, negative: Tensor, pair: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The velocities with the prompt and with the negative one."""
    if pair is None:
        return velocity(text), velocity(negative)
    mine = velocity((text, negative)[pair.rank()]).contiguous()
    both = torch.empty_like(mine), torch.empty_like(mine)
    dist.all_gather(list(both), mine, group=pair)
    return both


def first_step(steps: int, strength: float) -> int:
    """The step at which video-to-video begins: it makes the last int(steps · strength) of them, as in diffusers."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength}: must be more than 0, and at most 1 (nothing of the video is left)")
    kept = min(int(steps * strength), steps)
    if kept == 0:
        raise ValueError(f"strength {strength} of {steps} steps is less than one step: nothing would be changed")
    return steps - kept


def partly_noised(
    clean: Tensor, drawn: Tensor, start: int, *, steps: int, flow_shift: float, sampler: Sampler, grid: Grid
) -> Tensor:
    """The latents before step `start` of a video whose clean latents are known: (1 - sigma) clean + sigma drawn,
    where `drawn` is noise."""
    sigma = scheduler(sampler, steps, flow_shift, grid, clean.device).sigmas[start].to(clean)
    return (1 - sigma) * clean + sigma * drawn
