"""The table of Wan's names and shapes against published fingerprints, counts, and diffusers' own model."""

from __future__ import annotations

from math import prod

import pytest

from mm_convert.content import fingerprint, understand

SMALL = dict(dim=1536, ffn_dim=8960, layers=30)
LARGE = dict(dim=5120, ffn_dim=13824, layers=40)
COMMON = dict(freq_dim=256, text_dim=4096, in_channels=16, out_channels=16)

# sizes, md5 of the published original files, parameters, tensors
PUBLISHED = {
    "t2v-1.3b": (SMALL, "9269f8db9040a9d860eaca435be61814", 1_418_996_800, 825),
    "t2v-14b": (LARGE, "aafcfd9672c3a2456dc46e1cb6e52c70", 14_288_491_584, 1095),
    "i2v-14b": (LARGE | dict(in_channels=36, image_dim=1280), "6bfcfb3b342cb286ce886889d519a77e", 16_394_878_784, 1303),
    "i2v-1.3b": (SMALL | dict(in_channels=36, image_dim=1280), "6d6ccde6845b95ad9114ab993d917893", 1_564_428_608, 983),
    "flf2v-14b": (
        LARGE | dict(in_channels=36, image_dim=1280, image_tokens=514),
        "3ef3b1f8e1dab83d5b71fd7b617f859f",
        16_395_536_704,
        1304,
    ),
    "ti2v-5b": (
        dict(dim=3072, ffn_dim=14336, layers=30, in_channels=48, out_channels=48),
        "1f5ab7703c6fc803fdded85ff040c316",
        4_999_787_712,
        825,
    ),
    "i2v-a14b": (LARGE | dict(in_channels=36), "5b013604280dd715f8457c6ed6d6a626", 14_288_901_184, 1095),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_diffusers_files_become_the_published_original(name, toys):
    sizes, md5, parameters, tensors = PUBLISHED[name]
    theirs = toys.shapes("diffusers", COMMON | sizes)
    content = understand(theirs, name)
    ours = {content.names[key]: shape for key, shape in theirs.items()}
    assert content.dialect == "diffusers"
    assert fingerprint(ours) == md5
    assert sum(map(prod, ours.values())) == parameters
    assert len(ours) == tensors
    assert content.translate("diffusers") == {ours: theirs for theirs, ours in content.names.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_read_from_the_shapes(name, toys):
    sizes, *_ = PUBLISHED[name]
    config = understand(toys.shapes("original", COMMON | sizes), name).config
    expected = {"image_dim": None, "image_tokens": 257, "patch_size": [1, 2, 2], **COMMON, **sizes}
    expected["num_layers"] = expected.pop("layers")
    assert config == expected


def test_the_published_names_of_diffusers(toys):
    assert fingerprint(toys.shapes("diffusers", COMMON | LARGE)) == "cb104773c6c2cb6df4f9529ad5c60d0b"


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "wide"])
def test_names_and_shapes_are_those_of_the_diffusers_model(kind, toys):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        config = toys.diffusers_config(toys.kinds[kind])
        model = diffusers.WanTransformer3DModel.from_config(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert theirs == toys.shapes("diffusers", toys.kinds[kind])
