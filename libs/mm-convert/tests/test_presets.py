"""Every preset of every family, in every dialect: counts and fingerprints of the published files."""

from __future__ import annotations

from math import prod

import pytest

from mm_convert.families import FAMILIES, VACE, WAN
from mm_convert.read.content import fingerprint, identify

T2V_14B = (14_288_491_584, 1095, "aafcfd9672c3a2456dc46e1cb6e52c70")
I2V_14B = (16_394_878_784, 1303, "6bfcfb3b342cb286ce886889d519a77e")
OPENSORAPLAN = (2_771_907_856, 687, None)
VACE_14B = (17_337_592_896, 1331, "7a513e1f257a861512b1afd387a8ecd9")

# parameters, tensors, md5 of the names and shapes in the original files where that is known
PUBLISHED = {
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
    "opensoraplan-1.2-vae": (239_189_991, 248, None),
    "qwen2.5-vl-3b": (3_754_622_976, 824, None),
    "qwen2.5-vl-7b": (8_292_166_656, 729, None),
    "qwen2.5-vl-32b": (33_452_718_336, 1161, None),
    "qwen2.5-vl-72b": (73_410_777_344, 1353, None),
    "mt5-xxl": (5_655_173_120, 219, None),
    "umt5-xxl": (5_680_910_336, 242, "9c8818c2cbea55eca56c7b447df170da"),
    "wan2.1-vae": (126_892_531, 194, "ccc42284ea13e1ad04693284c7a09be6"),
    "wan2.2-vae": (704_688_668, 196, "e1de6c02cdac79f8b739f4d3698cd216"),
}
PRESETS = [(family, name) for family in FAMILIES for name in family.presets]
IN_EVERY_DIALECT = [(family, name, dialect) for family, name in PRESETS for dialect in family.table.dialects]


def test_there_is_something_to_compare_every_preset_with():
    assert sorted(name for _, name in PRESETS) == sorted(PUBLISHED)


@pytest.mark.parametrize(("family", "name"), PRESETS, ids=[name for _, name in PRESETS])
def test_the_published_counts_and_fingerprints(family, name, toys):
    parameters, tensors, md5 = PUBLISHED[name]
    ours = toys.published(family, name)
    assert (sum(map(prod, ours.values())), len(ours)) == (parameters, tensors)
    if md5:
        assert fingerprint(toys.published(family, name, "original")) == md5


@pytest.mark.parametrize(
    ("family", "name", "dialect"), IN_EVERY_DIALECT, ids=[f"{name}-{dialect}" for _, name, dialect in IN_EVERY_DIALECT]
)
def test_every_dialect_is_recognised_and_means_the_same(family, name, dialect, toys):
    ours, theirs = toys.published(family, name), toys.published(family, name, dialect)
    content = identify(theirs, name)
    assert content.family is family
    assert {content.names[key]: shape for key, shape in theirs.items()} == ours
    assert content.translate(dialect) == {ours: theirs for theirs, ours in content.names.items()}
    if ours != theirs:  # the names of some dialects are the same
        assert content.dialect == dialect
    config = content.config | family.complete(content.config)[0]  # what shapes say, and what a model is built from
    assert {**config, **family.presets[name]} == config


@pytest.mark.parametrize(("family", "name"), PRESETS, ids=[name for _, name in PRESETS])
def test_the_published_config_json_there_and_back(family, name, toys):
    content = identify(toys.published(family, name), name)
    config, _ = family.complete(content.config)
    for dialect, write in family.write_config.items():
        said = family.read_config(write(config))
        assert said.items() <= config.items(), dialect
        again, notes = family.complete(said | content.config)
        assert (again, notes) == (config, []), dialect


def test_other_published_fingerprints(toys):
    assert fingerprint(toys.published(WAN, "wan2.1-t2v-14b", "diffusers")) == "cb104773c6c2cb6df4f9529ad5c60d0b"
    vace = toys.published(VACE, "vace-14b")
    control = {name: shape for name, shape in vace.items() if name.startswith("vace")}
    assert fingerprint(control) == "3b2726384e4f64837bdf216eea3f310d"
    assert (sum(map(prod, control.values())), len(control)) == (3_049_101_312, 236)
