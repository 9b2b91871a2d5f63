"""The same weights in diffusers' `AllegroTransformer3DModel`, which computes what Open-Sora-Plan 1.2 does: the same
video, and the same gradient for every parameter and input.
"""

import pytest
import torch
from torch import nn

from mm_models import build
from mm_models.diffusion.sampling import denoise, noise
from mm_models.initial import generator
from mm_models.layers import cast_weights
from mm_models.opensoraplan.encode import Conditioning

BOTH = ("text_mask", "video_mask")
CASES = {
    "no mask": {},
    "text mask": {"masks": ("text_mask",)},
    "video mask": {"masks": ("video_mask",)},
    "one frame": {"frames": 1, "masks": ("text_mask",)},
    "480p": {"masks": BOTH, "interpolation_scale": (1, 1, 1)},
    "720p": {"masks": BOTH, "interpolation_scale": (1, 1.5, 2)},
    "other scales": {"masks": BOTH, "interpolation_scale": (2.2, 2, 2)},
    "three heads of 18": {"masks": BOTH, "dim": 54, "num_heads": 3},
}


def oracle(model):
    """diffusers' model with the weights of ours."""
    from diffusers import AllegroTransformer3DModel

    c = model.config
    other = AllegroTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        num_layers=c.num_layers,
        cross_attention_dim=c.dim,
        caption_channels=c.text_dim,
    )
    other.load_state_dict(model.state_dict())
    return other


def rotary(config, frames: int, rows: int, columns: int):
    """What diffusers' model is told of positions: tables of the axes, and which row of each a token takes."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    made = get_3d_rotary_pos_embed_allegro(
        config.head_dim, ((0, 0), (rows, columns)), (rows, columns), frames, config.interpolation_scale
    )
    tokens = torch.cartesian_prod(*(torch.arange(length) for length in (frames, rows, columns)))
    return made[:3], tuple(axis[None] for axis in tokens.unbind(1))


def theirs(other, config, inputs):
    frames, rows, columns = inputs["video"].shape[2:]
    given = {
        "hidden_states": inputs["video"],
        "timestep": inputs["t"],
        "encoder_hidden_states": inputs["text"],
        "attention_mask": inputs.get("video_mask"),
        "encoder_attention_mask": inputs.get("text_mask"),
        "image_rotary_emb": rotary(config, frames, rows // 2, columns // 2),
    }
    given = {name: value.float() if value is not None and "mask" in name else value for name, value in given.items()}
    return other(**given, return_dict=False)[0]


class ExactSinusoid(nn.Module):
    """diffusers' own multiplies t by a float32 frequency and is off by up to 3e-5; this is the same in float64."""

    def forward(self, t):
        angles = t.double()[:, None] * 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_every_gradient(tiny_plan, plan_batch, case):
    model = tiny_plan(**{name: value for name, value in case.items() if name not in ("masks", "frames")})
    inputs = plan_batch(case.get("frames", 3), case.get("masks", ()))
    copies = {name: value.clone() for name, value in inputs.items()}
    for batch in (inputs, copies):
        batch["video"].requires_grad_()
        batch["text"].requires_grad_()
    other = oracle(model)
    out = model(**inputs)
    assert relative(out, theirs(other, model.config, copies)) <= 1e-5
    other.adaln_single.emb.time_proj = ExactSinusoid()
    expected = theirs(other, model.config, copies)
    assert relative(out, expected) <= 1e-6

    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # a bias of keys moves all scores of a query alike, so its gradient is nothing but rounding
        floor = 1e-5 * gradients[name.replace(".bias", ".weight")].norm() if name.endswith("to_k.bias") else 0
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + floor, name
    for name in ("video", "text"):
        assert relative(inputs[name].grad, copies[name].grad) <= 1e-5, name


SCHEDULERS = {  # as the makers' sampling script sets them up
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
}


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("sampler", SCHEDULERS)
@torch.no_grad()
def test_final_latents(tiny_plan, plan_batch, sampler, guidance):
    """…are those of diffusers' model and scheduler in a loop as the makers have it, with their padded text."""
    import diffusers

    model, seed, steps = tiny_plan(), 7, 6
    texts = plan_batch()["text"]
    texts = {"text": texts[:1], "negative": texts[1:2, :2]}  # of other lengths
    size = tuple(plan_batch()["video"].shape[1:])
    made = denoise(
        model,
        noise(seed, size)[None],
        **texts,
        conditioning=Conditioning(model.config, "t2v"),
        prediction="epsilon",
        sampler=sampler,
        seeds=[seed],
        steps=steps,
        guidance=guidance,
    )
    name, options = SCHEDULERS[sampler]
    schedule, other = getattr(diffusers, name)(**options), oracle(model)
    schedule.set_timesteps(steps)
    x = noise(seed, size)[None] * schedule.init_noise_sigma
    length = model.config.text_tokens
    for number, t in enumerate(schedule.timesteps, 1):
        predicted = {}
        for which, text in texts.items():
            padded = torch.cat((text, torch.randn(1, length - text.shape[1], text.shape[2])), dim=1)
            mask = torch.arange(length)[None] < text.shape[1]
            given = {"video": schedule.scale_model_input(x, t), "t": t.float()[None], "text": padded, "text_mask": mask}
            predicted[which] = theirs(other, model.config, given)
        v = predicted["text"]
        if guidance > 1:
            v = predicted["negative"] + guidance * (v - predicted["negative"])
        drawn = {"generator": generator(seed, f"step {number}")} if sampler in ("euler_ancestral", "ddpm") else {}
        x = schedule.step(v, t, x, **drawn).prev_sample
    assert relative(made, x) <= 1e-4


def test_bfloat16(tiny_plan, plan_batch, tmp_path):
    """diffusers rounds the time embedding, the modulation and the residual stream too: ours is nearer to the truth."""
    from diffusers import AllegroTransformer3DModel

    model, inputs = tiny_plan(), plan_batch(masks=BOTH)
    exact = model(**inputs)
    oracle(model).save_pretrained(tmp_path)
    other = AllegroTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    rope, positions = rotary(model.config, 3, 4, 6)
    with torch.no_grad():
        expected = other(
            hidden_states=rounded["video"],
            timestep=inputs["t"],
            encoder_hidden_states=rounded["text"],
            attention_mask=inputs["video_mask"].bfloat16(),
            encoder_attention_mask=inputs["text_mask"].bfloat16(),
            image_rotary_emb=(rope, positions),
            return_dict=False,
        )[0].float()
        ours = cast_weights(model, torch.bfloat16)(**inputs)
    assert ours.dtype == torch.float32
    assert relative(ours, expected) < 0.03
    assert relative(ours, exact) < relative(expected, exact)


def test_the_released_names_and_numbers():
    """687 tensors and 2,771,907,856 parameters, of the names and shapes of diffusers' defaults, which are the same."""
    from diffusers import AllegroTransformer3DModel

    model = build("opensoraplan-1.2", device="meta")
    with torch.device("meta"):
        other = AllegroTransformer3DModel()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in other.state_dict().items()}
    assert len(shapes) == 687
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_771_907_856
