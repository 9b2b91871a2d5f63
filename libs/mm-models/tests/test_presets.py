"""Every preset has the shapes and names of the released weights, without a file to compare with."""

import subprocess
import sys
from dataclasses import fields
from hashlib import md5
from importlib import import_module

import pytest
import torch

from mm_models import boundary, build, plan, preset, presets
from mm_models.families import FAMILIES, published_like
from mm_models.opensoraplan import OpenSoraPlanConfig
from mm_models.wan import WanConfig
from mm_models.wan.family import WAN
from mm_models.wan.start import initial

OPENSORAPLAN = (2_771_907_856, 687, None)
T2V_14B = (14_288_491_584, 1095, "aafcfd9672c3a2456dc46e1cb6e52c70")
I2V_14B = (16_394_878_784, 1303, "6bfcfb3b342cb286ce886889d519a77e")
VACE_14B = (17_337_592_896, 1331, "7a513e1f257a861512b1afd387a8ecd9")

RELEASED = {  # parameters, tensors, fingerprint of names and shapes as known from the released files
    "wan2.1-t2v-1.3b": (1_418_996_800, 825, "9269f8db9040a9d860eaca435be61814"),
    "wan2.1-t2v-14b": T2V_14B,
    "wan2.1-i2v-1.3b": (1_564_428_608, 983, "6d6ccde6845b95ad9114ab993d917893"),
    "wan2.1-i2v-14b-480p": I2V_14B,
    "wan2.1-i2v-14b-720p": I2V_14B,
    "wan2.1-flf2v-14b": (16_395_536_704, 1304, "3ef3b1f8e1dab83d5b71fd7b617f859f"),
    "wan2.2-ti2v-5b": (4_999_787_712, 825, "1f5ab7703c6fc803fdded85ff040c316"),
    "wan2.2-t2v-a14b": T2V_14B,
    "wan2.2-i2v-a14b": (14_288_901_184, 1095, "5b013604280dd715f8457c6ed6d6a626"),
    "vace-1.3b": (2_153_972_032, 1264, "a61453409b67cd3246cf0c3bebad47ba"),
    "vace-14b": VACE_14B,
    "vace-a14b": VACE_14B,
    "opensoraplan-1.2": OPENSORAPLAN,
    "opensoraplan-1.2-29x480p": OPENSORAPLAN,
    "opensoraplan-1.2-93x720p": OPENSORAPLAN,
    "opensoraplan-1.2-29x720p": OPENSORAPLAN,
    "qwen2.5-vl-3b": (3_754_622_976, 824, None),  # without a head of its own
    "qwen2.5-vl-7b": (8_292_166_656, 729, None),
    "qwen2.5-vl-32b": (33_452_718_336, 1161, None),
    "qwen2.5-vl-72b": (73_410_777_344, 1353, None),
}
TOWERS = {"3b": 668_684_288, "7b": 676_550_144, "32b": 688_841_984, "72b": 704_573_696}
TINY = {"wan-tiny", "wan-tiny-i2v", "wan-tiny-a14b", "wan-tiny-vace", "opensoraplan-tiny", "qwen2.5-vl-tiny"}
WIDTHS = {  # of a head, released and tiny, by the first word of a preset
    "wan": ({128}, {32}),
    "vace": ({128}, set()),
    "opensoraplan": ({96}, {36}),
    "qwen": ({128}, {16}),
}


def fingerprint(model) -> str:
    names = []
    for name, tensor in model.state_dict().items():
        names += [name, name + ":" + "_".join(map(str, tensor.shape))]
    return md5(",".join(sorted(names)).encode()).hexdigest()


@pytest.mark.parametrize("name", RELEASED)
def test_released(name):
    model = build(name, device="meta")
    parameters, tensors, md5 = RELEASED[name]
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == (parameters, tensors)
    if md5:  # else the names are compared with those of another library, see test_…_parity.py
        assert fingerprint(model) == md5
    assert set(dict(model.named_parameters())) == set(model.state_dict()), "buffers would need re-making after meta"


def test_every_preset_is_known_here():
    assert set(presets()) == {*RELEASED, *TINY}
    for word, (released, tiny) in WIDTHS.items():
        assert {preset(name).head_dim for name in RELEASED if name.startswith(word)} == released
        assert {preset(name).head_dim for name in TINY if name.startswith(word)} == tiny


@pytest.mark.parametrize("size", TOWERS)
def test_the_tower_as_released(size):
    tower = build(f"qwen2.5-vl-{size}", device="meta").visual
    assert sum(p.numel() for p in tower.parameters()) == TOWERS[size]
    assert tower.patch_embed.proj.weight.shape == (1280, 3, 2, 14, 14)


def test_where_experts_change():
    pairs = {name: boundary(name) for name in presets() if boundary(name) is not None}
    assert pairs == {"wan2.2-t2v-a14b": 0.875, "wan2.2-i2v-a14b": 0.9, "vace-a14b": 0.875, "wan-tiny-a14b": 0.875}


@pytest.mark.parametrize("name", WAN.presets)
def test_plan_matches_the_model(name):
    model = build(name, device="meta")
    cut = plan(model)
    assert list(cut.modules_of(model, "layers")) == [f"blocks.{i}" for i in range(model.config.num_layers)]
    kept = cut.fp32_parameters(model)
    assert {"time_embedding.0.weight", "time_projection.1.bias", "blocks.0.modulation", "head.modulation"} <= set(kept)
    assert not any(".q." in name or "ffn" in name for name in kept)
    assert all(name in kept for name, _ in model.named_parameters() if "modulation" in name or "norm3" in name)


def test_the_plan_of_another_family_matches_its_model():
    model = build("opensoraplan-1.2", device="meta")
    cut = plan(model)
    assert list(cut.modules_of(model, "layers")) == [f"transformer_blocks.{i}" for i in range(32)]
    kept = {name.rpartition(".")[0] or name for name in cut.fp32_parameters(model)}
    embedding = "adaln_single.emb.timestep_embedder"
    tables = {f"transformer_blocks.{i}" for i in range(32)} | {"scale_shift_table"}
    assert kept == {f"{embedding}.linear_1", f"{embedding}.linear_2", "adaln_single.linear"} | tables
    assert len(cut.modules_of(model, "columns")) == 32 * 7
    assert len(cut.modules_of(model, "rows")) == 32 * 3


def test_the_plan_of_a_model_with_a_tower_matches_it():
    model = build("qwen2.5-vl-3b", device="meta")
    cut = plan(model)
    assert list(cut.modules_of(model, "layers")) == [f"model.layers.{i}" for i in range(36)]
    assert (len(cut.modules_of(model, "columns")), len(cut.modules_of(model, "rows"))) == (36 * 5, 36 * 2)
    tower = cut.inner["visual"]
    assert list(tower.modules_of(model.visual, "layers")) == [f"blocks.{i}" for i in range(32)]
    assert (len(tower.modules_of(model.visual, "columns")), len(tower.modules_of(model.visual, "rows"))) == (65, 33)
    for name in ("qwen2.5-vl-7b", "qwen2.5-vl-tiny"):
        model = build(name, device="meta")
        plan(model).check(model)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"did you mean 'wan2\.1-t2v-1\.3b'"):
        preset("wan2.1-t2v-1.3B")
    with pytest.raises(ValueError, match="did you mean 'num_layers'"):
        build("wan-tiny", device="meta", num_layer=2)
    with pytest.raises(ValueError, match="160 over 7 heads"):
        build("wan-tiny", device="meta", num_heads=7)
    with pytest.raises(ValueError, match="patch_size is 3, but must be three numbers"):
        build("wan-tiny", device="meta", patch_size=3)
    assert build("wan-tiny", device="meta", patch_size=[1, 2, 2]).config == preset("wan-tiny")
    for name, value in {"num_layers": 0, "num_heads": 0, "text_tokens": 0, "dim": -160, "ffn_dim": 1.5}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}, but must be a whole number of at least 1"):
            build("wan-tiny", device="meta", **{name: value})
    with pytest.raises(ValueError, match=r"patch_size\[1\] is 0"):
        build("wan-tiny", device="meta", patch_size=(1, 0, 2))
    with pytest.raises(ValueError, match="no plan for a Linear"):
        plan(torch.nn.Linear(1, 1))


def test_from_scratch():
    torch.manual_seed(5)
    model = build("wan-tiny")
    weights = dict(model.named_parameters())
    bound = (6 / (160 + 480)) ** 0.5  # Xavier
    assert 0.99 * bound < weights["blocks.1.ffn.0.weight"].abs().max() <= bound
    assert weights["patch_embedding.weight"].abs().max() <= (6 / (64 + 160)) ** 0.5
    for name in ("text_embedding.0.weight", "time_embedding.2.weight"):
        assert abs(weights[name].std() - 0.02) < 1e-3, name
    assert abs(weights["blocks.2.modulation"].std() - 160**-0.5) < 5e-3
    for name, weight in weights.items():
        if name.endswith("bias") or name == "head.head.weight":
            assert not weight.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (weight == 1).all(), name
    assert not torch.equal(weights["blocks.0.ffn.0.weight"], weights["blocks.1.ffn.0.weight"])

    torch.manual_seed(5)
    again, other = build("wan-tiny"), build("wan-tiny")
    assert torch.equal(again.patch_embedding.weight, model.patch_embedding.weight)
    assert not torch.equal(other.patch_embedding.weight, model.patch_embedding.weight)


def test_initial_depends_on_name_and_seed_only():
    draw = initial("blocks.0.ffn.0.weight", (4, 3), 7)
    torch.manual_seed(1)
    assert torch.equal(draw, initial("blocks.0.ffn.0.weight", (4, 3), 7))
    assert not torch.equal(draw, initial("blocks.0.ffn.0.weight", (4, 3), 8))
    assert not torch.equal(draw, initial("blocks.0.ffn.2.weight", (4, 3), 7))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_a_family_is_asked_is_there(family):
    """What is imported later is there, so that no seam fails when it is first used."""
    seams = {seam: getattr(family, seam) for seam in ("build", "plan", "cost", "objective")}
    if family.video is not None:
        own = ("conditioning", "codec", "text_encoder", "image_encoder")
        seams |= {seam: getattr(family.video, seam) for seam in own if getattr(family.video, seam) is not None}
    if family.chat is not None:
        seams["processing"] = family.chat.processing
    for seam, later in seams.items():
        module, _, name = later.__qualname__.rpartition(".")
        assert callable(getattr(import_module(module), name)), seam
    assert all(callable(getattr(family.start(), name)) for name in ("initial", "missing", "grow"))


def test_published_defaults_are_those_of_the_nearest_preset():
    """In its tasks, then in the number of experts, then in most fields; a tiny model is as the first of its kind."""
    names = {id(known): name for name, known in WAN.presets.items()}

    def like(config, experts=False):
        return names[id(published_like(config, experts))]

    for name in set(RELEASED) & set(WAN.presets):
        twin = "wan2.1-i2v-14b-480p" if name.endswith("720p") else name
        assert like(preset(name), boundary(name) is not None) == twin
    small = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 1}
    assert like(WanConfig(**small, text_dim=8)) == "wan2.1-t2v-1.3b"
    assert like(WanConfig(**small), experts=True) == "wan2.2-t2v-a14b"
    assert like(WanConfig(**small, in_channels=48, out_channels=48)) == "wan2.2-ti2v-5b"
    assert like(WanConfig(num_layers=20)) == "wan2.1-t2v-14b"  # half of it
    assert like(WanConfig(in_channels=36, image_dim=32, num_layers=1, image_tokens=34, image_positions=True)) == (
        "wan2.1-flf2v-14b"
    )
    assert like(preset("wan2.2-i2v-a14b")) == "wan2.2-i2v-a14b"  # one of its experts alone


def test_a_preset_is_looked_up_without_torch():
    code = "import sys, mm_models; mm_models.preset('vace-14b'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (name, field.name)
        for name, config in (("wan-tiny", WanConfig), ("opensoraplan-tiny", OpenSoraPlanConfig))
        for field in fields(config)
    ],
)
def test_a_field_that_cannot_be_is_named(name, field):
    for value in ("x", -1, 1.5, [1.5], {}, float("nan"), ["a"], ["a", "b", "c"], [1, 2, True]):
        with pytest.raises(ValueError, match=f"^{field}"):
            build(name, device="meta", **{field: value})
