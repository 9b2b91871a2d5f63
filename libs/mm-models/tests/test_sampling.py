"""The sampling loop: its grids, and the same latents as diffusers' schedulers give; what each task adds to it.

Whole pipelines of diffusers are compared in mm_infer.
"""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import nn

from mm_models.diffusion.experts import Experts
from mm_models.diffusion.sampling import denoise, first_step, noise, partly_noised
from mm_models.diffusion.schedulers import scheduler
from mm_models.wan import WanConfig
from mm_models.wan.encode import Conditioning

CONFIG = WanConfig(dim=24, num_heads=2, ffn_dim=32, num_layers=1, text_dim=8, text_tokens=5)
T2V = Conditioning(CONFIG, "t2v")
QUICK = {"conditioning": T2V, "steps": 4, "guidance": 1, "flow_shift": 3}


class Toy(nn.Module):
    """A velocity that depends on everything it is given, smoothly."""

    def forward(self, video, t, text):
        assert t.shape == (video.shape[0],)
        assert t.dtype == torch.float32
        return video * torch.sin(t / 300).view(-1, 1, 1, 1, 1) + text.mean((1, 2)).view(-1, 1, 1, 1, 1)


class Constant(nn.Module):
    """One velocity for all; it counts its calls."""

    def __init__(self, velocity: float) -> None:
        super().__init__()
        self.velocity = nn.Parameter(torch.tensor(velocity))
        self.seen: list[float] = []

    def forward(self, video, t, text):
        self.seen.append(float(t))
        return self.velocity.expand_as(video)


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


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_eulers_levels_are_those_of_diffusers(shift, steps):
    """Also the last one before 0, of which diffusers shifts the end of its training schedule a second time."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    ours = scheduler("euler", steps, shift, "diffusers", "cpu")
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    end = shift * 0.001 / (1 + (shift - 1) * 0.001)
    levels = np.linspace(1, end, steps)
    expected = [*(shift * levels / (1 + (shift - 1) * levels)), 0]
    assert ours.sigmas.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
@pytest.mark.parametrize("grid", ["guides", "diffusers"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("start", [0, 2])
def test_loop_is_that_of_the_schedulers(sampler, grid, guidance, start):
    model, x = Toy(), noise(3, (2, 16, 2, 4, 4))
    text, negative = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    seen = []
    schedule = {"steps": 6, "flow_shift": 3.0, "sampler": sampler, "grid": grid}
    given = partly_noised(x / 2, x, start, **schedule) if start else x
    out = denoise(
        model,
        given,
        text,
        negative,
        conditioning=T2V,
        guidance=guidance,
        start=start,
        progress=lambda step, latents: seen.append(step),
        **schedule,
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
    if start:
        x = (1 - steps.sigmas[start]) * x / 2 + steps.sigmas[start] * x
    for t in steps.timesteps[start:]:
        times = torch.stack([t, t]).float()
        velocity = model(x, times, text)
        if guidance > 1:
            away = model(x, times, negative)
            velocity = away + guidance * (velocity - away)
        x = steps.step(velocity, t, x).prev_sample
    assert torch.allclose(out, x, rtol=1e-6, atol=1e-6)
    assert seen == list(range(1, 7 - start))


def test_straight_flow_arrives():
    """With the true velocity of one sample, every sampler ends at it."""
    x0, start = torch.randn(1, 16, 2, 4, 4), noise(0, (16, 2, 4, 4))[None]

    class Straight(nn.Module):
        def forward(self, video, t, text):
            return start - x0

    for sampler in ("unipc", "euler"):
        out = denoise(Straight(), start, torch.zeros(1, 1, 8), **QUICK, sampler=sampler)
        # UniPC's first level is 0.9998, so it starts that far from where it believes to be.
        assert (out - x0).abs().max() < 5e-3


def test_noise_depends_on_the_seed_only():
    assert torch.equal(noise(1, (2, 3)), noise(1, (2, 3)))
    assert not torch.equal(noise(1, (2, 3)), noise(2, (2, 3)))


@pytest.mark.parametrize(("steps", "strength", "first"), [(50, 0.7, 15), (50, 0.58, 22), (4, 1, 0), (10, 0.19, 9)])
def test_strength_keeps_the_last_steps_as_diffusers_does(steps, strength, first):
    assert first_step(steps, strength) == first  # 50 · 0.58 is 28.999…: 28 steps


def test_experts_switch_once_each_with_its_guidance():
    high, low = Constant(1.0), Constant(-2.0)
    zeros, text = torch.zeros(1, 16, 1, 2, 2), torch.zeros(1, 1, 8)
    options = {**QUICK, "guidance": (4.0, 1.0), "steps": 8}
    out = denoise(Experts(high, low, 0.75), zeros, text, text, **options, sampler="euler")
    levels = [float(t) for t in scheduler("euler", 8, 3, "guides", "cpu").timesteps]
    assert high.seen == [t for t in levels if t >= 750 for _ in range(2)]
    assert low.seen == [t for t in levels if t < 750]
    assert 750 in high.seen  # the boundary itself is the high-noise expert's
    below = max(low.seen) / 1000
    assert torch.allclose(out, torch.full_like(out, -(1 - below) - below * -2.0), atol=1e-5)


@pytest.mark.parametrize("t", [900, 100])
def test_only_the_working_expert_is_on_the_device(t):
    meta = torch.device("meta")  # the one device besides the CPU that every machine has
    pair = Experts(nn.Linear(1, 1), nn.Linear(1, 1), 0.5, offload=True)
    working, idle = (pair.high, pair.low) if t > 500 else (pair.low, pair.high)
    assert pair.at(t, meta) is working
    assert working.weight.is_meta
    assert not idle.weight.is_meta
    assert pair.at(t, meta) is working


def test_the_first_frame_stays_clean():
    seen = []

    class Watch(nn.Module):
        def forward(self, video, t, text):
            seen.append((video[:, :, 0].clone(), t))
            return video + 1

    first = noise(5, (1, 16, 1, 4, 4))
    out = denoise(
        Watch(),
        noise(6, (1, 16, 3, 4, 4)),
        torch.zeros(1, 1, 8),
        **QUICK | {"conditioning": Conditioning(CONFIG, "ti2v"), "conditions": {"first": first}},
    )
    assert torch.equal(out[:, :, :1], first)
    assert len(seen) == 4
    for frame, t in seen:
        assert torch.equal(frame, first[:, :, 0])
        assert (t[:, :4] == 0).all()
        assert (t[:, 4:] > 0).all()


def test_dropout_is_off_and_comes_back():
    class Trained(Toy):
        def forward(self, video, t, text):
            assert not self.training
            return super().forward(video, t, text)

    model = Trained().train()
    denoise(model, torch.zeros(1, 16, 1, 2, 2), torch.zeros(1, 1, 8), **QUICK)
    assert model.training


def test_mistakes_are_named():
    x, text = torch.zeros(1, 16, 1, 2, 2), torch.zeros(1, 1, 8)
    for options, message in (
        ({"guidance": 5}, "guidance 5 needs the encoding of a negative prompt"),
        ({"guidance": (4, 3)}, r"guidance \(4, 3\): give one number"),
        ({"steps": 0}, "steps is 0"),
        ({"flow_shift": 0}, "flow shift is 0"),
        ({"sampler": "dpm"}, "'dpm' is not known; there are unipc, euler"),
        ({"sampler": "ddim"}, "'ddim' does not fit a model that predicts flow; there are unipc, euler"),
        ({"grid": "linear"}, "'linear' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            denoise(Toy(), x, text, **QUICK | options)
    with pytest.raises(ValueError, match="less than one step"):
        first_step(10, 0.05)
    with pytest.raises(ValueError, match=r"strength 1.5"):
        first_step(10, 1.5)
    with pytest.raises(ValueError, match=r"boundary 875"):
        Experts(Toy(), Toy(), 875)
