"""What runs in which precision."""

import copy

import pytest
import torch

from mm_models import build
from mm_models.layers import RMSNorm, cast_weights

KEPT = ("time_embedding", "time_projection", "modulation", "norm3", "img_emb.proj.0", "img_emb.proj.4")
I2V = {"in_channels": 36, "image_dim": 20, "text_tokens": 40}
VACE = {"vace_layers": (0, 2), "text_tokens": 40}


def close(a, b):
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    return cosine > 0.999 and ((a - b).norm() / b.norm()).item() < 2e-2


def test_cast_weights_spares_the_islands(tiny):
    model = cast_weights(tiny(**I2V), torch.bfloat16)
    for name, parameter in model.named_parameters():
        kept = any(part in name for part in KEPT)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert cast_weights(model, torch.float64).head.modulation.dtype == torch.float64
    assert build("wan-tiny", dtype=torch.bfloat16).blocks[0].ffn[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("fields", [I2V, VACE], ids=["i2v", "vace, a timestep per token"])
@pytest.mark.parametrize("masters", [False, True], ids=["bf16 weights", "fp32 masters"])
def test_bfloat16_is_close_to_float32(tiny, batch, masters, fields):
    model = tiny(**fields)
    inputs = batch(model)
    if fields == VACE:
        inputs["t"] = inputs["t"][:, None].repeat(1, 60)
        inputs["t"][:, :12] = 0
    exact = model(**inputs)
    exact.square().mean().backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    if masters:
        other.compute_dtype = torch.bfloat16
    else:
        cast_weights(other, torch.bfloat16)
    out = other(**inputs)
    assert out.dtype == torch.float32
    assert close(out, exact)
    assert not torch.equal(out, exact)

    out.square().mean().backward()
    for (name, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        assert a.grad.dtype == a.dtype, name
        if masters:
            assert a.dtype == torch.float32
        if name in ("head.head.weight", "blocks.0.modulation", "time_projection.1.weight", "blocks.1.ffn.0.weight"):
            assert torch.nn.functional.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.99, name


def test_matrices_in_bfloat16_and_stream_in_float32(tiny, batch):
    model = tiny(**I2V)
    model.compute_dtype = torch.bfloat16
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm, RMSNorm)):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: (args[0].dtype, out.dtype)})
            )
    cores = []

    def core(q, k, v, sequence):
        cores.append({q.dtype, k.dtype, v.dtype})
        return v

    model.core = core
    stream = model.stem(**batch(model))
    stream = model.layer(0, stream)
    assert (stream.x.dtype, stream.rope.dtype, stream.mod.dtype) == (torch.float32,) * 3
    assert stream.text.dtype == torch.bfloat16
    assert cores == [{torch.bfloat16}]
    for name, dtypes in seen.items():
        wide = name.startswith("time_") or name in ("blocks.0.norm1", "blocks.0.norm2", "blocks.0.norm3", "head.norm")
        assert dtypes == ((torch.float32,) * 2 if wide else (torch.bfloat16,) * 2), name


@pytest.mark.parametrize(
    ("fields", "more"),
    [(I2V, "img_emb.proj.0.bias"), (VACE, "vace_patch_embedding.bias"), (VACE, "vace_blocks.1.modulation")],
)
def test_float64_is_float64_all_the_way(tiny, batch, fields, more):
    """So that tests of parallelism can compare in float64: a change of 1e-12 in a weight must be seen."""
    model = cast_weights(tiny(**fields), torch.float64)
    inputs = {name: value.double() for name, value in batch(model).items()}
    out = model(**inputs)
    assert out.dtype == torch.float64
    for name in ("time_embedding.0.bias", "blocks.0.norm3.weight", "blocks.0.modulation", more):
        with torch.no_grad():
            weight = model.get_parameter(name)
            weight.add_(1e-12)
            change = (model(**inputs) - out).abs().max().item()
            weight.sub_(1e-12)
        assert 1e-14 < change < 1e-9, name
