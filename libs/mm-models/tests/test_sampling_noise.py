"""Sampling with models that predict noise or v: the latents of diffusers' schedulers, whoever makes them."""

import pytest
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler
from torch import nn

from mm_models.diffusion.experts import Experts
from mm_models.diffusion.samplers import SAMPLERS, count_calls, fitting, settle_sampling
from mm_models.diffusion.sampling import denoise, noise
from mm_models.diffusion.schedulers import scheduler
from mm_models.family import Published
from mm_models.initial import generator
from mm_parallel.testing import spawn

SHAPE = (4, 2, 4, 6)
THEIRS = {  # as in the makers' sampling script
    "euler_ancestral": lambda prediction: EulerAncestralDiscreteScheduler(prediction_type=prediction),
    "pndm": lambda prediction: PNDMScheduler(prediction_type=prediction),
    "ddim": lambda prediction: DDIMScheduler(clip_sample=False, prediction_type=prediction),
    "ddpm": lambda prediction: DDPMScheduler(clip_sample=False, prediction_type=prediction),
}


class Plain:
    """A conditioning without conditions."""

    def hold(self, latents, conditions):
        return latents

    def inputs(self, latents, t, text, conditions, text_mask=None, video_mask=None):
        return {"video": latents, "t": t, "text": text}


class Model(nn.Module):
    """Depends on everything it is given, smoothly; it counts its calls."""

    calls = 0

    def forward(self, video, t, text):
        assert t.shape == (video.shape[0],)
        assert t.dtype == torch.float32
        self.calls += 1
        mean = text.mean((1, 2)).view(-1, 1, 1, 1, 1)
        return torch.tanh(video * torch.cos(t / 400).view(-1, 1, 1, 1, 1) + video.roll(1, -1) / 3 + mean)


def texts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(count, 5, 8, generator=random), torch.randn(count, 5, 8, generator=random)


def by_hand(sampler: str, prediction: str, guidance: float, steps: int, seed: int, text, negative) -> torch.Tensor:
    """One video, with the scheduler of diffusers in a loop as the makers' pipeline has it."""
    model, schedule = Model(), THEIRS[sampler](prediction)
    schedule.set_timesteps(steps)
    x = noise(seed, SHAPE)[None] * schedule.init_noise_sigma
    for number, t in enumerate(schedule.timesteps, 1):
        given, times = schedule.scale_model_input(x, t), t.float()[None]
        predicted = model(given, times, text)
        if guidance > 1:
            away = model(given, times, negative)
            predicted = away + guidance * (predicted - away)
        drawn = {"generator": generator(seed, f"step {number}")} if sampler in ("euler_ancestral", "ddpm") else {}
        x = schedule.step(predicted, t, x, **drawn).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("sampler", THEIRS)
def test_loop_is_that_of_the_schedulers(sampler, guidance, prediction):
    """…for every video of a batch, as if it were alone."""
    seeds, steps, seen = [3, 2**63 - 1], 12, []
    text, negative = texts(2)
    model = Model()
    made = denoise(
        model,
        torch.stack([noise(seed, SHAPE) for seed in seeds]),
        text,
        negative,
        conditioning=Plain(),
        steps=steps,
        guidance=guidance,
        prediction=prediction,
        sampler=sampler,
        seeds=seeds,
        progress=lambda step, latents: seen.append(step),
    )
    for i, seed in enumerate(seeds):
        expected = by_hand(sampler, prediction, guidance, steps, seed, text[i : i + 1], negative[i : i + 1])
        scale = expected.abs().max().item()
        torch.testing.assert_close(made[i : i + 1], expected, rtol=1e-5, atol=1e-5 * scale)
    assert seen == list(range(1, count_calls(sampler, steps) + 1))
    assert model.calls == len(seen) * (1 + (guidance > 1))


def test_calls_are_counted():
    for sampler in fitting("epsilon"):
        least = SAMPLERS[sampler].least_steps
        for steps in (least, least + 1, 50, 100):
            made = scheduler(sampler, steps, None, None, "cpu", prediction="epsilon").timesteps
            assert len(made) == count_calls(sampler, steps), (sampler, steps)
            assert made[0] >= 450, (sampler, steps)  # it begins at high noise
    assert count_calls("pndm", 50) == 59
    assert count_calls("unipc", 50, start=15) == 35
    first = scheduler("euler_ancestral", 100, None, None, "cpu", prediction="epsilon")
    assert float(first.init_noise_sigma) == pytest.approx(157.407, abs=1e-3)


def test_nothing_is_clipped():
    """Latents go beyond 1, so a model that knows them arrives there."""
    x0 = 3 * torch.randn(1, *SHAPE)
    products = DDPMScheduler().alphas_cumprod

    class Knows(nn.Module):
        def forward(self, video, t, text):
            a = products[t.long()].view(-1, 1, 1, 1, 1)
            return (video - a.sqrt() * x0) / (1 - a).sqrt()

    for sampler in ("ddim", "ddpm", "pndm"):
        options = {"steps": 20, "guidance": 1, "prediction": "epsilon", "sampler": sampler, "seeds": [0]}
        made = denoise(Knows(), noise(0, SHAPE)[None], torch.zeros(1, 1, 8), conditioning=Plain(), **options)
        assert (made - x0).abs().max() < 0.3, sampler  # pndm ends at level 0, which has some noise


def test_noise_of_the_steps_is_the_videos_own():
    text, _ = texts(1)
    options = {"conditioning": Plain(), "steps": 4, "guidance": 1, "prediction": "epsilon"}
    start = noise(0, SHAPE)[None]
    for sampler in ("euler_ancestral", "ddpm"):
        made = [denoise(Model(), start, text, **options, sampler=sampler, seeds=[seed]) for seed in (5, 5, 6)]
        assert torch.equal(made[0], made[1])
        assert not torch.allclose(made[0], made[2], atol=1e-2)


def in_a_pair(rank: int, world: int, sampler: str) -> torch.Tensor:
    torch.set_num_threads(1)
    text, negative = texts(1)
    options = {"steps": 5, "guidance": 7.5, "prediction": "epsilon", "sampler": sampler, "seeds": [3]}
    pair = dist.group.WORLD if world > 1 else None
    return denoise(Model(), noise(3, SHAPE)[None], text, negative, conditioning=Plain(), pair=pair, **options).numpy()


def test_two_ranks_make_the_video_of_one_to_the_bit():
    made = spawn(2, in_all_samplers)
    alone = in_all_samplers(0, 1)
    for shared in made:
        for sampler, latents in shared.items():
            assert (latents == alone[sampler]).all(), sampler


def in_all_samplers(rank: int, world: int) -> dict:
    return {sampler: in_a_pair(rank, world, sampler) for sampler in THEIRS}


USUAL = {"conditioning": Plain(), "steps": 4, "guidance": 1, "prediction": "epsilon", "sampler": "ddim"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "unipc"}, r"'unipc' does not fit a model that predicts epsilon; there are euler_ancestral, pndm"),
        ({"sampler": "euler"}, r"did you mean euler_ancestral\?"),
        ({"sampler": "euler_a"}, r"'euler_a' is not known; .* did you mean euler_ancestral\?"),
        ({"sampler": "pndm", "steps": 3}, r"steps is 3, but must be at least 4 for pndm"),
        ({"sampler": "ddim", "steps": 1}, r"steps is 1, but must be at least 2 for ddim"),
        ({"flow_shift": 3.0}, r"flow_shift 3\.0: .*flow matching.*predicts epsilon: leave it out"),
        ({"grid": "guides"}, r"grid guides: .*flow matching.*leave it out"),
        ({"start": 2}, r"predicts epsilon begins with noise, not with step 2 of a video"),
        ({"sampler": "ddpm"}, r"ddpm draws noise at every step: give the seeds of these 1 videos"),
        ({"sampler": "euler_ancestral", "seeds": [1, 2]}, r"give the seeds of these 1 videos"),
        ({"prediction": "flow", "sampler": "euler"}, r"flow shift is None"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        denoise(Model(), torch.zeros(1, *SHAPE), torch.zeros(1, 1, 8), **USUAL | options)


def test_two_experts_share_a_flow():
    with pytest.raises(ValueError, match=r"two experts share the noise levels of a flow"):
        denoise(Experts(Model(), Model(), 0.5), torch.zeros(1, *SHAPE), torch.zeros(1, 1, 8), **USUAL)


def test_what_is_left_open_is_as_published():
    noisy = Published((480, 640), 93, 24, 100, 7.5, None, "bad", "euler_ancestral", "(best) {}.", trained_frames=93)
    flow = Published((480, 832), 81, 16, 50, 5.0, None, "bad", "unipc")
    nothing = dict.fromkeys(("steps", "guidance", "sampler", "grid", "seed"))
    assert settle_sampling(nothing, noisy, "epsilon", (480, 640)) == {
        "steps": 100,
        "guidance": 7.5,
        "negative_prompt": "bad",
        "prompt_template": "(best) {}.",
        "sampler": "euler_ancestral",
        "flow_shift": None,
        "grid": None,
    }
    asked = {"steps": 50, "sampler": "pndm", "guidance": 5.0, "negative_prompt": "", "prompt_template": "{}"}
    assert settle_sampling(asked, noisy, "epsilon", (480, 640)) == asked | {"flow_shift": None, "grid": None}
    for size, shift in (((480, 832), 3.0), ((720, 1280), 5.0)):
        made = settle_sampling({}, flow, "flow", size)
        assert (made["flow_shift"], made["grid"], made["sampler"]) == (shift, "guides", "unipc")
    for asked, message in (
        ({"sampler": "euler"}, r"--sample.sampler 'euler' does not fit .*did you mean euler_ancestral\?"),
        ({"sampler": "pndm", "steps": 2}, r"--sample.steps is 2, but must be at least 4 for pndm"),
        ({"prompt_template": "best"}, r"--sample.prompt_template 'best': .* exactly once"),
        ({"prompt_template": "{} {}"}, r"exactly once"),
        ({"flow_shift": 3.0}, r"--sample.flow_shift 3.0: .*leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            settle_sampling(asked, noisy, "epsilon", (480, 640), "--sample.")
