"""The sampling loop: its grids, and the same latents as diffusers' schedulers and its whole pipeline give."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import nn

from mm_models.diffusion.sampling import denoise, noise, scheduler


class Toy(nn.Module):
    """A velocity that depends on everything it is given, smoothly."""

    def forward(self, latents, t, text):
        assert t.shape == (latents.shape[0],)
        assert t.dtype == torch.float32
        return latents * torch.sin(t / 300).view(-1, 1, 1, 1, 1) + text.mean((1, 2)).view(-1, 1, 1, 1, 1)


def test_grids():
    unipc = scheduler("unipc", 4, 3.0, "guides", "cpu")
    assert unipc.timesteps.tolist() == [999, 899, 749, 499]
    assert scheduler("unipc", 4, 3.0, "diffusers", "cpu").timesteps.tolist() == [999, 900, 750, 500]
    assert scheduler("unipc", 50, 3.0, "guides", "cpu").timesteps[:3].tolist() == [999, 992, 985]
    assert scheduler("unipc", 50, 3.0, "diffusers", "cpu").timesteps[:3].tolist() == [999, 993, 986]
    euler = scheduler("euler", 4, 5.0, "guides", "cpu").sigmas.tolist()
    assert euler == pytest.approx([1, 0.9375, 0.8333, 0.625, 0], abs=1e-4)
    u = np.linspace(0.999, 0, 5)
    assert unipc.sigmas.tolist() == pytest.approx(list(3 * u / (1 + 2 * u)), abs=1e-6)


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
@pytest.mark.parametrize("grid", ["guides", "diffusers"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_loop_is_that_of_the_schedulers(sampler, grid, guidance):
    model, x = Toy(), noise(3, (2, 16, 2, 4, 4))
    text, negative = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    seen = []
    out = denoise(
        model,
        x,
        text,
        negative,
        steps=6,
        guidance=guidance,
        flow_shift=3.0,
        sampler=sampler,
        grid=grid,
        progress=lambda step, latents: seen.append(step),
    )

    if sampler == "unipc":
        steps = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        first = 0.999
    else:
        steps, first = FlowMatchEulerDiscreteScheduler(shift=3.0), 1.0
    if grid == "guides":
        steps.set_timesteps(sigmas=np.linspace(first, 0, 7)[:-1])
    else:
        steps.set_timesteps(6)
    for t in steps.timesteps:
        times = torch.stack([t, t]).float()
        velocity = model(x, times, text)
        if guidance > 1:
            away = model(x, times, negative)
            velocity = away + guidance * (velocity - away)
        x = steps.step(velocity, t, x).prev_sample
    assert torch.allclose(out, x, rtol=1e-6, atol=1e-6)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_straight_flow_arrives():
    """With the true velocity of one sample, every sampler ends at it."""
    x0, start = torch.randn(1, 16, 2, 4, 4), noise(0, (16, 2, 4, 4))[None]

    class Straight(nn.Module):
        def forward(self, latents, t, text):
            return start - x0

    for sampler in ("unipc", "euler"):
        out = denoise(Straight(), start, torch.zeros(1, 1, 8), steps=5, guidance=1, flow_shift=5, sampler=sampler)
        # UniPC's first level is 0.9998, so it starts that far from where it believes to be.
        assert (out - x0).abs().max() < 5e-3


def test_noise_depends_on_the_seed_only():
    assert torch.equal(noise(1, (2, 3)), noise(1, (2, 3)))
    assert not torch.equal(noise(1, (2, 3)), noise(2, (2, 3)))


def test_dropout_is_off_and_comes_back():
    class Trained(Toy):
        def forward(self, latents, t, text):
            assert not self.training
            return super().forward(latents, t, text)

    model = Trained().train()
    denoise(model, torch.zeros(1, 16, 1, 2, 2), torch.zeros(1, 1, 8), steps=2, guidance=1, flow_shift=5)
    assert model.training


def test_mistakes_are_named():
    x, text = torch.zeros(1, 16, 1, 2, 2), torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="guidance 5 needs the encoding of a negative prompt"):
        denoise(Toy(), x, text, steps=2, guidance=5, flow_shift=3)
    for options, message in (
        ({"steps": 0}, "steps is 0"),
        ({"flow_shift": 0}, "flow shift is 0"),
        ({"sampler": "ddim"}, "'ddim' is not known"),
        ({"grid": "linear"}, "'linear' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            denoise(Toy(), x, text, **{"steps": 2, "guidance": 1, "flow_shift": 3} | options)
