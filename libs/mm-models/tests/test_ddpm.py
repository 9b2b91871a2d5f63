"""DDPM, the training side: its table; loss and gradient against diffusers' scheduler and a loss written out here."""

from collections.abc import Mapping

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from mm_models.diffusion.ddpm import DDPM
from mm_models.diffusion.flow import FlowMatching
from mm_models.diffusion.objective import Diffusion
from mm_models.initial import generator

TENSORS = {"latents": torch.randn(3, 4, 2, 4, 6), "text": torch.randn(3, 5, 8)}
MASK = torch.rand(3, 2, 4, 6) < torch.tensor([0.9, 0.5, 0.2]).view(3, 1, 1, 1)


class Plain:
    """A conditioning without conditions, which shows what it was given."""

    task, stored = "t2v", {}
    always: Mapping[str, int] = {"latents": 4, "text": 8}

    def complete(self, latents, conditions):
        return conditions

    def hold(self, latents, conditions):
        return latents

    def learned(self, x):
        return x

    def inputs(self, latents, t, text, conditions, text_mask=None, video_mask=None):
        return {"video": latents, "t": t, "text": text, "text_mask": text_mask, "video_mask": video_mask}


class Model(nn.Module):
    """Its output depends on all that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv3d(4, 4, 3, padding=1)
        self.seen: Tensor | None = None

    def forward(self, video, t, text, text_mask, video_mask):
        self.seen = video
        return self.mix(video) * torch.sin(t / 300).view(-1, 1, 1, 1, 1) + text.mean((1, 2)).view(-1, 1, 1, 1, 1)


def draws(ids: tuple[str, ...], epoch: int = 0):
    return lambda i, purpose: generator(epoch, f"{ids[i]} {purpose}")


IDS = ("a", "b", "c")


def test_table_is_that_of_diffusers_and_of_the_makers():
    theirs, ours = DDPMScheduler(), DDPM()
    t = torch.arange(1000)
    level = ours.level(t)
    assert torch.equal(level.t, t.float())
    assert torch.equal(level.alpha, theirs.alphas_cumprod**0.5)
    assert torch.equal(level.sigma, (1 - theirs.alphas_cumprod) ** 0.5)
    assert torch.equal(ours.snr, compute_snr(theirs, t))
    for number, snr in ((0, 9997.3), (100, 8.54), (999, 4.036e-5)):
        assert ours.snr[number].item() == pytest.approx(snr, rel=5e-4)
    assert (ours.snr < 5).nonzero().min() == 130
    assert ours.weights.mean().item() == pytest.approx(0.9131, abs=5e-5)
    assert torch.equal(ours.weights[130:], torch.ones(870))  # 5 / snr above, 1 below
    v = DDPM("v_prediction")
    assert torch.allclose(v.weights, ours.weights * ours.snr / (ours.snr + 1))
    for off in (None, 0, 0.0):
        assert torch.equal(DDPM(snr_gamma=off).weights, torch.ones(1000))
    assert ours.middles() == [100, 300, 500, 700, 900]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("noise_offset", [0.0, 0.02])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_and_gradient_are_those_of_the_makers(prediction, gamma, noise_offset, masked):
    objective = Diffusion(DDPM(prediction, gamma), Plain(), noise_offset)
    tensors = TENSORS | ({"video_mask": MASK} if masked else {})
    model = Model()
    drawn = objective.draw(tensors, draws(IDS, epoch=3))
    losses = objective.losses(model(**objective.inputs(tensors, drawn)), tensors, drawn)
    loss = losses.sum() / objective.weigh(tensors).sum()
    (gradient,) = torch.autograd.grad(loss, [model.mix.weight])

    theirs = DDPMScheduler(prediction_type=prediction)
    purposes = draws(IDS, epoch=3)
    t = torch.stack([torch.randint(0, 1000, (), generator=purposes(i, "timestep")) for i in range(3)])
    noise = torch.stack([torch.randn(4, 2, 4, 6, generator=purposes(i, "noise")) for i in range(3)])
    offset = torch.stack([torch.randn(4, 1, 1, 1, generator=purposes(i, "noise_offset")) for i in range(3)])
    noise = noise + noise_offset * offset
    x = theirs.add_noise(tensors["latents"], noise, t)
    assert torch.equal(model.seen, x)
    target = noise if prediction == "epsilon" else theirs.get_velocity(tensors["latents"], noise, t)
    snr = compute_snr(theirs, t)
    weight = torch.ones(3)
    if gamma:
        weight = snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
    error = weight.view(3, 1, 1, 1, 1) * (model(x, t.float(), tensors["text"], None, None) - target) ** 2
    repeated = (MASK if masked else torch.ones_like(MASK))[:, None].expand_as(error)
    expected = (error * repeated).sum() / repeated.sum()
    (expected_gradient,) = torch.autograd.grad(expected, [model.mix.weight])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", [DDPM(), FlowMatching(weighting="none")])
def test_what_is_masked_changes_nothing_and_a_step_is_a_mean_over_what_is_not(schedule):
    objective, tensors = Diffusion(schedule, Plain()), TENSORS | {"video_mask": MASK}
    drawn = objective.draw(tensors, draws(IDS))
    output = torch.randn_like(tensors["latents"])
    losses, weights = objective.losses(output, tensors, drawn), objective.weigh(tensors)
    assert weights.tolist() == [int(mask.sum()) for mask in MASK]
    other = torch.where(MASK[:, None], output, torch.full_like(output, 1e6))
    assert torch.equal(objective.losses(other, tensors, drawn), losses)
    for i in range(3):  # a sample by itself: it does not depend on the others
        one = {name: tensor[i : i + 1] for name, tensor in tensors.items()}
        alone = objective.draw(one, draws(IDS[i : i + 1]))
        torch.testing.assert_close(objective.losses(output[i : i + 1], one, alone)[0], losses[i], rtol=1e-6, atol=0)
    everything = tensors | {"video_mask": torch.ones_like(MASK)}
    plain = objective.losses(output, TENSORS, drawn)
    torch.testing.assert_close(objective.losses(output, everything, drawn) / MASK[0].numel(), plain, rtol=1e-6, atol=0)
    nothing = tensors | {"video_mask": torch.zeros_like(MASK)}
    assert objective.losses(output, nothing, drawn).tolist() == objective.weigh(nothing).tolist() == [0, 0, 0]


def test_draws_depend_on_the_sample_alone():
    objective = Diffusion(DDPM(), Plain(), noise_offset=0.02)
    whole = objective.draw(TENSORS, draws(IDS))
    turned = objective.draw({name: tensor.flip(0) for name, tensor in TENSORS.items()}, draws(IDS[::-1]))
    assert torch.equal(turned.noise.flip(0), whole.noise)
    assert torch.equal(turned.level.t.flip(0), whole.level.t)
    other = objective.draw(TENSORS, draws(IDS, epoch=1))
    assert not torch.equal(other.noise, whole.noise)
    offsets = whole.noise - Diffusion(DDPM(), Plain()).draw(TENSORS, draws(IDS)).noise
    assert torch.allclose(offsets, offsets[:, :, :1, :1, :1].expand_as(offsets), atol=1e-6)
    assert offsets[:, :, 0, 0, 0].unique().numel() == 12  # of each sample and channel its own
    assert 0.005 < offsets[:, :, 0, 0, 0].std() < 0.06


def test_validation_measures_at_whole_levels_with_plain_noise_and_equal_weight():
    with_offset, without = Diffusion(DDPM(), Plain(), noise_offset=0.5), Diffusion(DDPM(snr_gamma=None), Plain())
    measured = [objective.draw_at(TENSORS, [0, 100, 999], draws(IDS)) for objective in (with_offset, without)]
    for one, other in zip(*((*drawn.level, drawn.noise) for drawn in measured), strict=True):
        assert torch.equal(one, other)
    assert measured[0].level.weight.tolist() == [1, 1, 1]
    assert measured[0].level.alpha.tolist() == DDPM().alphas[[0, 100, 999]].tolist()
    for wrong in ([0.5, 1, 2], [0, 1, 1000], [-1, 0, 1]):
        with pytest.raises(ValueError, match="whole numbers 0 to 999"):
            with_offset.draw_at(TENSORS, wrong, draws(IDS))


def test_masks_of_a_batch_reach_the_model():
    text_mask = torch.tensor([[True] * 4 + [False]] * 3)
    for schedule in (DDPM(), FlowMatching()):
        objective = Diffusion(schedule, Plain())
        drawn = objective.draw(TENSORS, draws(IDS))
        given = objective.inputs(TENSORS | {"text_mask": text_mask, "video_mask": MASK}, drawn)
        assert torch.equal(given["text_mask"], text_mask)
        assert torch.equal(given["video_mask"], MASK)
        assert objective.inputs(TENSORS, drawn)["text_mask"] is None


def test_what_is_trained_on_is_said():
    assert Diffusion(DDPM(), Plain(), 0.02).describe() == (
        "DDPM, levels 0 to 999, epsilon, min-SNR 5, noise offset 0.02"
    )
    assert DDPM("v_prediction", 0).describe() == "DDPM, levels 0 to 999, v_prediction, all levels weigh the same"
    with pytest.raises(ValueError, match=r"prediction type 'sample'"):
        DDPM("sample")
    with pytest.raises(ValueError, match=r"snr gamma is -1"):
        DDPM(snr_gamma=-1)
