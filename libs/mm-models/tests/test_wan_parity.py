"""The same weights in diffusers' Wan and VACE transformers: the same video, the same gradient for every parameter."""

import pytest
import torch
from torch import nn

# diffusers -> published, in this order; numerics of the two are compared, so a wrong line here cannot hide.
RENAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    (".proj_in.", ".before_proj."),
    (".proj_out.", ".after_proj."),
    ("proj_out", "head.head"),
    (".scale_shift_table", ".modulation"),
    ("scale_shift_table", "head.modulation"),
    (".norm2.", ".norm3."),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0.", ".o."),
    (".to_", "."),
    (".add_k_proj.", ".k_img."),
    (".add_v_proj.", ".v_img."),
    (".norm_added_k.", ".norm_k_img."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
)

CASES = {
    "t2v, head_dim 12": {},
    "t2v, head_dim 20: bands of unequal width": {"head_dim": 20},
    "i2v with CLIP": {"in_channels": 36, "image_dim": 20},
    "i2v with CLIP tokens among those of the text": {"in_channels": 36, "image_dim": 20, "image_kv": False},
    "first and last frame": {"in_channels": 36, "image_dim": 20, "image_tokens": 514},
    "i2v A14B: wide input, no CLIP": {"in_channels": 36},
    "ti2v 5B: 48 channels, a timestep per token": {"in_channels": 48, "out_channels": 48},
    "vace, head_dim 20": {"head_dim": 20, "vace_layers": (0, 2)},
}


def published(name: str) -> str:
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


def oracle(model):
    """diffusers' model with the weights of ours."""
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    c = model.config
    control = {"vace_layers": list(c.vace_layers), "vace_in_channels": c.control_channels} if c.vace_layers else {}
    other = (WanVACETransformer3DModel if control else WanTransformer3DModel)(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        text_dim=c.text_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        image_dim=c.image_dim,
        added_kv_proj_dim=c.dim if c.image_dim is not None and c.image_kv else None,
        pos_embed_seq_len=514 if c.image_tokens == 514 else None,
        rope_max_seq_len=32,
        **control,
    )
    ours = model.state_dict()
    other.load_state_dict({name: ours[published(name)] for name in other.state_dict()})
    assert len(other.state_dict()) == len(ours)
    return other


class ExactSinusoid(nn.Module):
    """diffusers' own multiplies t by a float32 frequency and is off by up to 3e-5; this is the same in float64."""

    def forward(self, t):
        angles = t.double()[:, None] * 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_output_and_every_gradient(tiny, batch, fields):
    model = tiny(**fields)
    inputs = batch(model)
    if model.config.in_channels == 48:
        inputs["t"] = inputs["t"][:, None].repeat(1, 60)
        inputs["t"][:, :12] = 0  # the first frame is clean
    other = oracle(model)

    image = inputs.get("image")
    if image is not None and model.config.image_tokens == 514:
        image = image.unflatten(1, (2, 257)).flatten(0, 1)  # diffusers takes the two images as samples
    theirs = {"hidden_states": inputs["video"], "timestep": inputs["t"], "encoder_hidden_states": inputs["text"]}
    theirs |= {"encoder_hidden_states_image": image, "return_dict": False}
    if model.config.vace_layers:
        inputs["control_scale"] = (1.0, 0.5)
        theirs |= {"control_hidden_states": inputs["control"], "control_hidden_states_scale": torch.tensor([1.0, 0.5])}
    out = model(**inputs)
    assert relative(out, other(**theirs)[0]) <= 1e-5
    other.condition_embedder.timesteps_proj = ExactSinusoid()
    expected = other(**theirs)[0]
    assert relative(out, expected) <= 1e-6

    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in other.named_parameters():
        assert relative(ours[published(name)], parameter.grad) <= 1e-4, name
