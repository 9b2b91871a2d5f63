"""From noise to latents: the one sampling loop, used for generation and for sample videos during training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_models.diffusion.experts import Experts
from mm_models.diffusion.first_block import FirstBlockCache
from mm_models.diffusion.objective import Conditioning
from mm_models.diffusion.samplers import SAMPLERS, Grid, SamplerName
from mm_models.diffusion.schedulers import scheduler
from mm_models.initial import generator

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
    prediction: str = "flow",
    sampler: SamplerName = "unipc",
    flow_shift: float | None = None,
    grid: Grid | None = None,
    seeds: Sequence[int] | None = None,
    start: int = 0,
    progress: Callable[[int, Tensor], None] | None = None,
    pair: dist.ProcessGroup | None = None,
    cache: FirstBlockCache | None = None,
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
        prediction: what the model predicts: "flow", "epsilon" or "v_prediction".
        sampler, flow_shift, grid: see `scheduler`; a flow needs flow_shift, without one neither it nor grid is given.
        seeds: of each video, for samplers that draw noise at every step: by (seed, step), on the CPU, so that a video
            does not depend on device, rank or batch.
        start: steps that are left out; `latents` are then what is there before step `start`, see `partly_noised`.
        progress: called after each step with the number of steps done and the latents. How many there will be:
            `mm_models.diffusion.samplers.count_calls`.
        pair: a group of two ranks, of which each makes one of the two passes; both return the same.
        cache: is told which pass comes next; it must be on for the models.

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
    if isinstance(model, Experts) and prediction != "flow":
        raise ValueError(f"two experts share the noise levels of a flow, and these models predict {prediction}")
    schedule = scheduler(sampler, steps, flow_shift, grid, latents.device, start, prediction)
    draws = SAMPLERS[sampler].draws
    if draws and len(seeds or ()) != len(latents):
        raise ValueError(f"sampler {sampler} draws noise at every step: give the seeds of these {len(latents)} videos")
    latents = latents.float()
    if prediction != "flow":
        latents = latents * schedule.init_noise_sigma
    training = model.training
    model.eval()  # adapters may have dropout
    try:
        for done, t in enumerate(schedule.timesteps[start:], 1):
            latents = conditioning.hold(latents, conditions)
            noisy = latents if prediction == "flow" else schedule.scale_model_input(latents, t)
            times = t.float().to(latents.device).expand(latents.shape[0])
            is_low = isinstance(model, Experts) and not model.is_high(float(t))
            expert = model.at(float(t), latents.device) if isinstance(model, Experts) else model

            def predict(text: Tensor, pass_: str, expert=expert, noisy=noisy, times=times) -> Tensor:
                if cache is not None:
                    cache.pass_ = pass_
                return expert(**conditioning.inputs(noisy, times, text, conditions), **arguments).float()

            if weights[is_low] <= 1:
                v = predict(text, "text")
            else:
                v, away = _both(predict, text, negative, pair)
                v = away + weights[is_low] * (v - away)
            drawn = {"generator": [generator(seed, f"step {done}") for seed in seeds]} if draws else {}
            latents = schedule.step(v, t, latents, return_dict=False, **drawn)[0]
            if progress is not None:
                progress(done, latents)
    finally:
        model.train(training)
    return conditioning.hold(latents, conditions)


def _both(
    predict: Callable[[Tensor, str], Tensor], text: Tensor, negative: Tensor, pair: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The predictions with the prompt and with the negative one."""
    passes = ((text, "text"), (negative, "negative"))
    if pair is None:
        return tuple(predict(*one) for one in passes)
    mine = predict(*passes[pair.rank()]).contiguous()
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
    clean: Tensor, drawn: Tensor, start: int, *, steps: int, flow_shift: float, sampler: SamplerName, grid: Grid
) -> Tensor:
    """The latents before step `start` of a video whose clean latents are known: (1 - sigma) clean + sigma drawn,
    where `drawn` is noise."""
    sigma = scheduler(sampler, steps, flow_shift, grid, clean.device).sigmas[start].to(clean)
    return (1 - sigma) * clean + sigma * drawn
