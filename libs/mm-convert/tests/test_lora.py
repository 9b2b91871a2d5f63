from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_convert import open_lora, save_lora
from mm_convert.families import VACE, WAN
from mm_convert.lora.adapter import Adapter, LowRank
from mm_convert.lora.merging import merge
from mm_convert.lora.names import FILES, is_lora
from mm_convert.lora.reading import read_lora
from mm_convert.lora.writing import lora_tensors
from mm_convert.store.mm import name_of
from mm_convert.store.safetensors import read_file, write_file
from mm_convert.tensors.views import Computed, LazyTensor

DIM, FFN, RANK = 24, 40, 4
SHAPES = {"blocks.0.self_attn.q": (DIM, DIM), "blocks.1.cross_attn.o": (DIM, DIM), "blocks.1.ffn.0": (FFN, DIM)}
OURS = list(SHAPES)
DIFFUSERS = ["blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj"]
MINDSPEED = ["blocks.0.self_attn.proj_q", "blocks.1.cross_attn.proj_out", "blocks.1.ffn.0"]
SPELLINGS = {  # prefix, modules, A, B
    "peft": ("base_model.model.", OURS, "lora_A", "lora_B"),
    "diffusers": ("transformer.", DIFFUSERS, "lora_A", "lora_B"),
    "comfyui": ("diffusion_model.", OURS, "lora_down", "lora_up"),
    "kohya": ("lora_unet_", [name.replace(".", "_") for name in OURS], "lora_down", "lora_up"),
    "diffsynth": ("", OURS, "lora_A.default", "lora_B.default"),
    "mindspeed": ("", MINDSPEED, "lora_A.default", "lora_B.default"),
}


def constant(data: bytes, shape: tuple[int, ...], dtype: str = "F32") -> LazyTensor:
    row = len(data) // max(1, shape[0] if shape else 1)
    return Computed(dtype, shape, lambda start, stop: data[start * row : stop * row])


def matrix(*shape: int, seed: int = 0) -> LazyTensor:
    count = shape[0] * shape[1]
    return constant(struct.pack(f"<{count}f", *(((i + seed) * 7919 % 101) / 50 - 1 for i in range(count))), shape)


def scalar(alpha: float) -> LazyTensor:
    return constant(struct.pack("<f", alpha), ())


def tensors_of(format: str, rank: int = RANK) -> dict[str, LazyTensor]:
    """An adapter as this format has it, without its alpha."""
    prefix, names, a, b = SPELLINGS[format]
    found: dict[str, LazyTensor] = {}
    for seed, (name, (height, width)) in enumerate(zip(names, SHAPES.values(), strict=True)):
        found[f"{prefix}{name}.{a}.weight"] = matrix(rank, width, seed=seed)
        found[f"{prefix}{name}.{b}.weight"] = matrix(height, rank, seed=seed + 50)
    return found


def content(adapter: Adapter) -> dict[str, tuple[Any, ...]]:
    return {
        name: (m.alpha, *((f.dtype, f.shape, bytes(f.read())) for f in (m.a, m.b)))
        for name, m in adapter.modules.items()
    }


def read(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None, config=None, **given) -> Adapter:
    return read_lora(tensors, metadata or {}, config, "x.safetensors", **given)


@pytest.mark.parametrize("format", SPELLINGS)
def test_every_format_is_read_by_its_names(format: str) -> None:
    adapter = read(tensors_of(format), alpha=8)
    assert (adapter.family, adapter.format, adapter.rank, adapter.alpha) == (WAN, format, RANK, 8.0)
    assert content(adapter) == content(read(tensors_of("peft"), alpha=8))
    assert list(adapter.modules) == OURS


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "kohya", "diffsynth"])
def test_alpha_said_nowhere_is_the_rank_as_loaders_take_it(format: str) -> None:
    adapter = read(tensors_of(format))
    assert adapter.alpha == RANK
    assert "taken to be the rank" in adapter.notes[0]


@pytest.mark.parametrize("format", ["mindspeed", "peft"])
def test_alpha_is_never_guessed_where_it_is_free(format: str) -> None:
    with pytest.raises(ValueError, match=r"does not say its alpha .*--lora_alpha.*; the rank is 4"):
        read(tensors_of(format))


def test_names_that_mindspeed_shares_with_others_do_not_say_alpha() -> None:
    tensors = {name: tensor for name, tensor in tensors_of("diffsynth").items() if ".ffn." in name}
    with pytest.raises(ValueError, match="MindSpeed-MM's as well as others'"):
        read(tensors)
    assert read(tensors, alpha=2).alpha == 2


@pytest.mark.parametrize("prefix", ["pipe.dit.", "dit."])
def test_diffsynth_prefixes(prefix: str) -> None:
    adapter = read({prefix + name.replace(".default", ""): t for name, t in tensors_of("diffsynth").items()})
    assert (adapter.format, list(adapter.modules)) == ("diffsynth", OURS)


@pytest.mark.parametrize(
    ("dtype", "data"), [("F16", "<e"), ("F32", "<f"), ("F64", "<d"), ("I64", "<q"), ("BF16", None)]
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_tensors(dtype: str, data: str | None, shape: tuple[int, ...]) -> None:
    raw = struct.pack(data, 8) if data else struct.pack("<f", 8)[2:]
    tensors = tensors_of("comfyui")
    tensors[f"diffusion_model.{OURS[0]}.alpha"] = constant(raw, shape, dtype)
    adapter = read(tensors)
    assert [module.alpha for module in adapter.modules.values()] == [8, RANK, RANK]
    assert adapter.alpha is None
    assert "alpha of 2 modules" in adapter.notes[0]


def test_the_low_noise_expert_of_diffusers() -> None:
    tensors = {name.replace("transformer.", "transformer_2."): t for name, t in tensors_of("diffusers").items()}
    said = {"lora_adapter_metadata": json.dumps({"transformer_2.r": RANK, "transformer_2.lora_alpha": 6})}
    assert read(tensors, said).alpha == 6
    with pytest.raises(ValueError, match=r"mixes adapters of several kinds: it holds transformer.*, transformer"):
        read(tensors | tensors_of("diffusers"))


def test_peft_patterns_and_rslora() -> None:
    config = {
        "r": RANK,
        "lora_alpha": 8,
        "alpha_pattern": {"^blocks.0.self_attn.q": 2, r".*\.o": 5},
        "rank_pattern": {},
    }
    adapter = read(tensors_of("peft"), config=config)
    assert [module.alpha for module in adapter.modules.values()] == [2, 5, 8]
    assert read(tensors_of("peft"), config={"lora_alpha": 8, "use_rslora": True}).alpha == 8 * RANK**0.5
    with pytest.raises(ValueError, match="_pattern that is not read"):
        read(tensors_of("peft"), config={"lora_alpha": 8, "alpha_pattern": {"(": 1}})


@pytest.mark.parametrize(
    ("flat", "module"),
    [
        ("blocks_12_cross_attn_k_img", "blocks.12.cross_attn.k_img"),
        ("blocks_3_attn1_to_out_0", "blocks.3.self_attn.o"),
        ("vace_blocks_3_self_attn_q", "vace_blocks.3.self_attn.q"),
        ("vace_blocks_0_before_proj", "vace_blocks.0.before_proj"),
        ("text_embedding_2", "text_embedding.2"),
    ],
)
def test_kohya_names_have_lost_their_dots(flat: str, module: str) -> None:
    name = f"lora_unet_{flat}.lora_"
    adapter = read({f"{name}down.weight": matrix(RANK, DIM), f"{name}up.weight": matrix(DIM, RANK)})
    assert list(adapter.modules) == [module]


@pytest.mark.parametrize(
    ("metadata", "config", "given", "message"),
    [
        ({"rank": "8", "alpha": "8"}, None, {}, r"header of x.* says rank 8, .* have 4"),
        ({"rank": "4", "alpha": "8"}, {"r": 4, "lora_alpha": 16}, {}, r"says alpha 8 .* says 16"),
        ({}, {"r": 16, "lora_alpha": 16}, {}, r"adapter_config.json of x.* says rank 16, .* have 4"),
        ({"rank": "4", "alpha": "8"}, None, {"alpha": 16}, r"caller says alpha 16 .* says 8"),
        ({"rank": "4", "alpha": "8"}, None, {"rank": 8}, r"caller says rank 8, .* have 4"),
        ({}, None, {"alpha": 8, "rank": 0}, r"caller says rank 0; it must be a number other than 0"),
        ({"rank": "4", "alpha": "nan"}, None, {}, r"says alpha 'nan'"),
        ({"rank": "four", "alpha": "8"}, None, {}, r"says rank 'four'"),
        ({"lora_adapter_metadata": "[1"}, None, {}, r"not a JSON object"),
        ({}, {"r": 10**400, "lora_alpha": 8}, {}, r"says rank 1000*; it must be a number"),
        ({}, {"r": 4, "lora_alpha": 8, "lora_dropout": {"q": 1}}, {}, r"says lora_dropout {'q': 1}"),
        ({}, {"r": 4, "lora_alpha": True}, {}, r"says alpha True; it must be a number"),
        (
            {},
            {"r": 4, "lora_alpha": 8, "use_rslora": "false"},
            {},
            r"says use_rslora 'false'; it must be true or false",
        ),
        ({}, {"r": 4, "lora_alpha": None}, {}, r"its adapter_config.json says none for some modules"),
        ({}, None, {}, r"no adapter_config.json is read: it counts beside a file of the name adapter_model alone"),
        ({}, {"r": 4, "lora_alpha": 8, "use_dora": True}, {}, r"uses use_dora True: this is not plain LoRA"),
        ({}, {"r": 4, "lora_alpha": 8, "bias": "all"}, {}, r"uses bias 'all'"),
        ({}, {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}, {}, r"uses init_lora_weights 'pissa"),
    ],
)
def test_places_that_contradict_the_factors_or_one_another(metadata, config, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        read(tensors_of("peft"), metadata, config, **given)


Q = "base_model.model.blocks.0.self_attn.q."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q + "lora_B.weight": None}, r"incomplete: it has .*self_attn.q.lora_A.weight without its B"),
        ({Q + "lora_A.weight": None}, r"without its A"),
        ({"base_model.model.head.head.alpha": scalar(1)}, r"head.head.alpha without its A"),
        ({Q + "lora_B.weight": matrix(DIM, 3)}, r"q has A \[4, 24\] and B \[24, 3\], of rank 4 and 3"),
        ({Q + "lora_B.weight": matrix(DIM + 1, RANK)}, r"q has shape \[25, 24\], expected dim"),
        ({Q + "lora_A.weight": matrix(0, DIM), Q + "lora_B.weight": matrix(DIM, 0)}, r"of rank 0 and 0"),
        ({Q + "lora_A.weight": constant(bytes(16), (4,))}, r"expected are \[rank, in\] and \[out, rank\]"),
        ({Q + "lora_B.bias": matrix(DIM, 1)}, r"lora_B.bias \(a bias\)"),
        ({Q + "lora_magnitude_vector": matrix(DIM, 1)}, r"\(magnitudes of DoRA\)"),
        ({Q + "diff": matrix(DIM, 1)}, r"\(a whole difference of a weight\)"),
        ({Q + "diff_b": matrix(DIM, 1)}, r"\(a whole difference of a bias\)"),
        ({Q + "lokr_w1": matrix(DIM, 1)}, r"\(Kronecker factors \(LoKr\)\)"),
        ({Q + "weight": matrix(DIM, 1)}, r"more than plain LoRA"),
        ({Q + "lora_A.other.weight": matrix(RANK, DIM)}, r"several adapters: None, other"),
        ({Q + "lora_down.weight": matrix(RANK, DIM)}, r"has A of .*self_attn.q twice"),
        ({"lora_unet_blocks_0_ffn_0.lora_up.weight": matrix(FFN, RANK)}, r"mixes adapters of several kinds"),
        (
            {Q.replace("q.", "qq.") + part + ".weight": matrix(4, 4) for part in ("lora_A", "lora_B")},
            r"the nearest being wan \(original names\): it has blocks.0.self_attn.qq \(nearest: blocks.0.self_attn.q\)",
        ),
    ],
)
def test_what_is_no_whole_plain_adapter_is_refused(changes, message) -> None:
    tensors = {name: t for name, t in (tensors_of("peft") | changes).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        read(tensors, alpha=4)


@pytest.mark.parametrize(
    ("format", "metadata"),
    [
        ("comfyui", {"r": "4", "lora_alpha": "8"}),
        ("comfyui", {"network_dim": "4", "network_alpha": "8"}),
        ("comfyui", {"ss_network_dim": "4", "ss_network_alpha": "8.0", "ss_network_module": "networks.lora_wan"}),
        ("kohya", {"lora_rank": "4", "lora_alpha": "8"}),
        ("diffsynth", {"lora_r": "4", "LoRA_Alpha": "8"}),
        ("diffusers", {"transformer.r": "4", "transformer.lora_alpha": "8"}),
        ("diffusers", {"transformer.lora_alpha": "8", "transformer_2.lora_alpha": "16"}),
        ("diffusers", {"transformer": '{"r": 4, "lora_alpha": 8}'}),
        ("comfyui", {"transformer.lora_alpha": "8"}),
        ("comfyui", {"lora_config": '{"transformer": {"r": 4, "lora_alpha": 8}}'}),
        ("comfyui", {"lora_config": '{"lora_alpha": "8", "use_rslora": "False"}', "ss_network_alpha": "8"}),
        ("comfyui", {"lora_alpha": "4", "use_rslora": "True", "use_dora": "False", "bias": "none", "alora": "None"}),
        ("comfyui", {"lora_alpha": "3", "alpha_pattern": '{".*": 8}'}),
        ("peft", {"ss_network_alpha": "8", "ss_network_dim": "Dynamic"}),
        ("comfyui", {"config": '{"model": {"lora": {"alpha": 8}}, "world": {"rank": 0}}'}),
        ("comfyui", {"training.lora/alpha": "8", "loraRank": "4"}),
        ("comfyui", {"LoRA Alpha": "8", "prompt": '{"3": {"inputs": {"alpha": 0.5}}}', "lora_scale": "1.0"}),
    ],
)
def test_a_header_says_alpha_in_many_words(format: str, metadata: dict[str, str]) -> None:
    adapter = read(tensors_of(format), metadata)
    assert (adapter.alpha, adapter.notes) == (8, ())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_alpha": "8", "alpha": "16"}, r"header of x.* says two things: lora_alpha '8' and alpha '16'"),
        ({"lora_alpha": "8", "ss_network_alpha": "16"}, r"\(ss_…\) says alpha 16 .* says 8"),
        ({"transformer.lora_alpha": "8", "transformer_2.lora_alpha": "16"}, r"says two things"),
        ({"network_dim": "16", "network_alpha": "8"}, r"says rank 16, but the factors .* have 4"),
        ({"lora_config": "{'lora_alpha': 8}"}, r"its header says lora_config {'lora_alpha': 8}, .*--lora_alpha"),
        ({"lora_alpha": "8", "use_dora": "True"}, r"uses use_dora True: this is not plain LoRA.*DoRA, with magnitudes"),
        ({"lora_scale": "2.0"}, r"its header says lora_scale 2.0, .*--lora_alpha"),
        ({"alpha_of_all": "8"}, r"does not say its alpha \(its header says alpha_of_all 8, .*--lora_alpha"),
    ],
)
def test_a_header_that_contradicts_itself_or_is_not_understood(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tensors_of("comfyui"), metadata)


@pytest.mark.parametrize("other", ["text_encoder", "text_encoder_2", "transformer_2"])
def test_what_a_header_says_of_another_model_is_not_taken(other: str) -> None:
    said = {"lora_adapter_metadata": json.dumps({f"{other}.r": RANK, f"{other}.lora_alpha": 8})}
    with pytest.raises(ValueError, match="does not say its alpha"):
        read(tensors_of("diffusers"), said)


def test_an_alpha_tensor_is_asked_before_the_record_of_a_training() -> None:
    tensors = tensors_of("kohya") | {f"lora_unet_{OURS[0].replace('.', '_')}.alpha": scalar(2)}
    adapter = read(tensors, {"ss_network_alpha": "16", "ss_network_dim": "4"})
    assert [module.alpha for module in adapter.modules.values()] == [2, 16, 16]
    unsaid = {
        "software": '{"lora_tool": "2-alpha"}',
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
        "ss_tag_frequency": '{"alpha": {"r": 1}}',
    }
    assert [module.alpha for module in read(tensors, unsaid).modules.values()] == [2, 4, 4]


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"])
def test_factors_that_belong_on_a_changed_base_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"belong on a base that was changed before training.*merge_and_unload"):
        read(tensors_of("peft"), config={"r": 4, "lora_alpha": 8, "init_lora_weights": value})


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lokr_w1", "LoKr"),
        ("hada_w1_a", "LoHa"),
        ("ia3_l", "IA3"),
        ("oft_R.weight", "OFT"),
        ("lora_magnitude_vector", "DoRA"),
        ("diff_b", "difference of a bias"),
        ("diff", "difference of a weight"),
        ("lora_E", "AdaLoRA"),
    ],
)
def test_other_kinds_are_called_by_name(name: str, what: str) -> None:
    tensors = {Q + name: matrix(DIM, 1)}
    assert is_lora(tensors)
    with pytest.raises(ValueError, match=rf"more than plain LoRA.*{what}.*merge it into its base with the tool"):
        read(tensors)


def test_the_first_names_of_diffusers() -> None:
    tensors = {n.replace("_A.", ".down.").replace("_B.", ".up."): t for n, t in tensors_of("diffusers").items()}
    assert is_lora(tensors)
    assert (read(tensors).format, list(read(tensors).modules)) == ("diffusers", OURS)


def test_names_of_videox_fun_and_lycoris_are_flat_too() -> None:
    for prefix in ("lora_unet__", "lora_transformer_", "lycoris_"):
        tensors = {name.replace("lora_unet_", prefix, 1): t for name, t in tensors_of("kohya").items()}
        assert (read(tensors).format, list(read(tensors).modules)) == ("kohya", OURS)


def test_one_file_of_diffsynth_may_adapt_both_ladders() -> None:
    dit = {f"pipe.dit.{name}": t for name, t in tensors_of("diffsynth").items()}
    vace = {f"pipe.vace.vace_{name}": t for name, t in tensors_of("diffsynth").items()}
    adapter = read(dit | vace)
    assert (adapter.family, adapter.format) == (VACE, "diffsynth")
    assert list(adapter.modules) == [*OURS, *(f"vace_{name}" for name in OURS)]
    assert list(read(vace).modules) == [f"vace_{name}" for name in OURS]
    other = {name.replace("pipe.dit.", "pipe.dit2."): t for name, t in dit.items()}
    with pytest.raises(ValueError, match=r"mixes adapters.*pipe.dit2. is the expert for low noise.*low_noise_model/"):
        read(dit | other)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "generator_ema.", "model."])
@pytest.mark.parametrize("format", ["comfyui", "diffsynth", "peft"])
def test_wrappers_of_trainers_are_no_part_of_a_name(wrapper: str, format: str) -> None:
    tensors = {wrapper + name: t for name, t in tensors_of(format).items()}
    assert list(read(tensors, alpha=4).modules) == OURS
    with pytest.raises(ValueError, match="does not say its alpha"):  # no loader knows such names
        read(tensors)


def test_a_layer_that_was_compiled_keeps_its_name() -> None:
    tensors = {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in tensors_of("peft").items()}
    assert list(read(tensors, alpha=4).modules) == OURS


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["double_blocks.0.img_attn_qkv"], r"no LoRA of a family that is known \(wan, .*HunyuanVideo or Flux"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1"], r"adapter of a text encoder"),
        (["down_blocks.0.attentions.0.proj_in"], r"a UNet"),
        (["blocks.0.attn1.to_k", "blocks.0.attn1.to_qkv"], r"fused linears, .*: blocks.0.attn1.to_qkv.*merge"),
        (["blocks.0.self_attn.q", "face_adapter.fuser_blocks.0.linear1_kv2"], r"Wan2.2-Animate"),
    ],
)
def test_modules_that_are_unknown_are_said_to_be_what_they_are(modules: list[str], message: str) -> None:
    parts = {"lora_A": matrix(RANK, DIM), "lora_B": matrix(DIM, RANK)}
    with pytest.raises(ValueError, match=message):
        read({f"{module}.{part}.weight": tensor for module in modules for part, tensor in parts.items()})


def test_a_text_encoder_beside_is_said() -> None:
    te = {n.replace("lora_unet_", "lora_te_"): t for n, t in tensors_of("kohya").items()}
    with pytest.raises(ValueError, match=r"of a text encoder, which cannot be adapted here"):
        read(tensors_of("kohya") | te)


def test_a_checkpoint_is_no_adapter(toys) -> None:
    assert not is_lora(toys.shapes("original", toys.kinds["i2v"]))
    assert not is_lora(toys.shapes("diffusers", toys.kinds["i2v"]))
    for format in SPELLINGS:
        assert is_lora(tensors_of(format))
    with pytest.raises(ValueError, match=r"holds no tensors$"):
        read({})


def test_an_adapter_of_vace_has_both_ladders_of_mindspeed() -> None:
    names = {
        "blocks.0.ffn.0": (FFN, DIM),
        "vace_blocks.1.self_attn.q": (DIM, DIM),
        "vace_blocks.0.before_proj": (DIM, DIM),
    }
    adapter = Adapter(
        VACE, "peft", "original", {n: LowRank(matrix(2, w), matrix(h, 2), 1.0) for n, (h, w) in names.items()}
    )
    tensors, metadata, _ = lora_tensors(adapter, "mindspeed")
    assert "vace_dit.vace_blocks.1.wan_dit_block.self_attn.proj_q.lora_A.default.weight" in tensors
    again = read(tensors, metadata)
    assert (again.family, again.format, content(again)) == (VACE, "mindspeed", content(adapter))


# --- writing

FORMATS = ["mm", "peft", "diffusers", "comfyui", "mindspeed"]


def test_a_uniform_adapter_is_written_as_mm_models_writes_it() -> None:
    tensors, metadata, config = lora_tensors(read(tensors_of("diffsynth"), {"base": "B"}, alpha=8), "mm")
    assert metadata == {"format": "pt", "base": "B", "rank": "4", "alpha": "8.0"}
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, OURS)
    assert list(tensors) == list(tensors_of("peft"))


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    modules = {}
    for name in draw(st.lists(st.sampled_from([*OURS, "head.head", "time_projection.1"]), min_size=1, unique=True)):
        height, width = {"head.head": (64, DIM), "time_projection.1": (6 * DIM, DIM)}.get(name) or SHAPES[name]
        rank, dtype = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from(["BF16", "F32"]))
        bytes_each = {"BF16": 2, "F32": 4}[dtype]
        seed = draw(st.integers(0, 250))
        a, b = (
            constant(bytes((i * seed) % 251 for i in range(h * w * bytes_each)), (h, w), dtype)
            for h, w in ((rank, width), (height, rank))
        )
        modules[name] = LowRank(a, b, draw(st.floats(1e-3, 1e3) | st.sampled_from([1.0, 16.0])))
    return Adapter(WAN, "peft", "original", modules, base=draw(st.sampled_from(["", "Wan-AI/Wan2.1"])))


@settings(deadline=None)
@given(adapters(), st.permutations(FORMATS))
def test_factors_and_alpha_survive_every_format(tmp_path_factory, adapter: Adapter, formats: list[str]) -> None:
    path = tmp_path_factory.mktemp("lora") / "adapter.safetensors"
    expected = content(adapter)
    for format in formats:
        tensors, metadata, config = lora_tensors(adapter, format)
        assert (config is not None) == (format in ("mm", "peft"))
        path.unlink(missing_ok=True)
        write_file(path.with_name("new"), tensors, metadata, lambda count: None)
        path.with_name("new").rename(path)
        stored, header = read_file(path)
        again = read_lora(stored, header, json.loads(json.dumps(config)), str(path))
        assert content(again) == expected
        assert (again.base, again.notes) == (adapter.base, ())


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be written as 'kohya', but as mm, peft, diffusers"):
        lora_tensors(read(tensors_of("diffsynth")), "kohya")
    assert set(FILES) < set(FORMATS)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("/home/me/models/Wan2.1-T2V-1.3B-Diffusers/transformer", "Wan2.1-T2V-1.3B-Diffusers"),
        ("../d/tinybase/", "tinybase"),
        ("C:\\models\\Wan2.1\\high_noise_model", "Wan2.1"),
        ("/c/hub/models--Wan-AI--Wan2.1-T2V-14B/snapshots/0123abc/transformer", "Wan-AI/Wan2.1-T2V-14B"),
        ("/home/me/weights", "weights"),
        ("Wan-AI/Wan2.1-T2V-14B", "Wan-AI/Wan2.1-T2V-14B"),
        (Path("d/tinybase"), "tinybase"),
        ("", ""),
    ],
)
def test_the_way_to_a_base_stays_at_home(tmp_path: Path, base: str | Path, name: str) -> None:
    assert name_of(base) == name
    adapter = replace(read(tensors_of("peft"), alpha=8), base=name if isinstance(base, Path) else base)
    for to in FORMATS:
        _, header, config = lora_tensors(adapter, to)
        assert header.get("base", "") == name
        if config:
            assert config["base_model_name_or_path"] == (name or None)


# --- merging


def test_a_base_without_the_module_or_of_another_size_is_refused() -> None:
    base = {f"{name}.weight": matrix(*shape) for name, shape in SHAPES.items()}
    adapter = read(tensors_of("peft"), alpha=8)
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q, which the base has not"):
        merge({name: t for name, t in base.items() if "q" not in name}, adapter)
    with pytest.raises(ValueError, match=r"ffn.0 for \[40, 24\], which in the base is \[40, 25\]"):
        merge(base | {"blocks.1.ffn.0.weight": matrix(40, 25)}, adapter)
    with pytest.raises(ValueError, match="in F8_E4M3, where sums need"):
        merge(base | {"blocks.1.ffn.0.weight": constant(bytes(FFN * DIM), (FFN, DIM), "F8_E4M3")}, adapter)
    whole = {name: constant(bytes(prod(t.shape)), t.shape, "I8") for name, t in tensors_of("peft").items()}
    with pytest.raises(ValueError, match=r"this adapter is quantised: it has .* in I8"):
        merge(base, read(whole, alpha=8))


@pytest.fixture(scope="module")
def wan():
    """A tiny model of diffusers, in float64."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=FFN,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model.double().eval()


def output(model) -> Any:
    import torch

    draw = torch.Generator().manual_seed(1)
    video = torch.randn(1, 4, 3, 4, 4, generator=draw, dtype=torch.float64)
    text = torch.randn(1, 5, 16, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        return model(video, torch.tensor([500]), text, return_dict=False)[0]


def stored_model(model, folder: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Our name -> tensor of a diffusers model, and our name -> its own."""
    from mm_convert.read.content import identify

    model.save_pretrained(folder)
    found, _ = read_file(folder / "diffusion_pytorch_model.safetensors")
    names = identify({name: tensor.shape for name, tensor in found.items()}, str(folder)).names
    return {names[name]: tensor for name, tensor in found.items()}, {ours: theirs for theirs, ours in names.items()}


def loaded(merged: Mapping[str, LazyTensor], names: Mapping[str, str]) -> dict[str, Any]:
    from mm_convert.tensors.torch import Maps

    return {names[ours]: Maps().tensor(tensor) for ours, tensor in merged.items()}


@pytest.fixture(scope="module")
def trained(wan, tmp_path_factory):
    """Adapters on `wan` as peft saves them, of several ranks and strengths; and what peft itself merges."""
    import copy

    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights=False,
        target_modules=["to_q", "to_out.0", "ffn.net.0.proj", "patch_embedding", "proj_out"],
        rank_pattern={"blocks.1.attn1.to_q": 2, "attn2.to_q": 3},
        alpha_pattern={"^blocks.0.attn1.to_q": 1.5},
    )
    torch.manual_seed(2)
    model = peft.get_peft_model(copy.deepcopy(wan), config)
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder)
    tensors, metadata = read_file(folder / "adapter_model.safetensors")
    adapter = read_lora(tensors, metadata, json.loads((folder / "adapter_config.json").read_text()), str(folder))
    adapted = output(model)
    return adapter, adapted, model.merge_and_unload()


def test_merging_is_what_peft_merges_and_computes_what_the_adapted_model_does(wan, trained, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    adapter, adapted, by_peft = trained
    assert (adapter.format, adapter.dialect, adapter.rank, adapter.alpha) == ("peft", "diffusers", None, None)
    base, names = stored_model(wan, tmp_path)
    merged = merge(base, adapter)
    assert {name for name in merged if merged[name] is not base[name]} == {f"{name}.weight" for name in adapter.modules}
    weights = loaded(merged, names)
    torch.testing.assert_close(weights, dict(by_peft.state_dict()), rtol=1e-14, atol=1e-15)

    model = type(wan).from_config(wan.config).double()
    model.load_state_dict(weights)
    torch.testing.assert_close(output(model), adapted, rtol=1e-11, atol=1e-12)
    assert (output(model) - output(wan)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_are_rounded_once(wan, trained, tmp_path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    adapter, _, by_peft = trained
    import copy

    base, names = stored_model(copy.deepcopy(wan).to(getattr(torch, dtype)), tmp_path)
    before = loaded(base, names)
    after = loaded(merge(base, adapter), names)
    for name, module in adapter.modules.items():
        theirs = names[f"{name}.weight"]
        delta = by_peft.state_dict()[theirs] - wan.state_dict()[theirs]
        exact = before[theirs].double() + delta
        assert after[theirs].dtype == getattr(torch, dtype)
        step = torch.finfo(after[theirs].dtype).eps / 2  # of a number, half the distance to the next
        small = 1e-6 * (module.rank + 1)  # of the sums in float32
        assert ((after[theirs].double() - exact).abs() <= exact.abs() * step * 1.001 + small).all()


def test_rows_of_a_merged_weight_are_those_of_the_whole() -> None:
    pytest.importorskip("torch")
    base = {f"{name}.weight": matrix(*shape) for name, shape in SHAPES.items()}
    whole = merge(base, read(tensors_of("peft"), alpha=8))["blocks.1.ffn.0.weight"]
    assert whole.read(7, 19) == whole.read()[7 * whole.row_bytes : 19 * whole.row_bytes]
    assert whole.read() != base["blocks.1.ffn.0.weight"].read()


def test_merging_reads_some_rows_at_a_time() -> None:
    pytest.importorskip("torch")
    height, width = 4096, 1024  # 16 MiB, two blocks
    reads: list[tuple[int, int]] = []

    def zeros(start: int, stop: int) -> bytes:
        reads.append((start, stop))
        return bytes((stop - start) * width * 4)

    base = {"blocks.0.self_attn.q.weight": Computed("F32", (height, width), zeros)}
    module = LowRank(matrix(2, width), matrix(height, 2), 2.0)
    merged = merge(base, Adapter(WAN, "peft", "original", {"blocks.0.self_attn.q": module}))
    for _ in merged["blocks.0.self_attn.q.weight"].pieces(0, height):
        pass
    assert reads == [(0, 2048), (2048, 4096)]


# --- others read what is written


def write(folder: Path, adapter: Adapter, to: str) -> Path:
    tensors, metadata, config = lora_tensors(adapter, to)
    write_file(folder / FILES[to], tensors, metadata, lambda count: None)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / FILES[to]


def test_diffusers_loads_its_format_and_computes_the_same(wan, trained, tmp_path) -> None:
    import copy

    torch = pytest.importorskip("torch")
    adapter, adapted, _ = trained
    model = copy.deepcopy(wan)
    write(tmp_path, adapter, "diffusers")
    model.load_lora_adapter(tmp_path, weight_name=FILES["diffusers"])
    torch.testing.assert_close(output(model), adapted, rtol=1e-11, atol=1e-12)


def test_diffusers_tells_the_heads_of_vace_apart(tmp_path) -> None:
    """`proj_out` is the head, `vace_blocks.0.proj_out` ends alike; peft would take one's rank for the other."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    small = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32)
    small |= dict(ffn_dim=FFN, num_layers=2, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=8)
    model = diffusers.WanVACETransformer3DModel(**small).double()
    base, names = stored_model(model, tmp_path / "base")
    modules = {
        "head.head": LowRank(matrix(2, DIM), matrix(16, 2), 1.0),
        "vace_blocks.0.after_proj": LowRank(matrix(3, DIM), matrix(DIM, 3), 5.0),
        "vace_blocks.0.ffn.0": LowRank(matrix(3, DIM), matrix(FFN, 3), 3.0),
    }
    adapter = Adapter(VACE, "peft", "original", modules)
    expected = loaded(merge(base, adapter), names)
    write(tmp_path, adapter, "diffusers")
    model.load_lora_adapter(tmp_path, weight_name=FILES["diffusers"])
    model.fuse_lora()
    fused = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if ".lora_" not in name}
    torch.testing.assert_close(fused, expected, rtol=1e-6, atol=1e-6)


def test_diffusers_loads_the_comfyui_format(wan, trained, tmp_path) -> None:
    """Through its converter, which scales A by alpha/rank, and knows no alpha outside of the layers."""
    import copy

    torch = pytest.importorskip("torch")
    from diffusers.loaders import WanLoraLoaderMixin

    adapter, _, _ = trained
    adapter = replace(adapter, modules={n: m for n, m in adapter.modules.items() if n.startswith("blocks.")})
    state = WanLoraLoaderMixin.lora_state_dict(write(tmp_path, adapter, "comfyui"))
    assert len(state) == 2 * len(adapter.modules)
    model = copy.deepcopy(wan)
    model.load_lora_adapter(state)

    base, names = stored_model(wan, tmp_path / "base")
    merged = type(wan).from_config(wan.config).double()
    merged.load_state_dict(loaded(merge(base, adapter), names))
    torch.testing.assert_close(output(model), output(merged), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_what_diffusers_converts_is_what_is_read(format: str) -> None:
    """The same file, understood by diffusers and by us: alpha/rank · B A is the same."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.loaders import WanLoraLoaderMixin

    from mm_convert.tensors.torch import Maps

    def full(separator: str, prefix: str) -> dict[str, LazyTensor]:
        attentions = [f"{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"]
        tensors: dict[str, LazyTensor] = {}
        for seed, part in enumerate([*attentions, "ffn.0", "ffn.2"]):
            height, width = {"ffn.0": (FFN, DIM), "ffn.2": (DIM, FFN)}.get(part, (DIM, DIM))
            name = prefix + f"blocks.0.{part}".replace(".", separator)
            tensors[f"{name}.lora_down.weight"] = matrix(RANK, width, seed=seed)
            tensors[f"{name}.lora_up.weight"] = matrix(height, RANK, seed=seed + 20)
            tensors[f"{name}.alpha"] = scalar(seed + 1)
        return tensors

    tensors = full("_", "lora_unet_") if format == "kohya" else full(".", "diffusion_model.")
    theirs = WanLoraLoaderMixin.lora_state_dict({name: Maps().tensor(t) for name, t in tensors.items()})
    ours, _, _ = lora_tensors(adapter := read(tensors), "diffusers")
    assert list(sorted(ours)) == list(sorted(theirs))
    scales = {m.a: m.alpha / m.rank for m in adapter.modules.values()}
    for name, tensor in ours.items():
        if name.endswith("lora_A.weight"):
            b = name.replace("lora_A", "lora_B")
            delta = scales[tensor] * Maps().tensor(ours[b]) @ Maps().tensor(tensor)
            torch.testing.assert_close(theirs[b] @ theirs[name], delta)


def test_mm_models_and_peft_load_ours(tmp_path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    models = pytest.importorskip("mm_models")
    from mm_models.lora import load_lora, lora_state_dict

    adapter = read(tensors_of("diffusers"), alpha=8)
    write(tmp_path, adapter, "mm")
    sizes = dict(dim=DIM, ffn_dim=FFN, num_heads=2, num_layers=2, freq_dim=32, text_dim=16)
    model, other = (models.build("wan2.1-t2v-1.3b", **sizes) for _ in range(2))
    opened = open_lora(tmp_path)
    assert (opened.rank, opened.alpha, list(opened.modules)) == (RANK, 8.0, OURS)
    load_lora(model, opened, opened.alphas)
    by_peft = peft.PeftModel.from_pretrained(other, tmp_path)
    in_peft = {n: t for n, t in by_peft.state_dict().items() if ".lora_" in n}
    for name, tensor in lora_state_dict(model).items():
        torch.testing.assert_close(in_peft[f"base_model.model.{name.replace('.weight', '.default.weight')}"], tensor)
        assert bytes(tensor.numpy().tobytes()) == bytes(
            lora_tensors(adapter, "mm")[0]["base_model.model." + name].read()
        )


# --- files of adapters, saved from a model and opened again


def state_dict_of_a_run(alpha: float = 8.0, **more: Any) -> dict[str, Any]:
    """The adapters of a small Wan among its other tensors, as its state_dict has them, and their alpha."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    tensors = {"head.modulation": torch.zeros(1, 2, DIM)}
    for name, (height, width) in SHAPES.items():
        tensors |= {f"{name}.base_layer.weight": torch.zeros(height, width)}
        tensors |= {f"{name}.lora_A.default.weight": torch.randn(RANK, width)}
        tensors |= {f"{name}.lora_B.default.weight": torch.randn(height, RANK)}
    return {"tensors": tensors, "alpha": alpha, **more}


@pytest.mark.parametrize("to", ["mm", "diffusers", "comfyui", "mindspeed"])
def test_what_is_saved_is_opened(to: str, tmp_path: Path) -> None:
    said = state_dict_of_a_run(base="a/base", dropout=0.1, to=to)
    adapter = open_lora(save_lora(tmp_path / "adapter", **said))
    assert (adapter.rank, adapter.alpha, adapter.alphas) == (RANK, 8.0, dict.fromkeys(OURS, 8.0))
    assert adapter.base == "a/base"
    ours = {n.replace(".default", ""): tensor for n, tensor in said["tensors"].items() if ".lora_" in n}
    assert sorted(adapter) == sorted(ours)
    assert all(adapter[name].equal(tensor) and adapter.shape(name) == tensor.shape for name, tensor in ours.items())
    if to == "mm":
        (file,) = (tmp_path / "adapter").glob("*.safetensors")
        assert read_file(file)[1] == {"format": "pt", "base": "a/base", "rank": "4", "alpha": "8.0"}
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (RANK, 8, 0.1)
        assert config["base_model_name_or_path"] == "a/base"
        assert open_lora(file)[OURS[0] + ".lora_A.weight"].equal(ours[OURS[0] + ".lora_A.weight"])


def test_an_adapter_is_not_replaced_unasked(tmp_path: Path) -> None:
    said = state_dict_of_a_run()
    save_lora(tmp_path / "a", **said)
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match="exists; name another target, or replace it with --overwrite true"):
        save_lora(tmp_path / "a", **state_dict_of_a_run(alpha=2.0))
    assert contents(tmp_path / "a") == before
    save_lora(tmp_path / "a", **state_dict_of_a_run(alpha=2.0), overwrite=True)
    assert open_lora(tmp_path / "a").alpha == 2
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file exists"):
        save_lora(tmp_path / "file", **said)
    with pytest.raises(ValueError, match=r"nothing to write to .*: none of 1 tensors is a LoRA adapter"):
        save_lora(tmp_path / "b", {"head.modulation": said["tensors"]["head.modulation"]}, 8.0)
    assert not (tmp_path / "b").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_damaged_and_contradictory_files(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", **state_dict_of_a_run())
    file, beside = tmp_path / "a/adapter_model.safetensors", tmp_path / "a/adapter_config.json"
    whole, config = file.read_bytes(), json.loads(beside.read_text())
    for length in (4, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors (is truncated|has a broken)"):
            open_lora(tmp_path / "a")
    file.write_bytes(whole)
    for change, message in (
        ({"lora_alpha": 4}, "says alpha 8 for .* says 4"),
        ({"r": 2}, "says rank 2, but the factors"),
    ):
        beside.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            open_lora(tmp_path / "a")
    beside.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not a JSON object"):
        open_lora(tmp_path / "a")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_lora(tmp_path / "nowhere")


def test_a_model_is_no_adapter(toys: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no LoRA adapter: no tensor in it has the name of a factor"):
        open_lora(toys.diffusers(tmp_path / "model"))


def test_peft_computes_the_same_from_our_files(tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    models = pytest.importorskip("mm_models")
    from mm_models.lora import LoRAConfig, add_lora

    sizes = dict(dim=DIM, ffn_dim=FFN, num_heads=2, num_layers=2, freq_dim=32, text_dim=16)
    model, plain = (models.build("wan2.1-t2v-1.3b", **sizes) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    add_lora(model, LoRAConfig(rank=RANK, alpha=8.0))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(tmp_path / "a", model.state_dict(), 8.0)
    by_peft = peft.PeftModel.from_pretrained(plain, tmp_path / "a")
    inputs = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 512, 16)
    assert torch.equal(by_peft(*inputs), model(*inputs))


def test_a_checkpoint_of_a_run_says_alpha_in_its_settings(tmp_path: Path) -> None:
    """A run's folder has config.toml; what torch's dcp_to_torch makes of it has nothing."""
    pytest.importorskip("torch")
    from torch.distributed.checkpoint import FileSystemWriter, save
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    tensors = {n: t for n, t in state_dict_of_a_run()["tensors"].items() if ".lora_" in n}
    state = {"model": tensors, "optimizer": {"state": {n: {"exp_avg": t} for n, t in tensors.items()}}}
    folder, file = tmp_path / "step-00000003", tmp_path / "run.pt"
    save(state, storage_writer=FileSystemWriter(folder))
    dcp_to_torch_save(folder, file)
    for path in (folder, file):
        with pytest.raises(ValueError, match=r"does not say its alpha \(it is a training checkpoint.*--lora_alpha"):
            open_lora(path)
        assert open_lora(path, alpha=16).alpha == 16
    settings = f"weights = '/home/me/Wan2.1'\n[lora]\nrank = {RANK}\nalpha = 16.0\n"
    (folder / "config.toml").write_text(settings, encoding="utf-8")
    assert (open_lora(folder).alpha, open_lora(folder).rank, open_lora(folder).base) == (16, RANK, "Wan2.1")
    with pytest.raises(ValueError, match="caller says alpha 8"):
        open_lora(folder, alpha=8)


def test_peft_writes_torch_files_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = state_dict_of_a_run()["tensors"]
    named = {f"base_model.model.{n.replace('.default', '')}": t for n, t in tensors.items() if ".lora_" in n}
    torch.save(named, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8}))
    assert open_lora(tmp_path).alpha == 8


# --- whole differences, as files of distilled models hold them

WHOLE = {  # our parameter -> its name in ComfyUI's files, its shape
    "blocks.0.self_attn.q.bias": ("blocks.0.self_attn.q.diff_b", (DIM,)),
    "blocks.0.self_attn.norm_q.weight": ("blocks.0.self_attn.norm_q.diff", (DIM,)),
    "blocks.1.norm3.bias": ("blocks.1.norm3.diff_b", (DIM,)),
    "blocks.1.modulation": ("blocks.1.diff_m", (1, 6, DIM)),
    "head.modulation": ("head.diff_m", (1, 2, DIM)),
    "head.head.weight": ("head.head.diff", (64, DIM)),
    "head.head.bias": ("head.head.diff_b", (64,)),
    "patch_embedding.weight": ("patch_embedding.diff", (DIM, 16, 1, 2, 2)),
    "img_emb.proj.1.bias": ("img_emb.proj.1.diff_b", (20,)),
}


def whole(prefix: str = "diffusion_model.", flat: bool = False) -> dict[str, LazyTensor]:
    def spell(name: str) -> str:
        module, _, part = name.rpartition(".")
        return f"{prefix}{module.replace('.', '_') if flat else module}.{part}"

    return {
        spell(name): constant(struct.pack(f"<{prod(shape)}f", *((i * 31 % 17) / 8 for i in range(prod(shape)))), shape)
        for name, shape in WHOLE.values()
    }


@pytest.mark.parametrize("format", ["comfyui", "kohya", "diffsynth"])
def test_whole_differences_are_read_beside_the_factors(format: str) -> None:
    prefix = {"comfyui": "diffusion_model.", "kohya": "lora_unet_", "diffsynth": ""}[format]
    adapter = read(tensors_of(format) | whole(prefix, flat=format == "kohya"))
    assert list(adapter.modules) == OURS
    assert {name: adapter.differences.shape(name) for name in adapter.differences} == {
        name: shape for name, (_, shape) in WHOLE.items()
    }


def test_whole_differences_alone_are_an_adapter_and_come_back_whole(tmp_path: Path) -> None:
    """Bytes, through ComfyUI's file; no other format can hold them."""
    for tensors in (whole(), tensors_of("comfyui") | whole()):
        adapter = read(tensors)
        written, _, _ = lora_tensors(adapter, "comfyui")
        bytes_of = {name: bytes(tensor.read()) for name, tensor in written.items()}
        assert {name: bytes_of[name] for name in tensors} == {name: bytes(t.read()) for name, t in tensors.items()}
        assert all(name.endswith(".alpha") for name in written.keys() - tensors.keys())
        for to in ("mm", "peft", "diffusers", "mindspeed"):
            with pytest.raises(ValueError, match=r"whole differences to 9 parameters .*write it as comfyui, or merge"):
                lora_tensors(adapter, to)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("diffusion_model.head.heed.diff_b", (64,), r"nearest being wan .*head.heed.diff_b"),
        ("diffusion_model.blocks.0.self_attn.q.diff_b", (DIM + 1,), r"has shape \[25\], expected dim = 24"),
        ("diffusion_model.blocks.0.self_attn.q.diff_m", (DIM,), r"self_attn.q.diff_m"),
    ],
)
def test_differences_that_fit_nowhere(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tensors_of("comfyui") | {name: constant(bytes(4 * prod(shape)), shape)})


def test_differences_are_added_to_their_parameters() -> None:
    torch = pytest.importorskip("torch")
    from mm_convert.tensors.torch import rows_of

    def tensor(lazy: LazyTensor) -> Any:
        return rows_of(lazy, 0, lazy.shape[0])

    adapter = read(tensors_of("comfyui") | whole())
    shapes = {name: shape for name, (_, shape) in WHOLE.items()} | {f"{n}.weight": shape for n, shape in SHAPES.items()}
    base = {name: constant(bytes(4 * prod(shape)), shape) for name, shape in shapes.items()}
    merged = merge(base, adapter)
    for name in WHOLE:
        assert torch.equal(tensor(merged[name]), adapter.differences[name])
    for name in SHAPES:
        a, b = (adapter[f"{name}.lora_{letter}.weight"] for letter in "AB")
        assert torch.allclose(tensor(merged[f"{name}.weight"]), b @ a)
    del base["head.modulation"]
    with pytest.raises(ValueError, match=r"head.modulation, which the base has not"):
        merge(base, adapter)


def test_another_kind_is_called_by_its_name_first() -> None:
    with pytest.raises(ValueError, match=r"this is a LoKr adapter, it has .*lokr_w1 \(Kronecker.*LyCORIS: merge_to"):
        read({f"lora_unet_blocks_0_ffn_0.lokr_w{n}": matrix(DIM, 1) for n in (1, 2)})
