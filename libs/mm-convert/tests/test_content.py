"""What is refused: names that nobody knows, names that are missing, shapes that do not fit."""

from __future__ import annotations

import pytest

from mm_convert.read.content import identify
from mm_convert.tensors.rules import Patterns, Row, Sizes


@pytest.fixture
def shapes(toys):
    return toys.shapes("diffusers", toys.kinds["i2v"])


def test_an_unknown_name_is_named_with_its_nearest(shapes):
    shapes["blocks.1.attn1.to_kk.weight"] = shapes.pop("blocks.1.attn1.to_k.weight")
    with pytest.raises(
        ValueError, match=r"unknown: blocks\.1\.attn1\.to_kk\.weight \(nearest: blocks\.1\.attn1\.to_k"
    ) as error:
        identify(shapes, "toy")
    assert "missing: blocks.1.attn1.to_k.weight" in str(error.value)


def test_every_single_missing_tensor_is_noticed(shapes):
    for name in shapes:
        rest = {other: shape for other, shape in shapes.items() if other != name}
        with pytest.raises(ValueError, match=r"missing: .*" + name.replace(".", r"\.")):
            identify(rest, "toy")


def test_every_single_wrong_side_is_noticed(shapes):
    free = {"freq_dim", "text_dim", "in_channels", "patch_t"}  # what one tensor alone tells (or half of out_channels)
    wrong = 0
    for name, shape in shapes.items():
        for side in range(len(shape)):
            changed = {**shapes, name: (*shape[:side], shape[side] + 1, *shape[side + 1 :])}
            try:
                identify(changed, "toy")
            except ValueError:
                wrong += 1
    sides = sum(map(len, shapes.values()))
    assert wrong == sides - len(free)


def test_a_wrong_shape_says_what_was_expected_and_why(shapes):
    shapes["blocks.0.ffn.net.2.weight"] = (24, 41)
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.net\.2\.weight has shape \[24, 41\], expected ffn_dim = 40"):
        identify(shapes, "toy")


def test_missing_and_half_layers(shapes):
    without_layer = {name: shape for name, shape in shapes.items() if "blocks.1." not in name}
    with pytest.raises(ValueError, match=r"layer 1 is missing, yet there is: blocks\.2\."):
        identify(without_layer, "toy")
    with pytest.raises(ValueError, match=r"missing: .*blocks\.0\."):
        identify({name: shape for name, shape in shapes.items() if "blocks" not in name}, "toy")
    huge = {**shapes, "blocks.99999999999.norm2.weight": (24,)}
    with pytest.raises(ValueError, match="layer 3 is missing"):
        identify(huge, "toy")


def test_many_problems_are_counted(shapes):
    many = {**shapes, **{f"extra.{i}": (1,) for i in range(50)}}
    with pytest.raises(ValueError, match="and 45 more") as error:
        identify(many, "toy")
    assert len(str(error.value)) < 1000


def test_mixed_dialects_are_refused(shapes, toys):
    original = toys.shapes("original", toys.kinds["i2v"])
    mixed = {**shapes, "head.modulation": original["head.modulation"]}
    with pytest.raises(ValueError, match=r"unknown: head\.modulation"):
        identify(mixed, "toy")


def test_another_model_is_no_wan():
    with pytest.raises(ValueError, match=r"no known family \(wan, .*\); it holds decoder\.weight"):
        identify({"decoder.weight": (3,)}, "toy")
    with pytest.raises(ValueError, match="no tensors"):
        identify({}, "toy")


def test_the_unused_norms_of_published_i2v_files_are_dropped_and_said(shapes):
    extra = {f"blocks.{i}.attn2.norm_added_q.weight": (24,) for i in range(3)}
    content = identify({**shapes, **extra}, "toy")
    assert set(content.ignored) == set(extra)
    assert not set(content.names) & set(extra)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.12.norm.weight", ("blocks.{i}.norm.weight", 12)),
        ("blocks.012.norm.weight", ("blocks.012.norm.weight", -1)),  # no second name for a layer
        ("blocks.x.norm.weight", ("blocks.x.norm.weight", -1)),
        ("blocks.²", ("blocks.²", -1)),
        ("head.0.norm.weight", ("head.0.norm.weight", -1)),
    ],
)
def test_layer_numbers(name, expected):
    assert Patterns(["blocks.{i}.norm.weight", "head.0.norm.weight"]).find(name) == expected


def test_sizes_divide_evenly():
    sizes = Sizes({"p": 4})
    assert sizes.solve("head", Row({}, "p*out"), (10,)) is not None
    assert sizes.solve("head", Row({}, "p*out"), (12,)) is None
    assert sizes.values["out"] == 3
