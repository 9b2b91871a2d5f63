"""The steps of sampling: schedulers of diffusers (`pip install mm-models[encoders]`), set up as the makers of the
models and MindSpeed-MM do.
"""

import torch

from mm_models.diffusion.ddpm import BETAS, LEVELS
from mm_models.diffusion.samplers import Grid, SamplerName, check_flow_options, check_sampler, check_steps


def scheduler(
    sampler: SamplerName,
    steps: int,
    flow_shift: float | None,
    grid: Grid | None,
    device: torch.device | str,
    start: int = 0,
    prediction: str = "flow",
):
    """A diffusers scheduler, set to step `start`, for a model that predicts "flow", "epsilon" or "v_prediction".

    Only flow matching has the last three of the arguments; without a flow they are None, None and 0.

    Args:
        sampler: one of `mm_models.diffusion.samplers`. unipc is of order 2, and its timesteps are truncated to whole
            numbers; pndm begins with three Runge-Kutta steps; ddim draws nothing (eta 0).
        flow_shift: moves steps towards high noise; 3 for 480p and 5 for 720p are usual.
        grid: noise levels before the shift. "guides": what diffusers 0.33 to 0.36 (and so MindSpeed-MM), Wan-AI and
            DiffSynth-Studio step through. "diffusers": for unipc the grid of diffusers 0.37 and later; for euler
            that of `FlowMatchEulerDiscreteScheduler(shift=flow_shift)`, which ends at a level just above 0 before it
            ends at 0.
        start: steps that are left out.
    """
    check_sampler(sampler, prediction)
    check_flow_options({"flow_shift": flow_shift, "grid": grid}, prediction)
    check_steps(sampler, steps)
    if prediction == "flow":
        return _of_flow(sampler, steps, flow_shift, grid or "guides", device, start)
    if start:
        raise ValueError(f"a model that predicts {prediction} begins with noise, not with step {start} of a video")
    return _of_noise(sampler, steps, prediction)


def _of_flow(sampler: str, steps: int, flow_shift: float | None, grid: Grid, device: torch.device | str, start: int):
    if flow_shift is None or flow_shift <= 0:
        raise ValueError(f"flow shift is {flow_shift}, but must be positive; 3 (480p) and 5 (720p) are usual")
    if grid not in ("guides", "diffusers"):
        raise ValueError(f"grid {grid!r} is not known; there are 'guides' and 'diffusers'")
    if sampler == "unipc":
        from diffusers import UniPCMultistepScheduler

        schedule = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, num_train_timesteps=1000
        )
        first = 0.999
    else:
        from diffusers import FlowMatchEulerDiscreteScheduler

        schedule = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
        first = 1.0
    if grid == "guides":
        levels = torch.linspace(first, 0, steps + 1, dtype=torch.float64, device="cpu")[:-1]
        schedule.set_timesteps(sigmas=levels.numpy(), device=device)
    else:
        schedule.set_timesteps(steps, device=device)
    schedule.set_begin_index(start)
    return schedule


def _of_noise(sampler: str, steps: int, prediction: str):
    """As Open-Sora-Plan 1.2 samples: diffusers' usual settings, but that nothing is clipped, as latents go beyond 1.

    euler_ancestral steps evenly from 999 to 0, the others from 1000 - 1000 / steps to 0. Tables stay on the host.
    """
    import diffusers

    name, options = {
        "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
        "pndm": ("PNDMScheduler", {}),
        "ddim": ("DDIMScheduler", {"clip_sample": False}),
        "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    }[sampler]
    table = {"num_train_timesteps": LEVELS, "beta_start": BETAS[0], "beta_end": BETAS[1], "beta_schedule": "linear"}
    schedule = getattr(diffusers, name)(prediction_type=prediction, **table, **options)
    schedule.set_timesteps(steps)
    return schedule
