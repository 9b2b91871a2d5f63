"""The files that people hold, through the programs: ComfyUI's scaled fp8 and GGUF train and generate as what they say.

The values are those of torch and of the package gguf; names and blocks are compared with diffusers' own readers.
"""

import json

import gguf
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from diffusers.quantizers.gguf.utils import dequantize_functions
from safetensors.torch import load_file, save_file

from mm_convert import convert, open_checkpoint
from mm_convert.families import WAN_VAE
from mm_data import FeatureCache
from mm_infer import load
from mm_infer.weights import Weights
from mm_models import build
from mm_models.wan.testing import write_encoders
from mm_train.recipe import load_config
from mm_train.train import train

MODEL = {"dim": 256, "num_heads": 2, "num_layers": 1, "ffn_dim": 256, "freq_dim": 256, "text_dim": 64}
VIDEO = {"height": 32, "width": 32, "frames": 1, "steps": 2, "guidance": 2.0}
KINDS = ("fp8", "gguf")
Q4_K = gguf.GGMLQuantizationType.Q4_K


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Features, encoders, and a random model: in scaled fp8, in GGUF, and each of them as plain bf16."""
    place = tmp_path_factory.mktemp("files")
    random = torch.Generator().manual_seed(0)
    with FeatureCache(place / "features") as cache:
        for i in range(2):
            tensors = {"latents": torch.randn(16, 1, 4, 4, generator=random)}
            tensors["text.0"] = torch.randn(5, 64, generator=random)
            cache.put(f"{i:064d}", tensors, {"id": f"{i}.mp4"})
        cache.finish()
    write_encoders(place / "encoders", text_dim=64)
    torch.manual_seed(1)
    model = build("wan-tiny", **MODEL)
    state = {
        name: torch.randn_like(tensor) / 16 if tensor.ndim > 1 else tensor
        for name, tensor in model.state_dict().items()
    }
    write_fp8(place, {name: tensor.half() for name, tensor in state.items()})
    write_gguf(place, state)
    return place


def write_fp8(place, state):
    """With ComfyUI's prefix, and every linear in fp8 with its scale."""
    file, plain = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in state.items():
        file[name] = plain[name] = tensor
        if tensor.ndim == 2:
            scale = tensor.float().abs().amax() / 448
            file[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            file[name.replace(".weight", ".scale_weight")] = scale
            plain[name] = (file[name].float() * scale).bfloat16()
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in file.items()}, place / "fp8.safetensors")
    save_file(plain, place / "fp8-plain.safetensors")


def write_gguf(place, state):
    """Linears in Q8_0, one in Q4_K, which random bytes are, as gguf only reads it; the rest in F32."""
    writer, plain = gguf.GGUFWriter(place / "gguf.gguf", "wan"), {}
    for name, tensor in state.items():
        values, kind = tensor.numpy(), None
        if tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", tensor.shape)
            values = values.reshape(-1, 256)
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, kind)
        if name == "blocks.0.ffn.0.weight":
            kind = Q4_K
            values = np.random.default_rng(0).integers(0, 255, (256, 144), np.uint8)
            values[:, [1, 3]] &= 0x1F  # the two scales of a block are small numbers
        writer.add_tensor(name, values, raw_dtype=kind)
        plain[name] = tensor
        if kind is not None:
            whole = gguf.quants.dequantize(values, kind)
            plain[name] = torch.from_numpy(whole.reshape(tensor.shape)).bfloat16()
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    save_file(plain, place / "gguf-plain.safetensors")


def path_of(place, kind):
    return next(place.glob(f"{kind}.*"))


def losses(place, weights, *more, model="wan-tiny"):
    """Of a run of two steps."""
    output = place / "runs" / "-".join([weights.stem, *(word.strip("-.") for word in more)])
    argv = ["--model", model, "--dtype", "float32", "--architecture", json.dumps(MODEL), "--weights", str(weights)]
    argv += ["--data.features", str(place / "features"), "--data.global_batch", "2", "--data.workers", "0"]
    train(
        load_config(
            [
                *argv,
                "--output",
                str(output),
                "--optim.lr",
                "1e-2",
                *more,
                *([] if "--steps" in more else ["--steps", "2"]),
            ]
        )
    )
    (metrics,) = output.rglob("metrics.jsonl")  # of an expert, in a folder of its own
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_weights_that_it_stands_for(kind, place, capfd):
    plain = place / f"{kind}-plain.safetensors"
    for how in (["--lora.rank", "2"], []):
        made = losses(place, path_of(place, kind), *how)
        said = capfd.readouterr().err
        words = "ComfyUI single file, fp8 scaled (e4m3fn) (16)" if kind == "fp8" else "GGUF file, Q8_0 (16), Q4_K (1)"
        assert f"({words}, read as bf16, 42 tensors" in said
        assert ("trained are the rounded weights, not those that they were made of" in said) == (not how)
        assert made == losses(place, plain, *how)
        assert len(set(made)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_video_is_that_of_the_weights_that_it_stands_for(kind, place, capsys):
    videos = [
        load(path, place / "encoders")("a cat", **VIDEO).latents
        for path in (path_of(place, kind), place / f"{kind}-plain.safetensors")
    ]
    assert "read as bf16" in capsys.readouterr().err
    assert torch.equal(*videos)
    assert videos[0].isfinite().all()


def test_two_files_are_the_two_experts(place):
    pair = place / "pair"
    pair.mkdir()
    for kind, half in zip(KINDS, ("HighNoise", "LowNoise"), strict=True):
        (pair / f"Wan2.2-T2V-A14B-{half}{path_of(place, kind).suffix}").hardlink_to(path_of(place, kind))
    weights = Weights(pair, place / "encoders", boundary=0.875)
    assert weights.facts.experts
    assert [one.checkpoint.quantised for one in weights.experts] == ["fp8 scaled (e4m3fn)", "Q8_0, Q4_K"]
    low = [
        losses(place, path, "--expert", "low", "--steps", "1", model="wan-tiny-a14b")
        for path in (pair, place / "gguf-plain.safetensors")
    ]
    assert low[0] == low[1]
    with pytest.raises(ValueError, match="is the expert for high noise, and --expert is low: give the other"):
        losses(place, next(pair.glob("*HighNoise*")), "--expert", "low", model="wan-tiny-a14b")


def test_names_and_blocks_are_those_of_diffusers(place):
    convert(place / "fp8-plain.safetensors", place / "theirs", to="diffusers")
    ours = load_file(place / "theirs/diffusion_pytorch_model.safetensors")
    theirs = convert_wan_transformer_to_diffusers(load_file(place / "fp8-plain.safetensors"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    sizes = dict(base_dim=8, z_dim=16, in_channels=3, out_channels=3)
    vae = WAN_VAE.table.shapes("original", sizes, {})
    save_file({name: torch.randn(shape) for name, shape in vae.items()}, place / "wan_2.1_vae.safetensors")
    convert(place / "wan_2.1_vae.safetensors", place / "vae", to="diffusers")
    theirs = convert_wan_vae_to_diffusers(load_file(place / "wan_2.1_vae.safetensors"))
    ours = load_file(place / "vae/diffusion_pytorch_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    (blocks,) = [one for one in gguf.GGUFReader(place / "gguf.gguf").tensors if one.tensor_type == Q4_K]
    raw = torch.from_numpy(blocks.data.copy()).view(-1, 144)
    theirs = dequantize_functions[Q4_K](raw, 256, 144, torch.float32).view(256, 256)
    assert torch.equal(open_checkpoint(place / "gguf.gguf")[blocks.name], theirs.bfloat16())
