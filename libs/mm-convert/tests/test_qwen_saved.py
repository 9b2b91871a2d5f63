"""What training leaves of a Qwen2.5-VL: a folder of the hub, and adapters with the names that peft looks for."""

from __future__ import annotations

import json

import pytest

from mm_convert import open_checkpoint, open_lora, save_checkpoint, save_lora
from mm_convert.families import QWEN2_5_VL
from mm_convert.families.qwen2_5_vl import TABLE
from mm_convert.store.safetensors import read_file

torch = pytest.importorskip("torch")

TINY = dict(dim=32, ffn_dim=48, q_dim=32, kv_dim=16, vocab_size=72, vision_dim=48, vision_ffn_dim=56, merged_dim=192)
TINY |= dict(channels=3, pt=2, ph=4, pw=4)
SAID = {"num_heads": 4, "num_kv_heads": 2, "vision_heads": 4, "mrope_section": [1, 1, 2]}


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=draw)
        for name, shape in TABLE.shapes("transformers", TINY, {"i": 2, "j": 3}, ["untied"]).items()
    }


@pytest.fixture
def hub(tensors, tmp_path):
    """A folder as the hub has it, in its older or its newer spelling."""

    def write(newer: bool = False):
        folder = tmp_path / "hub"
        save_checkpoint(folder, tensors, SAID, to="transformers")
        path = folder / "config.json"
        said = json.loads(path.read_text(encoding="utf-8")) | {"torch_dtype": "bfloat16", "sliding_window": 32768}
        if newer:
            outside = ("model_type", "architectures", "vision_config", "torch_dtype")
            text = {name: said.pop(name) for name in [*said] if name not in outside}
            said |= {"text_config": text, "dtype": said.pop("torch_dtype"), "transformers_version": "5.0"}
        path.write_text(json.dumps(said), encoding="utf-8")
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
        (folder / "notes.txt").write_text("mine", encoding="utf-8")
        return folder

    return write


@pytest.mark.parametrize("newer", [False, True])
def test_the_published_configuration_is_kept_with_our_dtype(newer, hub, tensors, tmp_path):
    folder = hub(newer)
    published = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = {"published": folder, "copies": ("tokenizer.json", "merges.txt")}
    save_checkpoint(tmp_path / "out", tensors, SAID, to="transformers", dtype="float32", **files)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("config.json", "mm_convert.json", "model.safetensors", "tokenizer.json")
    }
    said = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert said == published | {"dtype" if newer else "torch_dtype": "float32"}
    again = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_of_another_architecture_nothing_is_kept(hub, tensors, tmp_path):
    """As with the processor of another size beside the weights."""
    folder = hub()
    path = folder / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"rope_theta": 1000000.0', '"rope_theta": 5.0'), "utf-8")
    save_checkpoint(tmp_path / "out", tensors, SAID, to="transformers", dtype="bfloat16", published=folder)
    said = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert (said["rope_theta"], said["torch_dtype"], "sliding_window" in said) == (1e6, "bfloat16", False)
    assert {open_checkpoint(tmp_path / "out").dtype(name) for name in tensors} == {"BF16"}


def test_our_own_form_is_as_it_was(hub, tensors, tmp_path):
    folder = hub()
    save_checkpoint(tmp_path / "out", tensors, SAID, published=folder)
    said = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert said["format"] == "mm"
    assert "torch_dtype" not in said


def test_adapters_have_the_names_of_models_in_memory(tmp_path):
    modules = {
        "model.layers.1.self_attn.q_proj": (32, 32),
        "model.layers.0.mlp.down_proj": (32, 48),
        "visual.blocks.2.attn.qkv": (144, 48),
        "visual.merger.mlp.0": (192, 192),
    }
    state = {f"{name}.lora_A.default.weight": torch.randn(2, width) for name, (_, width) in modules.items()}
    state |= {f"{name}.lora_B.default.weight": torch.randn(height, 2) for name, (height, _) in modules.items()}
    save_lora(tmp_path / "adapter", state, 4.0)
    written = read_file(tmp_path / "adapter/adapter_model.safetensors")[0]
    theirs = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in written}
    assert theirs == {
        *("model.language_model.layers.1.self_attn.q_proj", "model.language_model.layers.0.mlp.down_proj"),
        *("model.visual.blocks.2.attn.qkv", "model.visual.merger.mlp.0"),
    }
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert set(config["target_modules"]) == theirs
    again = open_lora(tmp_path / "adapter")
    assert again.family is QWEN2_5_VL
    assert {name: tuple(again[name].shape) for name in again} == {
        name.replace(".default", ""): tuple(tensor.shape) for name, tensor in state.items()
    }
    assert all(torch.equal(again[name.replace(".default", "")], tensor) for name, tensor in state.items())
