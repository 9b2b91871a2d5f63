"""What an Open-Sora-Plan model does, apart from being equal to diffusers' (test_opensoraplan_parity)."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mm_models import build, preset
from mm_models.families import find, published_like
from mm_models.opensoraplan import OpenSoraPlanConfig, Stream, flops
from mm_models.opensoraplan.cost import Cost, train_flops
from mm_models.opensoraplan.model import rope_table
from mm_models.opensoraplan.presets import PRESETS

BOTH = ("text_mask", "video_mask")


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_climbing_by_hand_is_forward(tiny_plan, plan_batch):
    model, inputs = tiny_plan(), plan_batch(masks=BOTH)
    stream = model.stem(**inputs)
    assert stream.x.shape == (2, 72, 48)
    assert stream.rope.shape == (2, 72, 12)
    assert stream.mod.shape == (2, 7, 48)
    assert stream.text.shape == (2, 9, 48)
    assert stream.mask.shape == (2, 72)
    for i in range(len(model.layers)):
        stream = model.layer(i, stream)
    assert torch.equal(model.head(stream), model(**inputs))


def test_seams_can_cut_and_join_tokens(tiny_plan, plan_batch):
    """Two 'devices' hold half of the tokens each; their attention sees all keys, by the mask of the whole sequence."""
    model, inputs = tiny_plan(), plan_batch(masks=BOTH)
    expected, whole = model(**inputs), model.stem(**inputs)
    order = torch.cat((torch.arange(36, 72), torch.arange(0, 36)))  # a cut that a plain join would not undo

    def split(stream: Stream) -> Stream:
        return stream._replace(x=stream.x[:, order], rope=stream.rope[:, order])

    calls = []

    def core(q, k, v, sequence, mask):
        assert sequence == (72, False, None)
        calls.append(q.shape)
        blind = ~mask[:, order][:, None, None]  # not cut: in the order of the whole video
        scores = (torch.einsum("blhd,bmhd->bhlm", part, k) / 24**0.5 for part in q.split(36, 1))
        halves = [torch.softmax(score.masked_fill(blind, -torch.inf), -1) for score in scores]
        return torch.cat([torch.einsum("bhlm,bmhd->blhd", half, v) for half in halves], 1)

    model.split, model.core = split, core
    model.gather = lambda x, sequence: x[:, order]  # its own inverse
    assert torch.equal(model.stem(**inputs).x, whole.x[:, order])
    assert relative(model(**inputs), expected) < 1e-5
    assert calls == [(2, 72, 2, 24)] * 3


def test_every_input_matters(tiny_plan, plan_batch):
    model, inputs = tiny_plan(), plan_batch(masks=BOTH)
    out = model(**inputs)
    changed = {
        "latents": inputs | {"video": inputs["video"] * 0},
        "frames in another order": inputs | {name: inputs[name].flip(-3) for name in ("video", "video_mask")},
        "rows in another order": inputs | {name: inputs[name].flip(-2) for name in ("video", "video_mask")},
        "columns in another order": inputs | {"video": inputs["video"].flip(-1)},
        "t": inputs | {"t": inputs["t"] * 0},
        "t of the other sample": inputs | {"t": inputs["t"].flip(0)},
        "text": inputs | {"text": inputs["text"] * 0},
        "text of the other sample": inputs | {"text": inputs["text"].flip(0)},
        "text mask": inputs | {"text_mask": None},
        "scale": inputs,
    }
    for what, other in changed.items():
        if what == "scale":
            model.config = replace(model.config, interpolation_scale=(1, 1.5, 2))
        new = model(**other)
        axis = next((axis for axis, word in ((2, "frames"), (3, "rows"), (4, "columns")) if word in what), None)
        new = new if axis is None else new.flip(axis)
        for sample in range(2):
            assert relative(new[sample], out[sample]) > 2e-3, f"{what}, sample {sample}"


def test_the_video_mask_hides(tiny_plan, plan_batch):
    """Only the second sample has hidden latents; what they hold changes nothing of what is seen."""
    model, inputs = tiny_plan(), plan_batch(masks=BOTH)
    out = model(**inputs)
    all_seen = model(**inputs | {"video_mask": None})
    assert relative(all_seen[0], out[0]) < 1e-6
    assert relative(all_seen[1], out[1]) > 1e-2
    video = inputs["video"].clone()
    video[1, :, 2] = 100.0
    video[1, :, :, :, 10:] = -100.0
    hidden = model(**inputs | {"video": video})
    assert torch.equal(hidden[1, :, :2, :, :10], out[1, :, :2, :, :10])
    assert relative(hidden[1, :, 2], out[1, :, 2]) > 1e-2  # hidden tokens compute, too


def test_a_token_is_seen_if_any_of_its_latents_is(tiny_plan, plan_batch):
    """Columns 8 and 9 are one token: the first is visible, and so is the token."""
    model, inputs = tiny_plan(), plan_batch(masks=BOTH)
    mask = model.stem(**inputs).mask.view(2, 3, 4, 6)
    assert mask[0].all()
    assert torch.equal(mask[1, 0], torch.tensor([True] * 5 + [False]).expand(4, 6))
    assert not mask[1, 2].any()


def test_a_mask_that_hides_nothing_is_none(tiny_plan, plan_batch):
    model, inputs = tiny_plan(), plan_batch()
    masks = {"text_mask": torch.ones(2, 9).bool(), "video_mask": torch.ones(2, 3, 8, 12).bool()}
    assert relative(model(**inputs, **masks), model(**inputs)) < 1e-6


def test_padded_text_is_text(tiny_plan, plan_batch):
    """Whatever the padding holds."""
    model, inputs = tiny_plan(), plan_batch()
    mask = torch.arange(40)[None] < torch.tensor([[9], [9]])
    padded = torch.cat((inputs["text"], torch.full((2, 31, 32), 7.0)), 1)
    assert relative(model(**inputs | {"text": padded, "text_mask": mask}), model(**inputs)) < 1e-6


def test_samples_do_not_mix(tiny_plan, plan_batch):
    """Also, one sample alone takes the fused path of `modulate`, and its gradients must be the same."""
    model, inputs = tiny_plan(), plan_batch(masks=BOTH)
    together = model(**inputs)
    together.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = [model(**{name: value[i : i + 1] for name, value in inputs.items()}) for i in range(2)]
    sum(out.square().sum() for out in alone).backward()
    assert relative(together, torch.cat(alone)) < 1e-6
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, gradients[name]) < 1e-4 or name.endswith("to_k.bias"), name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("video", torch.zeros(2, 16, 3, 8, 12), "takes B 4 F H W"),
        ("video", torch.zeros(2, 4, 3, 7, 12), "3 frames, 7 rows and 12 columns cannot be cut"),
        ("video", torch.zeros(4, 3, 8, 12), r"\(4, 3, 8, 12\)"),
        ("t", torch.zeros(3), r"must be \(2,\)"),
        ("t", torch.zeros(2, 72), r"must be \(2,\)"),
        ("text", torch.zeros(2, 513, 32), "513 rows, but at most 512"),
        ("text", torch.zeros(2, 9, 33), "must be 2 S 32"),
        ("text", torch.zeros(2, 0, 32), "must be 2 S 32"),
        ("text_mask", torch.ones(2, 8).bool(), r"must be \(2, 9\)"),
        ("text_mask", torch.ones(2, 9), "is torch.float32, but must be torch.bool"),
        ("text_mask", torch.tensor([[True], [False]]).expand(2, 9), r"shows nothing of samples \[1\] of 2"),
        ("video_mask", torch.ones(2, 72).bool(), r"must be \(2, 3, 8, 12\)"),
        ("video_mask", torch.zeros(2, 3, 8, 12).bool(), r"shows nothing of samples \[0, 1\] of 2"),
    ],
)
def test_what_does_not_fit_is_explained(tiny_plan, plan_batch, name, value, message):
    with pytest.raises(ValueError, match=message):
        tiny_plan()(**plan_batch() | {name: value})


def test_rope_turns_thirds_in_halves():
    """The first 16 channels of each third turn with its next 16, as the released weights were trained."""
    table = rope_table((2, 3, 4), (1.0, 1.5, 2.0), 96, torch.device("cpu"))
    assert table.shape == (2, 24, 48)
    token = (1 * 3 + 2) * 4 + 3  # frame 1, row 2, column 3
    frequencies = 10000.0 ** -(torch.arange(16) / 16)
    angles = torch.cat([position * frequencies for position in (1 / 1.0, 2 / 1.5, 3 / 2.0)])
    assert torch.allclose(table[:, token], torch.stack((angles.cos(), angles.sin())), atol=1e-6)


def test_no_complex_and_no_float64_on_the_device(plan_batch):
    """Ascend NPUs have neither. The only float64 are the tables of angles, made on the CPU: a few numbers."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and (tensor.is_complex() or tensor.dtype == torch.float64):
                    seen.append((str(op), tensor.numel(), tensor.device.type))
            return out

    model = build("opensoraplan-tiny", device="meta", text_dim=32)
    inputs = {name: value.to("meta") for name, value in plan_batch(masks=BOTH).items()}
    with Watch():
        model(**inputs).sum().backward()
    assert {device for _, _, device in seen} == {"cpu"}
    assert max(numbers for _, numbers, _ in seen) <= 128


def meta_batch(config: OpenSoraPlanConfig, size: tuple[int, int, int], text: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return {
            "video": torch.empty(1, config.in_channels, *size),
            "t": torch.empty(1),
            "text": torch.empty(1, text, config.text_dim),
        }


def count(model, inputs) -> tuple[int, int]:
    """FLOPs of a forward and of a backward, by torch."""
    with FlopCounterMode(display=False) as counter:
        out = model(**inputs)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    return forward, counter.get_total_flops()


def test_flops_are_those_that_torch_counts():
    model = build("opensoraplan-tiny", device="meta", num_layers=3)
    forward, backward = count(model, meta_batch(model.config, (3, 8, 6), 9))
    assert flops(model.config, 36, text=9) == forward
    # Backward is twice forward, less the gradients of the inputs of the first linears, which nobody asks for.
    assert 1.9 < backward / forward <= 2


def test_flops_of_a_training_step_of_the_released_model():
    """29 frames of 480x640: 74.65 TFLOPs forward, counted by torch on the meta device; and the step by the cost."""
    model = build("opensoraplan-1.2-29x480p", device="meta")
    forward, backward = count(model, meta_batch(model.config, model.config.sample_size, 512))
    assert flops(model.config, 9600) == forward
    assert forward / 1e12 == pytest.approx(74.65, rel=1e-4)
    tokens, step = Cost(model)({"latents": torch.empty(1, 4, *model.config.sample_size, device="meta")})
    assert tokens == 9600
    assert (forward + backward) / step == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "tokens", "teraflops"),
    [("opensoraplan-1.2", 28_800, 386.3), ("opensoraplan-1.2-93x720p", 86_400, 2625.9)],
)
def test_flops_of_longer_and_larger_videos(name, tokens, teraflops):
    frames, rows, columns = preset(name).sample_size
    assert frames * rows * columns == 4 * tokens
    assert flops(preset(name), tokens) / 1e12 == pytest.approx(teraflops, rel=2e-4)


def test_a_frozen_model_costs_less_to_train_through():
    """Counted by torch. The input needs a gradient, as adapters in the first layer would make it; weights do not."""
    model = build("opensoraplan-tiny", device="meta", text_tokens=32).requires_grad_(False)
    inputs = meta_batch(model.config, (3, 64, 64), 32)
    inputs["video"].requires_grad_()
    total = sum(count(model, inputs))
    frozen = train_flops(model.config, 3072, trained=0)
    assert 0.97 < total / frozen <= 1  # the text needs no gradients at all here
    assert frozen < train_flops(model.config, 3072) == 3 * flops(model.config, 3072)
    assert Cost(model)({"latents": torch.empty(2, 4, 3, 64, 64, device="meta")}) == (2 * 3072, 2 * frozen)


def test_layers_before_what_is_trained_have_no_backward():
    """Counted by torch."""
    model = build("opensoraplan-tiny", device="meta", num_layers=3, text_tokens=32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("transformer_blocks.2."))
    total = sum(count(model, meta_batch(model.config, (3, 64, 64), 32)))
    assert 0.9 < total / Cost(model)({"latents": torch.empty(1, 4, 3, 64, 64, device="meta")})[1] < 1.05


# --- what it begins with, and what was published


def test_it_begins_as_the_makers_class_does():
    torch.manual_seed(0)
    model = build("opensoraplan-tiny")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif name.endswith("scale_shift_table"):
            assert parameter.std().item() == pytest.approx(144**-0.5, rel=0.2), name
        else:  # uniform in ±1/√inputs
            most = parameter[0].numel() ** -0.5
            assert parameter.abs().max().item() == pytest.approx(most, rel=2e-2), name
            assert parameter.std().item() == pytest.approx(most / 3**0.5, rel=4e-2), name


def test_presets_say_what_was_published():
    for name, (config, published) in ((name, (p.config, p.published)) for name, p in PRESETS.items()):
        assert published.fps == 24
        assert published.steps == 100
        assert published.negative_prompt.startswith("nsfw, lowres")
        if config.sample_size is None:
            continue
        frames, rows, columns = config.sample_size
        assert (4 * (frames - 1) + 1, (8 * rows, 8 * columns)) == (published.frames, published.size), name
        assert str(published.frames) in name or name == "opensoraplan-1.2"
        assert config.interpolation_scale == ((1, 1.5, 2) if published.size == (720, 1280) else (1, 1, 1))
    assert find("opensoraplan-1.2-29x480p")[1].published.guidance == 2.5
    assert find("opensoraplan-1.2")[1].published.guidance == 7.5


def test_published_numbers_are_those_of_the_length():
    for name, like in PRESETS.items():
        assert published_like(like.config, False) is like, name
    smaller = replace(preset("opensoraplan-1.2-29x480p"), sample_size=(8, 30, 40))
    assert published_like(smaller, False) is PRESETS["opensoraplan-1.2-29x480p"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 23}, "dim 2304 over 23 heads: the quotient must be a whole multiple of 6"),
        ({"dim": 96, "num_heads": 6}, "multiple of 6"),
        ({"patch_size": (2, 2, 2)}, "patch_size is (2, 2, 2), but must be one frame"),
        ({"patch_size": (1, 2, 4)}, "as many rows as columns"),
        ({"interpolation_scale": (1, 0, 2)}, "interpolation_scale is (1, 0, 2), but must be above 0"),
        ({"interpolation_scale": (1, 2)}, "must be three numbers"),
        ({"sample_size": (24, 60)}, "must be three numbers"),
        ({"sample_size": (24, 60, 0)}, "sample_size[2] is 0"),
        ({"eps": 2.0}, "eps is 2.0, but must be above 0 and below 1"),
        ({"prediction_type": "x"}, "prediction_type is 'x'"),
        ({"freq_dim": 3}, "freq_dim is 3"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_a_configuration_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OpenSoraPlanConfig(**fields)
