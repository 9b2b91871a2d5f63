"""The steps of sampling: schedulers of diffusers (`pip install mm-models[encoders]`), set up as Wan-AI and MindSpeed-MM
do.
"""

from typing import Literal

import torch

Sampler = Literal["unipc", "euler"]
Grid = Literal["guides", "diffusers"]


def scheduler(sampler: Sampler, steps: int, flow_shift: float, grid: Grid, device: torch.device | str, start: int = 0):
    """A diffusers scheduler, set to step `start`.

    Args:
        sampler: "unipc" (order 2; timesteps are truncated to whole numbers) or "euler".
        flow_shift: moves steps towards high noise; 3 for 480p and 5 for 720p are usual.
        grid: noise levels before the shift. "guides": what diffusers 0.33 to 0.36 (and so MindSpeed-MM), Wan-AI and
            DiffSynth-Studio step through. "diffusers": for unipc the grid of diffusers 0.37 and later; for euler
            that of `FlowMatchEulerDiscreteScheduler(shift=flow_shift)`, which ends at a level just above 0 before it
            ends at 0.
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
