"""VACE's control ladder, apart from being equal to diffusers' (test_wan_parity)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mm_models import build, preset
from mm_models.wan import WanModel, flops, train_flops
from mm_models.wan.start import grow

VACE = {"vace_layers": (0, 2), "text_tokens": 40}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_every_part_of_the_control_matters(tiny, batch):
    model = tiny(**VACE)
    inputs = batch(model)
    out = model(**inputs)
    for what, channels in {"kept": slice(16), "changes": slice(16, 32), "mask": slice(32, 96)}.items():
        control = inputs["control"].clone()
        control[0, channels] = 0
        new = model(**inputs | {"control": control})
        assert relative(new[0], out[0]) > 5e-3, what
        assert relative(new[1], out[1]) < 1e-6, what


def test_the_scale_of_each_block(tiny, batch):
    model = tiny(**VACE)
    inputs = batch(model)
    plain = WanModel(tiny(text_tokens=40).config)
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("vace_")})
    without = plain(**{name: value for name, value in inputs.items() if name != "control"})
    assert torch.equal(model(**inputs, control_scale=0), without)
    both, first, second = (model(**inputs, control_scale=scale) for scale in (1, (1, 0), (0, 1)))
    assert torch.equal(model(**inputs), both)
    assert min(relative(a, b) for a, b in ((first, both), (second, both), (first, second), (first, without))) > 5e-3


def test_hints_are_not_held(tiny, batch):
    """The stream holds the control's own residual stream and nothing for later; what is below is gone once used."""
    model = tiny(vace_layers=(0, 1, 2), text_tokens=40)
    stream = model.stem(**batch(model))
    for i in range(3):
        stream = model.layer(i, stream)
        assert sum(isinstance(part, torch.Tensor) and part.shape == (2, 60, 24) for part in stream) == 2  # x, control


def test_from_a_plain_wan(tiny, batch):
    """It computes what the base does, to the last bit; then the projections learn first."""
    base = tiny(text_tokens=40)
    weights = base.state_dict()
    model = WanModel(tiny(**VACE).config)
    for name, parameter in model.named_parameters():
        own = name.startswith("vace_")
        start = grow(model.config, weights.__getitem__, name, parameter.shape) if own else weights[name]
        parameter.data.copy_(start)
    assert torch.equal(model.vace_blocks[1].ffn[0].weight, base.blocks[2].ffn[0].weight)
    patches, control = base.patch_embedding, model.vace_patch_embedding
    assert torch.equal(control.weight[:, :32], patches.weight.repeat(1, 2, 1, 1, 1))
    assert not control.weight[:, 32:].any()
    assert torch.equal(control.bias, patches.bias)

    inputs = batch(model)
    out = model(**inputs)
    expected = base(**{name: value for name, value in inputs.items() if name != "control"})
    assert torch.equal(out, expected)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vace_"))
    model(**inputs).square().sum().backward()
    moved = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {f"vace_blocks.{n}.after_proj.{kind}" for n in (0, 1) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": None}, r"needs control, 2 96 5 8 6"),
        (
            {"control": torch.zeros(2, 96, 4, 8, 6)},
            r"control has shape \(2, 96, 4, 8, 6\), but must be \(2, 96, 5, 8, 6\)",
        ),
        ({"control_scale": (1.0, 0.5, 0.2)}, "has 3 numbers: give one, or one for each of the 2"),
    ],
)
def test_wrong_controls_are_explained(tiny, batch, change, message):
    model = tiny(**VACE)
    with pytest.raises(ValueError, match=message):
        model(**batch(model) | change)


def test_a_control_for_a_model_without_the_ladder(tiny, batch):
    model = tiny(text_tokens=40)
    with pytest.raises(ValueError, match="no control ladder"):
        model(**batch(model), control=torch.zeros(2, 96, 5, 8, 6))


@pytest.mark.parametrize("layers", [(1, 2), (0, 0), (0, 2, 1), (0, 3), (0, -1)])
def test_layers_that_a_control_ladder_cannot_feed(layers):
    with pytest.raises(ValueError, match="must be numbers of layers"):
        build("wan-tiny", device="meta", num_layers=3, vace_layers=layers)


@pytest.mark.parametrize(
    ("name", "frames", "teraflops"), [("vace-1.3b", 21, 427.0), ("vace-1.3b", 22, 462.1), ("vace-14b", 21, 2029.6)]
)
def test_flops_of_released_models(name, frames, teraflops):
    """81 frames of 480x832, and one reference image more; counted once by torch on the meta device."""
    assert flops(preset(name), frames * 30 * 52) / 1e12 == pytest.approx(teraflops, rel=2e-4)


def test_flops_are_those_that_torch_counts():
    """Of the forward exactly; of the training of a control ladder on a frozen base nearly: text needs no gradients."""
    model = build("wan-tiny-vace", device="meta", text_tokens=16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vace_"))
    inputs = {
        "video": torch.empty(1, 16, 3, 32, 32, device="meta"),
        "control": torch.empty(1, 96, 3, 32, 32, device="meta"),
    }
    with FlopCounterMode(display=False) as counter:
        out = model(**inputs, t=torch.empty(1, device="meta"), text=torch.empty(1, 9, 64, device="meta"))
    forward = counter.get_total_flops()
    assert flops(model.config, 768) == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    counted = forward + counter.get_total_flops()
    frozen = train_flops(model.config, 768, trained=0, control_trained=1)
    assert 0.97 < counted / frozen <= 1
    assert frozen < train_flops(model.config, 768) == 3 * forward
