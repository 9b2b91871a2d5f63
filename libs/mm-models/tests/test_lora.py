"""Adapters: nothing at first, something after, the same when saved, loaded, merged, or read by peft."""

import json

import pytest
import torch

from mm_models import build
from mm_models.layers import cast_weights
from mm_models.lora import LoRAConfig, add_lora, load_lora, lora_state_dict, merge_lora, save_lora, write_lora
from mm_models.wan.start import initial

CONFIG = LoRAConfig(rank=4, alpha=8.0)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def adapt(model, seed=0):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture
def base(tiny):
    return lambda: tiny(text_tokens=40)


def test_starts_as_the_base_and_trains_nothing_else(base, batch):
    model = base()
    inputs, names = batch(model), set(model.state_dict())
    before = model(**inputs)
    add_lora(model, CONFIG)
    assert torch.equal(model(**inputs), before)
    model(**inputs).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(trained) == 3 * 10 * 2  # blocks, linears in each, A and B
    assert all("lora_" in name for name in trained)
    assert {name.replace(".base_layer.", ".") for name in model.state_dict() if "lora_" not in name} == names


def test_rank_alpha_and_targets(base, batch):
    model = add_lora(base(), LoRAConfig(rank=4, alpha=8.0, targets=("ffn.2", "blocks.1.self_attn.q")))
    shapes = {name: tuple(tensor.shape) for name, tensor in lora_state_dict(model).items()}
    assert shapes == {
        "blocks.1.self_attn.q.lora_A.weight": (4, 24),
        "blocks.1.self_attn.q.lora_B.weight": (24, 4),
        **{f"blocks.{i}.ffn.2.lora_A.weight": (4, 32) for i in range(3)},
        **{f"blocks.{i}.ffn.2.lora_B.weight": (24, 4) for i in range(3)},
    }
    adapt(model)
    layer, x = model.blocks[1].self_attn.q, torch.randn(2, 24)
    weights = lora_state_dict(model)
    a, b = (weights[f"blocks.1.self_attn.q.lora_{letter}.weight"] for letter in "AB")
    assert torch.allclose(layer(x), layer.base_layer(x) + 8 / 4 * x @ a.T @ b.T, atol=1e-6)


def test_save_load_merge(base, batch, tmp_path):
    model = adapt(add_lora(base(), CONFIG))
    inputs = batch(model)
    out = model(**inputs)
    assert relative(out, base()(**inputs)) > 0.05
    save_lora(model, tmp_path / "adapter")

    other = base()
    config = load_lora(other, tmp_path / "adapter")
    assert (config.rank, config.alpha) == (4, 8.0)
    assert torch.equal(other(**inputs), out)
    by_file = base()
    load_lora(by_file, tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(by_file(**inputs), out)

    merge_lora(other)
    assert set(other.state_dict()) == set(base().state_dict())
    assert relative(other(**inputs), out) < 1e-5


def test_peft_reads_our_files(base, batch, tmp_path):
    from peft import PeftModel

    model = adapt(add_lora(base(), CONFIG))
    inputs = batch(model)
    save_lora(model, tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(**inputs), model(**inputs))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


def test_write_from_the_tensors_of_a_checkpoint(base, batch, tmp_path):
    model = adapt(add_lora(base(), CONFIG))
    write_lora(tmp_path, model.state_dict(), CONFIG)
    other = base()
    load_lora(other, tmp_path)
    assert all(torch.equal(a, lora_state_dict(model)[name]) for name, a in lora_state_dict(other).items())


def test_bfloat16_base_with_float32_adapters(base, batch):
    model = add_lora(cast_weights(base(), torch.bfloat16), CONFIG)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    adapt(model)
    model(**batch(model)).square().mean().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    exact = adapt(add_lora(base(), CONFIG))
    assert relative(model(**batch(model)), exact(**batch(exact))) < 2e-2


def test_on_meta_then_filled_by_name():
    model = add_lora(build("wan-tiny", device="meta"), CONFIG)
    assert all(parameter.is_meta for parameter in model.parameters())
    a = initial("blocks.0.self_attn.q.lora_A.default.weight", (4, 160), 0)
    assert 0 < a.abs().max() <= 160**-0.5
    assert not initial("blocks.0.self_attn.q.lora_B.default.weight", (160, 4), 0).any()


def test_mistakes_are_named(base, tmp_path):
    with pytest.raises(ValueError, match=r"'to_q' names no linear of this model; there are .*self_attn\.q"):
        add_lora(base(), LoRAConfig(targets=("q", "to_q")))
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(add_lora(base(), CONFIG), CONFIG)
    with pytest.raises(ValueError, match="rank is 0"):
        LoRAConfig(rank=0)
    with pytest.raises(ValueError, match="no LoRA adapters: add_lora first"):
        save_lora(base(), tmp_path)
    with pytest.raises(ValueError, match="none of 1 tensors"):
        write_lora(tmp_path, {"head.modulation": torch.zeros(1)}, CONFIG)
    with pytest.raises(ValueError, match="holds no LoRA adapters"):
        load_lora(base(), tmp_path / "nowhere")


def test_files_that_do_not_fit(base, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    save_lora(add_lora(base(), CONFIG), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    with pytest.raises(ValueError, match="missing, unknown or misshapen"):
        load_lora(tiny(text_tokens=40, ffn_dim=64), file)
    with pytest.raises(ValueError, match="names no linear"):
        load_lora(tiny(text_tokens=40, num_layers=2), file)
    lonely = tmp_path / "lonely" / "lora.safetensors"
    lonely.parent.mkdir()
    save_file(tensors, lonely)
    with pytest.raises(ValueError, match="does not say its alpha"):
        load_lora(base(), lonely)
    name, _ = tensors.popitem()
    save_file(tensors, file, {"rank": "4", "alpha": "8"})
    with pytest.raises(ValueError, match=name.removeprefix("base_model.model.")):
        load_lora(base(), file)


def test_adapters_are_not_replaced_unasked(base, tmp_path):
    model = adapt(add_lora(base(), CONFIG))
    save_lora(model, tmp_path, base="a/base")
    with pytest.raises(ValueError, match="exists; name another directory, or give overwrite"):
        write_lora(tmp_path, model.state_dict(), CONFIG)
    save_lora(model, tmp_path, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        save_lora(model, tmp_path / "file")


def test_the_base_is_recorded(base, tmp_path):
    from safetensors import safe_open

    save_lora(add_lora(base(), CONFIG), tmp_path, base="a/base")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base"] == "a/base"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "a/base"


def test_damaged_and_contradictory_files(base, tmp_path):
    save_lora(add_lora(base(), CONFIG), tmp_path)
    file, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, config = file.read_bytes(), json.loads(beside.read_text())
    for length in (4, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
            load_lora(base(), tmp_path)
    file.write_bytes(whole)
    for change in ({"lora_alpha": 4}, {"r": 2}):
        beside.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="says rank 4 and alpha 8, but"):
            load_lora(base(), tmp_path)
    beside.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        load_lora(base(), tmp_path)
