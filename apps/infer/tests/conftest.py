"""Whole diffusers pipelines with random weights, small enough to run in a second and awake to their inputs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from safetensors.torch import save_file

from mm_convert.lora.base import KEY
from mm_models.wan.testing import tiny_encoders

CLIP = {"image_dim": 24, "added_kv_proj_dim": 40}  # 40: the width of the model
KINDS = {
    # name: class, two experts, fields of the transformer, arguments of the pipeline
    "t2v": (WanPipeline, 1, {}, {}),
    "a14b": (WanPipeline, 2, {}, {"boundary_ratio": 0.875}),
    "i2v": (WanImageToVideoPipeline, 1, {"in_channels": 36, **CLIP}, {}),
    "flf2v": (WanImageToVideoPipeline, 1, {"in_channels": 36, **CLIP, "pos_embed_seq_len": 514}, {}),
    "a14b-i2v": (WanImageToVideoPipeline, 2, {"in_channels": 36}, {"boundary_ratio": 0.9}),
    "5b": (WanImageToVideoPipeline, 1, {"in_channels": 48, "out_channels": 48}, {"expand_timesteps": True}),
    "vace": (WanVACEPipeline, 1, {"vace_layers": [0, 2]}, {}),
    "a14b-vace": (WanVACEPipeline, 2, {"vace_layers": [0, 2]}, {"boundary_ratio": 0.875}),
}


def transformer(seed: int, **fields) -> WanTransformer3DModel:
    """Head dim 20, so that the three bands of rotary positions differ; nothing at zero or one, to hide a mix-up."""
    torch.manual_seed(seed)
    cls = WanVACETransformer3DModel if "vace_layers" in fields else WanTransformer3DModel
    shape = {"num_attention_heads": 2, "attention_head_dim": 20, "ffn_dim": 48, "num_layers": 3, "text_dim": 32}
    model = cls(**shape, rope_max_seq_len=32, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "scale_shift_table" in name or "pos_embed" in name:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter *= 1.7  # so that a signal keeps its size
    return model.eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    """tiny(kind) -> its directory, as diffusers publishes them."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind in made:
            return made[kind]
        cls, experts, fields, arguments = KINDS[kind]
        parts = tiny_encoders(32, image_dim=fields.get("image_dim"), vae="wan2.2" if kind == "5b" else "wan2.1")
        with torch.no_grad():
            parts["vae"].quant_conv.weight *= 30  # or its latents would hardly differ from one picture to another
        parts |= {
            name: transformer(seed, **fields) for seed, name in enumerate(["transformer", "transformer_2"][:experts])
        }
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        whole: DiffusionPipeline = cls(scheduler=scheduler, **parts, **arguments)
        made[kind] = tmp_path_factory.mktemp("pipelines") / f"tiny-{kind}"
        whole.save_pretrained(made[kind])
        return made[kind]

    return make


def _write_lora(path: Path, seed: int, dim: int = 40, trained_on: dict[str, str] | None = None) -> Path:
    """In ComfyUI's names: of all queries, with the seed as rank, and of a bias whole."""
    random = torch.Generator().manual_seed(seed)
    tensors = {"diffusion_model.blocks.0.ffn.2.diff_b": torch.randn(dim, generator=random)}
    for i in range(3):
        name = f"diffusion_model.blocks.{i}.self_attn.q"
        tensors[f"{name}.lora_down.weight"] = torch.randn(seed, dim, generator=random)
        tensors[f"{name}.lora_up.weight"] = torch.randn(dim, seed, generator=random)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {KEY: json.dumps(trained_on)} if trained_on else None)
    return path


@pytest.fixture(scope="session")
def write_lora() -> Callable[..., Path]:
    return _write_lora


@pytest.fixture(scope="session")
def loras(tmp_path_factory) -> list[Path]:
    """Two of them, for the tiny text to video."""
    place = tmp_path_factory.mktemp("loras")
    return [_write_lora(place / f"{seed}.safetensors", seed) for seed in (2, 3)]


@pytest.fixture(scope="session")
def pipeline(tiny) -> Path:
    """Text to video."""
    return tiny("t2v")
