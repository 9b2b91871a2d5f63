"""Adapters: nothing at first, something after, the same when taken out, put in, merged, or by peft."""

import pytest
import torch

from mm_models import build
from mm_models.initial import initial_adapter
from mm_models.layers import cast_weights
from mm_models.lora import LoRAConfig, add_lora, load_lora, lora_state_dict, merge_lora

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


def test_without_targets_those_of_the_family():
    """Of every block of Open-Sora-Plan: two attentions and the feed-forward."""
    model = add_lora(build("opensoraplan-tiny", device="meta"), LoRAConfig(rank=2))
    adapted = {name.partition(".lora_")[0] for name in lora_state_dict(model)}
    ends = {f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")}
    ends |= {"ff.net.0.proj", "ff.net.2"}
    assert adapted == {f"transformer_blocks.{i}.{end}" for i in range(4) for end in ends}


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


def alphas(tensors, alpha=8.0):
    """Of each linear among the tensors of an adapter."""
    return {name.rpartition(".lora_")[0]: alpha for name in tensors}


def test_take_out_put_in_merge(base, batch):
    model = adapt(add_lora(base(), CONFIG))
    inputs = batch(model)
    out = model(**inputs)
    assert relative(out, base()(**inputs)) > 0.05
    tensors = lora_state_dict(model)

    other = load_lora(base(), tensors, alphas(tensors))
    assert torch.equal(other(**inputs), out)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in lora_state_dict(other).items())
    merge_lora(other)
    assert set(other.state_dict()) == set(base().state_dict())
    assert relative(other(**inputs), out) < 1e-5


def test_every_linear_has_its_own_rank_and_alpha(base):
    tensors, strengths = {}, {"blocks.1.self_attn.q": (2, 3.0), "blocks.2.self_attn.q": (5, 1.0)}
    for name, (rank, _) in strengths.items():
        tensors |= {f"{name}.lora_A.weight": torch.randn(rank, 24), f"{name}.lora_B.weight": torch.randn(24, rank)}
    model = load_lora(base(), tensors, {name: alpha for name, (_, alpha) in strengths.items()})
    x = torch.randn(2, 24)
    for name, (rank, alpha) in strengths.items():
        layer = model.get_submodule(name)
        a, b = (tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
        assert torch.allclose(layer(x), layer.base_layer(x) + alpha / rank * x @ a.T @ b.T, atol=1e-5)
    assert not hasattr(model.blocks[0].self_attn.q, "lora_A")


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
    a = initial_adapter("blocks.0.self_attn.q.lora_A.default.weight", (4, 160), 0)
    assert 0 < a.abs().max() <= 160**-0.5
    assert not initial_adapter("blocks.0.self_attn.q.lora_B.default.weight", (160, 4), 0).any()


def test_mistakes_are_named(base):
    with pytest.raises(ValueError, match=r"'to_q' names no linear of this model; there are .*self_attn\.q"):
        add_lora(base(), LoRAConfig(targets=("q", "to_q")))
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(add_lora(base(), CONFIG), CONFIG)
    with pytest.raises(ValueError, match="rank is 0"):
        LoRAConfig(rank=0)
    tensors = lora_state_dict(add_lora(base(), CONFIG))
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        load_lora(add_lora(base(), CONFIG), tensors, alphas(tensors))


def test_adapters_that_do_not_fit(base, tiny):
    tensors = lora_state_dict(add_lora(base(), CONFIG))
    with pytest.raises(ValueError, match="missing, unknown or misshapen"):
        load_lora(tiny(text_tokens=40, ffn_dim=64), tensors, alphas(tensors))
    with pytest.raises(ValueError, match="names no linear"):
        load_lora(tiny(text_tokens=40, num_layers=2), tensors, alphas(tensors))
    lost = next(name for name in tensors if "lora_B" in name)
    with pytest.raises(ValueError, match=lost):
        load_lora(base(), {name: t for name, t in tensors.items() if name != lost}, alphas(tensors))
