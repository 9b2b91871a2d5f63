"""The training schedule, against numbers worked out from its definition."""

import math

import pytest
import torch

from mm_models.diffusion.flow import FlowMatching, expert_range
from mm_models.diffusion.objective import blend


def test_schedule():
    flow = FlowMatching()
    assert flow.timesteps[:4].tolist() == pytest.approx([1000, 999.7998, 999.5994, 999.3986], abs=1e-3)
    assert flow.timesteps[-3:].tolist() == pytest.approx([14.822, 9.921, 4.980], abs=1e-3)
    assert torch.equal(flow.sigmas * 1000, flow.timesteps)
    assert len(flow.sigmas) == 1000
    assert FlowMatching(shift=1.0).sigmas[250] == 0.75


def test_weights():
    flow = FlowMatching()
    for t, weight in ((900, 0.6309), (875, 0.7835), (750, 1.4563), (500, 2.0764), (250, 1.4637), (100, 0.6380)):
        nearest = (flow.timesteps - t).abs().argmin()
        assert flow.weights[nearest].item() == pytest.approx(weight, abs=2e-3), t
    assert flow.weights[-1].item() == pytest.approx(0.0319, abs=1e-4)
    assert flow.weights[0] == 0
    assert flow.weights.max().item() == pytest.approx(2.0764, abs=1e-4)
    assert flow.weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert FlowMatching(weighting="none").weights.tolist() == [1] * 1000


def test_expert_boundaries():
    """The ranges of the A14B recipes fall where the boundary says: t = 900 for i2v, 875 for t2v."""
    for boundary, fraction in ((0.9, 0.358), (0.875, 0.417)):
        high, low = FlowMatching(range=(0, fraction)), FlowMatching(range=(fraction, 1))
        assert high.index_range[1] == low.index_range[0] == round(fraction * 1000)
        assert high.timesteps[high.index_range[1] - 1] > boundary * 1000 > low.timesteps[low.index_range[0]]
    assert FlowMatching().index_range == (0, 1000)
    assert FlowMatching(range=(0.29, 1)).index_range == (290, 1000)


def test_line_and_loss():
    flow = FlowMatching()
    x0, noise = torch.randn(3, 16, 2, 4, 4), torch.randn(3, 16, 2, 4, 4)
    index = torch.tensor([0, 500, 999])
    level = flow.level(index)
    x = blend(x0, noise, level)
    assert torch.equal(x[0], noise[0])
    for i in range(3):  # going back along the target arrives at x0
        assert torch.allclose(x[i] - flow.sigmas[index[i]] * flow.target(x0, noise, level)[i], x0[i], atol=1e-5)

    prediction = flow.target(x0, noise, level) + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1)
    expected = flow.weights[index] * torch.tensor([1.0, 4.0, 9.0])
    assert torch.allclose(flow.loss(prediction, flow.target(x0, noise, level), level), expected, rtol=1e-4)
    half = flow.loss(prediction.bfloat16(), flow.target(x0, noise, level).bfloat16(), level)
    assert half.dtype == torch.float32


def draws(flow: FlowMatching, count: int = 4000) -> torch.Tensor:
    return torch.stack([flow.draw_index(torch.Generator().manual_seed(i)) for i in range(count)])


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.5, 1.5, 5.0), (-1.0, 0.5, 3.0)])
def test_logit_normal_draws_have_the_quantiles_of_the_formula(mean, std, shift):
    flow = FlowMatching(shift=shift, sampling="logit_normal", logit=(mean, std))
    sigmas = flow.sigmas[draws(flow)].double()
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        u = torch.sigmoid(mean + std * torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))
        expected = shift * u / (1 + (shift - 1) * u)
        assert ((sigmas <= expected).double().mean() - q).abs() < 0.025  # three deviations of so many draws
    assert flow.measure[0] == 0
    assert flow.measure[-1] == 1
    # the table's own probabilities, against the integral of the density
    u = 1 - (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    density = torch.exp(-((torch.logit(u) - mean) ** 2) / 2 / std**2) / (std * (2 * torch.pi) ** 0.5 * u * (1 - u))
    assert torch.allclose(flow.measure.diff(), density / 1000, atol=2e-5)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_parts_of_two_experts_together_have_the_density_of_the_whole(sampling):
    how = {"shift": 3.0, "sampling": sampling, "logit": (0.3, 1.0)}
    whole = FlowMatching(**how)
    high, low = (FlowMatching(**how, range=expert_range(name, 0.875, 3.0)) for name in ("high", "low"))
    cut = high.index_range[1]
    assert cut == low.index_range[0]
    assert (whole.sigmas >= 0.875).sum() == cut
    share = whole.measure[cut].item()
    drawn = torch.cat([draws(high, 1000), draws(low, 1000)])
    assert (drawn[:1000] < cut).all()
    assert (drawn[1000:] >= cut).all()
    for at in (cut // 2, cut, cut + 200, 900):
        below = (drawn[:1000] < at).double().mean() * share + (drawn[1000:] < at).double().mean() * (1 - share)
        assert (below - whole.measure[at]).abs() < 0.04


def test_a_shift_by_size_is_that_of_the_papers():
    sd3 = FlowMatching(shift=3.0, shift_by="sqrt", shift_tokens=4096, patch=4, expert=("high", 0.875))
    for tokens, shift in ((4096, 3.0), (1024, 1.5), (16384, 6.0)):
        found = sd3.at(4 * tokens)
        assert found.shift == pytest.approx(shift)
        assert found.index_range[1] == (found.sigmas >= 0.875).sum()  # the boundary is a noise level, whatever the size
    flux = FlowMatching(shift_by="flux")
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        assert math.log(flux.at(tokens).shift) == pytest.approx(mu)
    assert FlowMatching().at(17) == FlowMatching()
    assert "by size (3 at 4,096 tokens" in sd3.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 0}, "flow shift is 0"),
        ({"range": (0.5, 0.5)}, r"0\.5 to 0\.5"),
        ({"range": (0.5, 0.2)}, r"0\.5 to 0\.2"),
        ({"range": (0, 1.1)}, r"0 to 1\.1"),
        ({"logit": (0, 0)}, "std of logit-normal sampling is 0"),
        ({"shift_by": "sqrt"}, "sqrt, and only it"),
        ({"weighting": "logit"}, "'logit' is not known"),
    ],
)
def test_impossible_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        FlowMatching(**options)
