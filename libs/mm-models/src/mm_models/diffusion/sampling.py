"""From noise to latents: the one sampling loop, used for generation and for sample videos during training.

The schedulers are those of diffusers (`pip install mm-models[encoders]`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_models.diffusion.experts import Experts as Experts
from mm_models.wan import WanConfig
from mm_models.wan.conditions import Task, hold, inputs

Sampler = Literal["unipc", "euler"]
Grid = Literal["guides", "diffusers"]
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
    config: WanConfig,
    task: Task = "t2v",
    conditions: Mapping[str, Tensor] = {},
    control_scale: float | Sequence[float] = 1.0,
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
        model: a Wan model, what calls one under parallel training (`mm_parallel.Pipeline`), or two of them (`Experts`).
        latents: B C F H W, noise; see `noise`. For VACE with references, F counts a frame for each of them, in front.
        text, negative: B S D, encoded prompts and what to move away from (usually the encoding of ""); without guidance
            `negative` may be None. Everything else is the same in both passes.
        config: of the model.
        task, conditions: what the video is made from, see `mm_models.wan.conditions`; on the device of the latents.
        control_scale: strength of VACE's control, one for all or one for each control block.
        guidance: v = v_negative + guidance · (v_text - v_negative), in two passes; 1 or less asks for one pass only.
        flow_shift, sampler, grid: see `scheduler`.
        start: steps that are left out; `latents` are then what is there before step `start`, see `partly_noised`.
        progress: called after each step with the number of steps done and the latents.
        pair: a group of two ranks, of which each makes one of the two passes; both return the same.

    Returns:
        latents, as large as given, in float32. VACE's reference frames still stand in front.
    """
    weights = guidance if isinstance(guidance, tuple | list) else (guidance, guidance)
    if len(weights) != 2 or (weights[0] != weights[1] and not isinstance(model, Experts)):
        raise ValueError(f"guidance {guidance}: give one number, or for two experts that of high and that of low noise")
    if max(weights) > 1 and negative is None:
        raise ValueError(
            f"guidance {guidance} needs the encoding of a negative prompt (that of '' will do); 1 needs none"
        )
    schedule = scheduler(sampler, steps, flow_shift, grid, latents.device, start)
    scale = {"control_scale": control_scale} if task == "vace" else {}
    latents = latents.float()
    training = model.training
    model.eval()  # adapters may have dropout
    try:
        for done, t in enumerate(schedule.timesteps[start:], 1):
            latents = hold(task, latents, conditions)
            times = t.float().expand(latents.shape[0])
            is_low = isinstance(model, Experts) and not model.is_high(float(t))
            expert = model.at(float(t), latents.device) if isinstance(model, Experts) else model

            def velocity(text: Tensor, expert=expert, latents=latents, times=times) -> Tensor:
                return expert(**inputs(config, task, latents, times, text, conditions), **scale).float()

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
    return hold(task, latents, conditions)


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


def scheduler(sampler: Sampler, steps: int, flow_shift: float, grid: Grid, device: torch.device | str, start: int = 0):
    """A diffusers scheduler, set to step `start`.

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
    schedule.set_begin_index(start)
    return schedule
