"""Toy checkpoints, written by hand: the library's own writer is what is tested."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import pytest

from mm_convert.families import VACE, WAN, Family

BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}

T2V = dict(dim=24, ffn_dim=40, freq_dim=32, text_dim=16, in_channels=16, out_channels=16, layers=3)
I2V = T2V | dict(in_channels=36, image_dim=20)
FLF2V = I2V | dict(image_tokens=514)
WIDE = T2V | dict(in_channels=36)
KINDS = {"t2v": T2V, "i2v": I2V, "flf2v": FLF2V, "wide": WIDE}
CONTROL = T2V | dict(control_channels=12, control_blocks=2)


def wan_shapes(dialect: str, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Wan of these sizes, by the table; of a VACE if it has control blocks."""
    sizes = {"patch_t": 1, "patch_h": 2, "patch_w": 2, **sizes}
    named = {"image": "image_dim", "image kv": "image_dim", "image positions": "image_tokens"}
    groups = {group for group, size in named.items() if size in sizes}
    family = VACE if "control_blocks" in sizes else WAN
    return family.table.shapes(dialect, sizes, {"i": sizes["layers"], "j": sizes.get("control_blocks", 0)}, groups)


# What all published models of a family have in common; presets say the rest.
_WAN = dict(freq_dim=256, text_dim=4096, patch_t=1, patch_h=2, patch_w=2)
PUBLISHED = {
    "wan": _WAN,
    "vace": _WAN,
    "opensoraplan": dict(freq_dim=256, patch=2),
    "qwen2.5-vl": dict(channels=3, pt=2, ph=14, pw=14, merged_dim=5120),
}


def published_shapes(family: Family, preset: str, dialect: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a preset, in our names if not said otherwise."""
    fields = family.presets[preset]
    sizes = {"q_dim": fields.get("dim"), **PUBLISHED.get(family.name, {}), **fields}
    layers = {"i": fields.get("num_layers"), "j": fields.get("vision_layers") or len(fields.get("vace_layers", ()))}
    image = fields.get("image_dim")
    said = {"image": image, "image kv": image, "image positions": fields.get("image_tokens", 0) > 257}
    said["untied"] = not fields.get("tied")
    groups = {group for group, present in said.items() if present}
    return family.table.shapes(dialect or family.table.dialects[0], sizes, layers, groups)


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        while left := position + 8 + len(raw) - file.tell():
            file.write(os.urandom(min(left, 2**20)))


def write_checkpoint(folder: Path, shapes: Mapping[str, tuple[int, ...]], files: int = 1, dtype: str = "F32") -> Path:
    """A folder as the hub has it, with as many files, tensors dealt out in sorted order."""
    folder.mkdir(parents=True, exist_ok=True)
    names, stem = sorted(shapes), "diffusion_pytorch_model"
    if files == 1:
        write_safetensors(folder / f"{stem}.safetensors", {name: shapes[name] for name in names}, dtype)
        return folder
    weight_map = {}
    for i in range(files):
        file = f"{stem}-{i + 1:05}-of-{files:05}.safetensors"
        part = names[i * len(names) // files : (i + 1) * len(names) // files]
        write_safetensors(folder / file, {name: shapes[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def diffusers_config(sizes: Mapping[str, int]) -> dict[str, object]:
    same = {key: sizes[key] for key in ("ffn_dim", "freq_dim", "text_dim", "in_channels", "out_channels")}
    return same | {
        "_class_name": "WanTransformer3DModel",
        "num_layers": sizes["layers"],
        "num_attention_heads": 2,
        "attention_head_dim": sizes["dim"] // 2,
        "patch_size": [1, 2, 2],
        "eps": 1e-6,
        "image_dim": sizes.get("image_dim"),
        "added_kv_proj_dim": sizes["dim"] if "image_dim" in sizes else None,
        "pos_embed_seq_len": sizes.get("image_tokens"),
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }


class Toys:
    """What the tests make checkpoints with."""

    kinds = KINDS
    control = CONTROL
    shapes = staticmethod(wan_shapes)
    published = staticmethod(published_shapes)
    write_safetensors = staticmethod(write_safetensors)
    write_checkpoint = staticmethod(write_checkpoint)
    diffusers_config = staticmethod(diffusers_config)

    @staticmethod
    def diffusers(folder: Path, kind: str = "t2v", files: int = 1, dtype: str = "F32") -> Path:
        """A transformer folder as diffusers writes it."""
        write_checkpoint(folder, wan_shapes("diffusers", KINDS[kind]), files, dtype)
        (folder / "config.json").write_text(json.dumps(diffusers_config(KINDS[kind])), encoding="utf-8")
        return folder


@pytest.fixture
def toys() -> Toys:
    return Toys()
