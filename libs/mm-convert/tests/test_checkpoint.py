"""What can be opened, by which path, and what its configuration is then."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from mm_convert import convert, inspect, open_checkpoint, save_checkpoint
from mm_convert.families import WAN


def test_every_way_to_name_a_checkpoint(toys, tmp_path):
    repository = tmp_path / "repository"
    toys.diffusers(repository / "transformer", "i2v", files=2)
    (repository / "model_index.json").write_text("{}")
    toys.write_safetensors(repository / "single.safetensors", toys.shapes("original", toys.kinds["i2v"]))
    convert(repository, tmp_path / "mm")
    convert(repository, tmp_path / "original", "original")
    one = open_checkpoint(repository)
    for path in (repository / "transformer", repository / "single.safetensors", tmp_path / "mm", tmp_path / "original"):
        other = open_checkpoint(path)
        assert set(other) == set(one)
        assert all(other.shape(name) == one.shape(name) for name in one)
        assert other.family == "wan"
    assert one.dtype("head.modulation") == "F32"


def test_two_experts_in_one_folder_must_be_told_apart(toys, tmp_path):
    for names in (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")):
        root = tmp_path / names[0]
        for name in names:
            toys.diffusers(root / name)
        with pytest.raises(ValueError, match=f"two models; name one of .*{names[0]} .*{names[1]}"):
            open_checkpoint(root)
        open_checkpoint(root / names[1])


def test_paths_that_hold_no_checkpoint(toys, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no \\*\\.safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.pt is not a file of torch\.save"):
        open_checkpoint(tmp_path / "weights.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.metadata"):
        open_checkpoint(tmp_path / "run")


def test_several_files_without_index(toys, tmp_path):
    source = toys.diffusers(tmp_path / "model", files=3)
    expected = set(open_checkpoint(source))
    next(source.glob("*.index.json")).unlink()
    assert set(open_checkpoint(source)) == expected  # a whole series needs no index
    (source / "diffusion_pytorch_model-00002-of-00003.safetensors").rename(source / "b.safetensors")
    with pytest.raises(ValueError, match="and no index; name one of them"):
        open_checkpoint(source)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "wide"])
def test_configuration_is_the_same_in_every_form(kind, toys, tmp_path):
    source = toys.diffusers(tmp_path / "source", kind)
    sizes = dict(toys.kinds[kind])
    expected = {"num_layers": sizes.pop("layers"), "num_heads": 2, "eps": 1e-6, "patch_size": [1, 2, 2]}
    expected |= {"image_dim": None, "image_tokens": 257, "text_tokens": 512} | sizes
    assert open_checkpoint(source).config == expected
    for to in ("mm", "original"):
        convert(source, tmp_path / to, to)
        assert open_checkpoint(tmp_path / to).config == expected


def test_the_published_original_config(toys):
    config = toys.kinds["t2v"] | dict(text_dim=4096, image_dim=None, image_tokens=257, num_layers=3, num_heads=2)
    config |= dict(patch_size=[1, 2, 2], eps=1e-6, text_tokens=512)
    assert WAN.write_config["original"](config) == {
        "_class_name": "WanModel",
        "dim": 24,
        "eps": 1e-6,
        "ffn_dim": 40,
        "freq_dim": 32,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": 2,
        "num_layers": 3,
        "out_dim": 16,
        "text_len": 512,
    }
    for change, model_type in (
        (dict(in_channels=36), "i2v"),
        (dict(in_channels=36, image_dim=20), "i2v"),
        (dict(in_channels=36, image_dim=20, image_tokens=514), "flf2v"),
        (dict(in_channels=48, out_channels=48), "ti2v"),
    ):
        assert WAN.write_config["original"](config | change)["model_type"] == model_type


def test_unusual_sizes_survive_every_dialect(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    about = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(about | {"text_len": 16, "eps": 1e-5}))
    for i, to in enumerate(("original", "mm", "diffusers")):
        convert(source, tmp_path / str(i), to)
        source = tmp_path / str(i)
        config = open_checkpoint(source).config
        assert (config["text_tokens"], config["eps"], config["text_dim"]) == (16, 1e-5, 16)


def test_the_tensors_are_believed_and_the_contradiction_said(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    about = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(about | {"ffn_dim": 48}))
    checkpoint = open_checkpoint(source)
    assert checkpoint.config["ffn_dim"] == 40
    assert "ffn_dim 48 instead of 40" in checkpoint.notes[0]
    (source / "config.json").write_text(json.dumps(about | {"qk_norm": "layer_norm"}))
    with pytest.raises(ValueError, match="qk_norm is 'layer_norm'"):
        open_checkpoint(source)
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        open_checkpoint(source)
    (source / "config.json").write_text('{"format": "mm", "version": 2}')
    with pytest.raises(ValueError, match="has version 2; this mm_convert reads 1"):
        open_checkpoint(source)


def test_without_config_the_published_head_size_is_taken(toys, tmp_path):
    sizes = toys.kinds["t2v"] | dict(dim=256)
    source = toys.write_checkpoint(tmp_path / "source", toys.shapes("original", sizes))
    checkpoint = open_checkpoint(source)
    assert checkpoint.config["num_heads"] == 2
    assert "num_heads is 2 if heads have 128 channels" in checkpoint.notes[0]
    convert(source, tmp_path / "mm")
    assert open_checkpoint(tmp_path / "mm").config["num_heads"] == 2


def test_inspect_counts(toys, tmp_path):
    about = inspect(toys.diffusers(tmp_path / "source", "i2v", files=2, dtype="BF16"))
    shapes = toys.shapes("diffusers", toys.kinds["i2v"])
    assert (about.tensors, about.files, about.dtypes) == (len(shapes), 2, {"BF16": len(shapes)})
    assert about.nbytes == 2 * about.parameters
    assert "diffusers" in str(about)
    assert about.fingerprint in str(about)


@dataclass
class Config:
    num_heads: int = 2
    eps: float = 1e-5
    patch_size: tuple[int, int, int] = (1, 2, 2)


@pytest.mark.parametrize("to", ["mm", "original", "diffusers"])
def test_save_checkpoint(to, toys, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {
        name: torch.randn(shape).to(torch.bfloat16 if "blocks" in name else torch.float32)
        for name, shape in toys.shapes("original", toys.kinds["flf2v"]).items()
    }
    tensors["head.head.weight"] = tensors["head.head.weight"].T.contiguous().T  # not contiguous
    save_checkpoint(tmp_path / "out", tensors, Config(), to=to, shard_bytes=30_000)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert set(checkpoint) == set(tensors)
    assert len({tensor.file for tensor in checkpoint.tensors.values()}) > 2
    for name, tensor in tensors.items():
        assert checkpoint[name].dtype == tensor.dtype
        assert torch.equal(checkpoint[name], tensor)
    assert (checkpoint.config["num_heads"], checkpoint.config["eps"], checkpoint.config["num_layers"]) == (2, 1e-5, 3)


def test_save_checkpoint_refuses(toys, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.zeros(shape) for name, shape in toys.shapes("original", toys.kinds["t2v"]).items()}
    with pytest.raises(ValueError, match="says num_layers 4, the tensors say 3"):
        save_checkpoint(tmp_path / "out", tensors, {"num_heads": 2, "num_layers": 4})
    with pytest.raises(ValueError, match=r"what is to be saved.*missing: head\.modulation"):
        save_checkpoint(tmp_path / "out", {k: v for k, v in tensors.items() if k != "head.modulation"}, {})
    with pytest.raises(ValueError, match=r"complex64, which safetensors cannot hold"):
        save_checkpoint(tmp_path / "out", tensors | {"head.modulation": torch.zeros(1, 2, 24).cfloat()}, {})
    assert not list(tmp_path.iterdir())
