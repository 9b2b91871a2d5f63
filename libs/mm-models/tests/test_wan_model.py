"""What a Wan model does, apart from being equal to diffusers' (test_wan_parity)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mm_models import build, preset
from mm_models.wan import Stream, flops, train_flops
from mm_models.wan.cost import Cost
from mm_models.wan.model import rope_table, sinusoid

I2V = {"in_channels": 36, "image_dim": 20, "text_tokens": 40}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def clean_start(t, tokens=60, clean=12):
    """A timestep per token: 0 for the first frame."""
    t = t[:, None].repeat(1, tokens)
    t[:, :clean] = 0
    return t


def test_climbing_by_hand_is_forward(tiny, batch):
    model = tiny(**I2V)
    inputs = batch(model)
    stream = model.stem(**inputs)
    assert stream.x.shape == (2, 60, 24)
    assert stream.rope.shape == (2, 60, 6)
    assert stream.mod.shape == (2, 1, 7, 24)
    assert stream.text.shape == (2, 257 + 40, 24)
    for i in range(len(model.layers)):
        stream = model.layer(i, stream)
    assert torch.equal(model.head(stream), model(**inputs))


@pytest.mark.parametrize("kind", ["t2v", "a timestep per token", "vace"])
def test_seams_can_cut_and_join_tokens(tiny, batch, kind):
    """Two 'devices' hold half of the tokens each; their attention sees all keys; joined, it is the whole."""
    model = tiny(text_tokens=40, vace_layers=(0, 2) if kind == "vace" else ())
    inputs = batch(model)
    if kind == "a timestep per token":
        inputs["t"] = clean_start(inputs["t"])
    expected = model(**inputs)

    whole = model.stem(**inputs)
    order = torch.cat((torch.arange(30, 60), torch.arange(0, 30)))  # a cut that a plain join would not undo

    def split(stream: Stream) -> Stream:
        cut = {name: getattr(stream, name) for name in ("x", "rope", "noisy", "control")}
        return stream._replace(**{name: part[:, order] for name, part in cut.items() if part is not None})

    calls = []

    def core(q, k, v, sequence):
        assert sequence == (60, False, None)
        calls.append(q.shape)
        halves = [torch.softmax(torch.einsum("blhd,bmhd->bhlm", part, k) / 12**0.5, -1) for part in q.split(30, 1)]
        return torch.cat([torch.einsum("bhlm,bmhd->blhd", half, v) for half in halves], 1)

    model.split, model.core = split, core
    model.head.gather = lambda x, sequence: x[:, order]  # its own inverse
    assert torch.equal(model.stem(**inputs).x, whole.x[:, order])
    assert relative(model(**inputs), expected) < 1e-5
    assert calls == [(2, 60, 2, 12)] * (5 if kind == "vace" else 3)


def test_every_input_matters(tiny, batch):
    model = tiny(**I2V)
    inputs = batch(model)
    out = model(**inputs)
    changed = {
        "latents": inputs | {"video": torch.cat((inputs["video"][:, :16] * 0, inputs["video"][:, 16:]), 1)},
        "condition channels": inputs | {"video": torch.cat((inputs["video"][:, :16], inputs["video"][:, 16:] * 0), 1)},
        "frames in another order": inputs | {"video": inputs["video"].flip(2)},
        "rows in another order": inputs | {"video": inputs["video"].flip(3)},
        "columns in another order": inputs | {"video": inputs["video"].flip(4)},
        "t": inputs | {"t": inputs["t"] * 0},
        "t of the other sample": inputs | {"t": inputs["t"].flip(0)},
        "text": inputs | {"text": inputs["text"] * 0},
        "text of the other sample": inputs | {"text": inputs["text"].flip(0)},
        "image": inputs | {"image": inputs["image"] * 0},
        "image of the other sample": inputs | {"image": inputs["image"].flip(0)},
    }
    for what, other in changed.items():
        new = model(**other)
        if "frames" in what:
            new = new.flip(2)
        elif "rows" in what:
            new = new.flip(3)
        elif "columns" in what:
            new = new.flip(4)
        for sample in range(2):
            assert relative(new[sample], out[sample]) > 2e-3, f"{what}, sample {sample}"


def test_samples_do_not_mix(tiny, batch):
    """Also, one sample alone takes the fused path of `modulate`, and its gradients must be the same."""
    model = tiny(**I2V)
    inputs = batch(model)
    together = model(**inputs)
    together.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = [model(**{name: value[i : i + 1] for name, value in inputs.items()}) for i in range(2)]
    sum(out.square().sum() for out in alone).backward()
    assert relative(together, torch.cat(alone)) < 1e-6
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, gradients[name]) < 1e-4, name


def test_short_text_is_text_with_zeros(tiny, batch):
    model = tiny(text_tokens=40)
    inputs = batch(model)
    inputs["text"] = inputs["text"][:, :11]
    padded = torch.cat((inputs["text"], torch.zeros(2, 29, 16)), 1)
    assert torch.equal(model(**inputs), model(**inputs | {"text": padded}))


def test_a_timestep_per_token(tiny, batch):
    model = tiny(text_tokens=40)
    inputs = batch(model)
    out = model(**inputs)
    assert relative(model(**inputs | {"t": inputs["t"][:, None].repeat(1, 60)}), out) < 1e-6
    clean = model(**inputs | {"t": clean_start(inputs["t"])})
    assert relative(clean, out) > 1e-2
    mixed = torch.cat((inputs["t"][:1, None].repeat(1, 60), clean_start(inputs["t"])[1:]))  # one sample of each kind
    assert relative(model(**inputs | {"t": mixed}), torch.cat((out[:1], clean[1:]))) < 1e-6
    mixed[1, 30:] = 7
    with pytest.raises(ValueError, match="t has 3 different timesteps in one sample"):
        model(**inputs | {"t": mixed})


def test_a_timestep_per_token_costs_no_memory(tiny, batch):
    """Modulation is made for the two timesteps that there are, not for every token: that would be B L 6 D."""
    model = tiny(text_tokens=40)
    inputs = batch(model)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest[-1] = max(largest[-1], tensor.numel())
            return out

    for t in (inputs["t"], clean_start(inputs["t"])):
        largest.append(0)
        with Watch():
            model(**inputs | {"t": t}).square().sum().backward()
    assert largest[0] == largest[1] < 2 * 60 * 6 * 24


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("video", (2, 16, 5, 8, 6), "takes B 36 F H W"),
        ("video", (2, 36, 5, 7, 6), "5 frames, 7 rows and 6 columns cannot be cut"),
        ("video", (36, 5, 8, 6), r"\(36, 5, 8, 6\)"),
        ("t", (3,), r"must be \(2,\), or \(2, 60\)"),
        ("t", (2, 59), r"must be \(2,\), or \(2, 60\)"),
        ("text", (2, 41, 16), "41 rows, but at most 40"),
        ("text", (2, 30, 17), "must be 2 S 16"),
        ("text", (1, 30, 16), "must be 2 S 16"),
        ("image", (2, 514, 20), "must be 2 257 20"),
        ("image", None, "needs image"),
    ],
)
def test_wrong_shapes_are_explained(tiny, batch, name, shape, message):
    model = tiny(**I2V)
    inputs = batch(model) | {name: None if shape is None else torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_channels_that_are_no_condition(tiny, batch):
    """Of 48 channels, as the 5B has them, none is a condition: so the message does not speak of one."""
    model = tiny(in_channels=48, out_channels=48)
    with pytest.raises(ValueError, match=r"this model takes B 48 F H W$"):
        model(**batch(model) | {"video": torch.zeros(2, 16, 5, 8, 6)})


def test_an_image_for_a_model_without_clip(tiny, batch):
    model = tiny()
    with pytest.raises(ValueError, match="no CLIP branch"):
        model(**batch(model), image=torch.zeros(2, 257, 1280))


def test_sinusoid_is_as_good_as_float64():
    t = torch.cat((torch.tensor([1000.0, 999.0, 0.0, 4.9801, 999.7999]), torch.rand(2000) * 1000))
    angles = t.double()[:, None] * 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat((angles.cos(), angles.sin()), -1)
    assert (sinusoid(t, 256) - expected).abs().max() < 2.5e-7
    assert (sinusoid(t.view(5, -1), 256).view(-1, 256) - expected).abs().max() < 2.5e-7


def test_rope_bands():
    table = rope_table((2, 3, 4), 128, torch.device("cpu"))  # bands of 22, 21 and 21 pairs
    assert table.shape == (2, 24, 64)
    token = (1 * 3 + 2) * 4 + 3  # frame 1, row 2, column 3
    angles = torch.cat([position * 10000.0 ** -(torch.arange(n) / n) for position, n in ((1, 22), (2, 21), (3, 21))])
    assert torch.allclose(table[:, token], torch.stack((angles.cos(), angles.sin())), atol=1e-6)


def test_no_complex_and_no_float64_on_the_device(tiny, batch):
    """Ascend NPUs have neither. The only float64 are the tables of frequencies, made on the CPU: a few numbers."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and (tensor.is_complex() or tensor.dtype == torch.float64):
                    seen.append((str(op), tensor.numel(), tensor.device.type))
            return out

    with torch.device("meta"):
        model = build("wan-tiny", device="meta", **I2V)
        inputs = {name: value.to("meta") for name, value in batch(tiny(**I2V, num_layers=1)).items()}
        inputs["text"] = torch.empty(2, 30, 64)
    with Watch():
        model(**inputs).sum().backward()
    assert {device for _, _, device in seen} == {"cpu"}
    assert max(numbers for _, numbers, _ in seen) <= 128


@pytest.mark.parametrize("fields", [{}, {"in_channels": 36, "image_dim": 20}])
def test_flops_are_those_that_torch_counts(fields):
    config = {"dim": 64, "num_heads": 2, "ffn_dim": 96, "num_layers": 3, "text_dim": 16} | fields
    model = build("wan-tiny", device="meta", **config)
    inputs = {
        "video": torch.empty(1, model.config.in_channels, 3, 8, 6, device="meta"),
        "t": torch.empty(1, device="meta"),
        "text": torch.empty(1, 9, 16, device="meta"),
    }
    if model.config.image_dim:
        inputs["image"] = torch.empty(1, 257, 20, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = model(**inputs)
    forward = counter.get_total_flops()
    assert flops(model.config, 36) == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # Backward is twice forward, less the gradients of the inputs of the first linears, which nobody asks for.
    assert 1.9 < counter.get_total_flops() / forward <= 2


@pytest.mark.parametrize(
    ("name", "tokens", "teraflops"),
    [
        ("wan2.1-t2v-1.3b", 32_760, 283.0),
        ("wan2.1-t2v-14b", 32_760, 1678.4),
        ("wan2.1-i2v-1.3b", 32_760, 284.6),
        ("wan2.1-i2v-14b-480p", 32_760, 1686.4),
        ("wan2.2-ti2v-5b", 8_190, 98.0),  # its VAE packs 16 x 16 pixels
        ("wan2.2-ti2v-5b", 27_280, 517.0),  # 121 frames of 704x1280
    ],
)
def test_flops_of_released_models(name, tokens, teraflops):
    """81 frames of 480x832 if not said otherwise, counted once by torch on the meta device."""
    assert flops(preset(name), tokens) / 1e12 == pytest.approx(teraflops, rel=2e-4)


def test_a_frozen_model_costs_less_to_train_through():
    """Counted by torch. The input needs a gradient, as adapters in the first layer would make it; weights do not."""
    model = build("wan-tiny", device="meta", text_tokens=32).requires_grad_(False)
    video = torch.empty(1, 16, 3, 64, 64, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(video, torch.empty(1, device="meta"), torch.empty(1, 9, 64, device="meta")).sum().backward()
    frozen = train_flops(model.config, 3072, trained=0)
    assert 0.97 < counter.get_total_flops() / frozen <= 1  # the text needs no gradients at all here
    assert frozen < train_flops(model.config, 3072) == 3 * flops(model.config, 3072)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("wan-tiny", "blocks.2."),
        ("wan-tiny", "head."),
        ("wan-tiny-vace", "blocks.2."),
        ("wan-tiny-vace", "vace_blocks.1."),
    ],
)
def test_layers_before_what_is_trained_have_no_backward(name, pattern):
    """Counted by torch, in the control ladder of VACE, too."""
    model = build(name, device="meta", num_layers=3, text_tokens=32)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith(pattern))
    tensors = {"latents": torch.empty(1, 16, 3, 64, 64, device="meta")}
    given = {"control": torch.empty(1, 96, 3, 64, 64, device="meta")} if "vace" in name else {}
    with FlopCounterMode(display=False) as counter:
        t, text = torch.empty(1, device="meta"), torch.empty(1, 9, 64, device="meta")
        model(tensors["latents"], t, text, **given).sum().backward()
    assert 0.9 < counter.get_total_flops() / Cost(model)(tensors)[1] < 1.05
