"""From noise to latents: the one sampling loop, used for generation and for sample videos during training.

The schedulers are those of diffusers (`pip install mm-models[encoders]`).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Sampler = Literal["unipc", "euler"]
Grid = Literal["guides", "diffusers"]


def noise(seed: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The noise of one video, C F H W in float32: a function of the seed alone, not of device, rank or batch."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(device)


@torch.no_grad()
def denoise(
    model: nn.Module,
    latents: Tensor,
    text: Tensor,
    negative: Tensor | None = None,
    *,
    steps: int,
    guidance: float,
    flow_shift: float,
    sampler: Sampler = "unipc",
    grid: Grid = "guides",
    progress: Callable[[int, Tensor], None] | None = None,
    pair: dist.ProcessGroup | None = None,
) -> Tensor:
    """Turns noise into latents with `model(latents, t, text)`.

    Args:
        latents: B C F H W, noise; see `noise`.
        text, negative: B S D, encoded prompts and what to move away from (usually the encoding of ""); without guidance
            `negative` may be None.
        guidance: v = v_negative + guidance · (v_text - v_negative), in two passes; 1 or less asks for one pass only.
        flow_shift, sampler, grid: see `scheduler`.
        progress: called after each step with the number of steps done and the latents.
        pair: a group of two ranks, of which each makes one of the two passes; both return the same.

    Returns:
        latents, B C F H W, in float32.
    """
    if guidance > 1 and negative is None:
        raise ValueError(
            f"guidance {guidance} needs the encoding of a negative prompt (that of '' will do); 1 needs none"
        )
    schedule = scheduler(sampler, steps, flow_shift, grid, latents.device)
    latents = latents.float()
    training = model.training
    model.eval()  # adapters may have dropout
    try:
        for step, t in enumerate(schedule.timesteps):
            times = t.float().expand(latents.shape[0])
            if guidance <= 1:
                velocity = model(latents, times, text).float()
            else:
                velocity, away = _both(model, latents, times, text, negative, pair)
                velocity = away + guidance * (velocity - away)
            latents = schedule.step(velocity, t, latents, return_dict=False)[0]
            if progress is not None:
                progress(step + 1, latents)
    finally:
        model.train(training)
    return latents


def _both(
    model: nn.Module, latents: Tensor, times: Tensor, text: Tensor, negative: Tensor, pair: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The velocities with the prompt and with the negative one."""
    if pair is None:
        return model(latents, times, text).float(), model(latents, times, negative).float()
    mine = model(latents, times, (text, negative)[pair.rank()]).float().contiguous()
    both = torch.empty_like(mine), torch.empty_like(mine)
    dist.all_gather(list(both), mine, group=pair)
    return both


def scheduler(sampler: Sampler, steps: int, flow_shift: float, grid: Grid, device: torch.device | str):
    """A diffusers scheduler, set to its first step.

    Args:
        sampler: "unipc" (order 2; timesteps are truncated to whole numbers) or "euler".
        flow_shift: moves steps towards high noise; 3 for 480p and 5 for 720p are usual.
        grid: noise levels before the shift. "guides": what the guides' versions of diffusers (0.33 to 0.36), Wan-AI and
            DiffSynth-Studio step through. "diffusers": the grid of diffusers 0.37 and later.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, but must be at least 1")
    if flow_shift <= 0:
        raise ValueError(f"flow shift is {flow_shift}, but must be positive; 3 (480p) and 5 (720p) are usual")
    if grid not in ("guides", "diffusers"):
        raise ValueError(f"grid {grid!r} is not known; there are 'guides' and 'diffusers'")
    if sampler == "unipc":
        from diffusers import UniPCMultistepScheduler

        schedule = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, num_train_timesteps=1000
        )
        first = 0.999
    elif sampler == "euler":
        from diffusers import FlowMatchEulerDiscreteScheduler

        schedule = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
        first = 1.0
    else:
        raise ValueError(f"sampler {sampler!r} is not known; there are 'unipc' and 'euler'")
    if grid == "guides":
        levels = torch.linspace(first, 0, steps + 1, dtype=torch.float64, device="cpu")[:-1]
        schedule.set_timesteps(sigmas=levels.numpy(), device=device)
    else:
        schedule.set_timesteps(steps, device=device)
    schedule.set_begin_index(0)
    return schedule
