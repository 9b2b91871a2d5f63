"""What peft trains and others write computes the same here, read by the one reader of adapters, or is refused."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import save_file

from mm_convert import open_checkpoint, open_lora, save_checkpoint
from mm_convert.cli import main
from mm_models import build
from mm_models.lora import load_lora

SMALL = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "text_dim": 16}
KINDS = {  # what peft's LoraConfig is told, besides targets
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "by module": {"r": 4, "lora_alpha": 6, "rank_pattern": {"v": 1, "ffn.0": 3}, "alpha_pattern": {"blocks.1.*q": 2}},
    "rslora by module": {"r": 4, "lora_alpha": 6, "rank_pattern": {"v": 1}, "use_rslora": True},
    "gaussian": {"r": 4, "lora_alpha": 3, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "lora_alpha": 3, "init_lora_weights": "orthogonal"},
    "eva": {"r": 4, "lora_alpha": 3, "init_lora_weights": "eva"},
    "mica": {"r": 4, "lora_alpha": 3, "init_lora_weights": "mica"},
}
REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, r"PiSSA: its factors belong on a base that was changed"),
    "pissa, fast": ({"init_lora_weights": "pissa_niter_4"}, r"PiSSA: its factors belong on a base that was changed"),
    "olora": ({"init_lora_weights": "olora"}, r"OLoRA: its factors belong on a base that was changed"),
    "dora": ({"use_dora": True}, r"DoRA"),
    "bias": ({"bias": "lora_only"}, r"a bias"),
    "lora_bias": ({"lora_bias": True}, r"a bias"),
    "modules_to_save": ({"modules_to_save": ["head.head"]}, r"more than plain LoRA"),
}
OTHERS = {
    "LoHa": (lambda targets: peft.LoHaConfig(r=2, alpha=2, target_modules=targets), "LoHa"),
    "LoKr": (lambda targets: peft.LoKrConfig(r=2, alpha=2, target_modules=targets), "LoKr"),
    "OFT": (lambda targets: peft.OFTConfig(r=0, oft_block_size=4, target_modules=targets), "OFT"),
    "IA3": (lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[]), "IA3"),
    "AdaLoRA": (lambda targets: peft.AdaLoraConfig(target_modules=targets, total_step=2), "AdaLoRA"),
}


def model(**fields):
    made = build("wan-tiny", **SMALL | fields)
    draw = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return made.eval()


def output(of) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    inputs = {"video": torch.randn(1, 16, 2, 4, 4, generator=draw), "t": torch.tensor([500.0])}
    inputs["text"] = torch.randn(1, 8, 16, generator=draw)
    if of.config.vace_layers:
        inputs["control"] = torch.randn(1, 96, 2, 4, 4, generator=draw)
    with torch.no_grad():
        return of(**inputs)


def trained(adapted, folder):
    """What peft saves of an adapted model, with every adapter drawn, and what it computes when it is loaded again."""
    torch.manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return output(adapted.get_base_model())


def adapted_by_us(path, **fields):
    adapter, ours = open_lora(path), model(**fields)
    return output(load_lora(ours, adapter, adapter.alphas).eval())


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_and_we_compute_the_same(kind, tmp_path):
    config = peft.LoraConfig(target_modules=["q", "v", "o", "ffn.0", "head.head", "time_projection.1"], **KINDS[kind])
    theirs = trained(peft.get_peft_model(model(), config), tmp_path / "peft")
    assert relative(theirs, output(model())) > 0.05
    assert relative(adapted_by_us(tmp_path / "peft"), theirs) < 1e-6

    for to in ("mm", "diffusers", "comfyui"):
        main(["convert", str(tmp_path / "peft"), str(tmp_path / to), "--to", to])
        assert relative(adapted_by_us(tmp_path / to), theirs) < 1e-6
    again = peft.PeftModel.from_pretrained(model(), tmp_path / "mm").eval()
    assert relative(output(again.get_base_model()), theirs) < 1e-6

    save_checkpoint(tmp_path / "base", model().state_dict(), model().config)
    main(["convert", str(tmp_path / "base"), str(tmp_path / "merged"), "--lora", str(tmp_path / "mm")])
    merged = model()
    merged.load_state_dict({name: t for name, t in open_checkpoint(tmp_path / "merged").items()})
    assert relative(output(merged), theirs) < 1e-5


@pytest.mark.parametrize("kind", REFUSED)
def test_what_plain_lora_would_compute_wrongly_is_refused(kind, tmp_path):
    more, message = REFUSED[kind]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v"], **more)
    trained(peft.get_peft_model(model(), config), tmp_path)
    with pytest.raises(ValueError, match=message):
        open_lora(tmp_path)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_of_peft_are_called_by_name(kind, tmp_path):
    make, name = OTHERS[kind]
    trained(peft.get_peft_model(model(), make(["q", "v"])), tmp_path)
    with pytest.raises(ValueError, match=name):
        open_lora(tmp_path)


def test_pissa_is_taken_as_peft_turns_it_into_plain_lora(tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q", "v"], init_lora_weights="pissa")
    adapted = peft.get_peft_model(model(), config)
    adapted.peft_config["default"].init_lora_weights = True  # the factors before training, as peft's guide saves them
    adapted.save_pretrained(tmp_path / "initial")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    theirs = output(adapted.get_base_model())
    plain = str(tmp_path / "initial")
    adapted.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=plain)
    assert relative(theirs, output(model())) > 1e-2
    assert relative(adapted_by_us(tmp_path / "plain"), theirs) < 1e-5


def test_names_of_every_trainer_are_the_same_adapter(tmp_path):
    """Linears and the embedding of patches, of both ladders, under the names of kohya, VideoX-Fun and DiffSynth."""
    vace, draw = {"vace_layers": (0,)}, torch.Generator().manual_seed(4)
    weights = model(**vace).state_dict()
    names = ("patch_embedding", "blocks.1.ffn.2", "vace_patch_embedding", "vace_blocks.0.self_attn.q", "head.head")
    factors, alphas = {}, {}
    for rank, name in enumerate(names, 1):
        out, *rest = weights[f"{name}.weight"].shape
        factors[name] = [
            torch.randn(rank, *rest, generator=draw) * 0.2,
            torch.randn(out, rank, *(1 for _ in rest[1:]), generator=draw) * 0.2,
        ]
        alphas[name] = 1.5 * rank + 1
    merged = model(**vace)
    for name, (a, b) in factors.items():
        delta = alphas[name] / a.shape[0] * b.flatten(1) @ a.flatten(1)
        merged.state_dict()[f"{name}.weight"].add_(delta.view_as(weights[f"{name}.weight"]))
    expected = output(merged)
    assert relative(expected, output(model(**vace))) > 0.05

    spellings = {
        "ours": lambda n: f"base_model.model.{n}",
        "comfyui": lambda n: f"diffusion_model.{n}",
        "kohya": lambda n: f"lora_unet_{n.replace('.', '_')}",
        "videox_fun": lambda n: f"lora_unet__{n.replace('.', '_')}",
        "diffsynth": lambda n: f"pipe.{'vace' if n.startswith('vace') else 'dit'}.{n}",
        "wrapped": lambda n: f"module.diffusion_model.{n}",
    }
    for spelling, spell in spellings.items():
        tensors = {}
        for name, (a, b) in factors.items():
            tensors |= {f"{spell(name)}.lora_down.weight": a, f"{spell(name)}.lora_up.weight": b}
            tensors |= {f"{spell(name)}.alpha": torch.tensor(alphas[name])}
        save_file(tensors, tmp_path / f"{spelling}.safetensors")
        assert relative(adapted_by_us(tmp_path / f"{spelling}.safetensors", **vace), expected) < 1e-6, spelling


def test_an_adapter_of_another_model_is_refused(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["blocks.1.ffn.0"])
    trained(peft.get_peft_model(model(), config), tmp_path)
    with pytest.raises(ValueError, match=r"blocks.1.ffn.0"):
        adapted_by_us(tmp_path, num_layers=1)
