"""Qwen2.5-VL: names, shapes and fused tensors against published counts and transformers' own model."""

from __future__ import annotations

from math import prod

import pytest

from mm_convert.families import QWEN2_5_VL
from mm_convert.families.presets import name_preset
from mm_convert.families.qwen2_5_vl import TABLE
from mm_convert.read.content import cut_fused, identify, join_fused
from mm_convert.tensors.fusion import Fusion
from mm_convert.tensors.views import Computed

PUBLISHED = {  # parameters, tensors (numerics of the published sizes)
    "qwen2.5-vl-3b": (3_754_622_976, 824),
    "qwen2.5-vl-7b": (8_292_166_656, 729),
    "qwen2.5-vl-32b": (33_452_718_336, 1161),
    "qwen2.5-vl-72b": (73_410_777_344, 1353),
}
TINY = dict(dim=32, ffn_dim=48, q_dim=32, kv_dim=16, vocab_size=72, vision_dim=48, vision_ffn_dim=56, merged_dim=192)
TINY |= dict(channels=3, pt=2, ph=4, pw=4)


def shapes(name, dialect="transformers"):
    fields = QWEN2_5_VL.presets[name]
    sizes = fields | dict(channels=3, pt=2, ph=14, pw=14, merged_dim=5120, q_dim=fields["dim"])
    layers = {"i": fields["num_layers"], "j": fields["vision_layers"]}
    return TABLE.shapes(dialect, sizes, layers, [] if fields["tied"] else ["untied"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_has_the_published_size(name):
    found = shapes(name)
    assert (sum(map(prod, found.values())), len(found)) == PUBLISHED[name]


@pytest.mark.parametrize("dialect", TABLE.dialects)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_dialect_is_understood(name, dialect):
    content = identify(shapes(name, dialect), name)
    assert (content.family, content.dialect) == (QWEN2_5_VL, dialect)
    assert set(content.names.values()) == set(shapes(name))
    assert {**content.config, **QWEN2_5_VL.presets[name]} == content.config
    assert name_preset(QWEN2_5_VL, content.config) == name


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_transformers(tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    content = identify(TABLE.shapes("transformers", TINY, {"i": 2, "j": 3}, [] if tied else ["untied"]), "tiny")
    config, _ = QWEN2_5_VL.complete({**content.config, "num_heads": 4, "num_kv_heads": 2, "vision_heads": 4})
    json = QWEN2_5_VL.write_config["transformers"]({**config, "mrope_section": [1, 1, 2]})
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**json))
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert theirs == TABLE.shapes("transformers-v5", TINY, {"i": 2, "j": 3}, [] if tied else ["untied"])
    assert QWEN2_5_VL.read_config(json) == config | {"mrope_section": [1, 1, 2]}


def zeros(row_bytes):
    return lambda start, stop: bytes(row_bytes * (stop - start))


def labelled(heights):
    """A tensor of one byte per row for each part, all different."""
    start = 0
    for height in heights:
        data = bytes(range(start, start + height))
        yield Computed("U8", (height, 1), lambda a, b, data=data: data[a:b])
        start += height


def test_q_k_and_v_are_interleaved_by_group():
    fusion = Fusion("qkv", {"q": "num_heads", "k": "num_kv_heads", "v": "num_kv_heads"}, "num_kv_heads")
    counts = {"num_heads": 16, "num_kv_heads": 2}  # of the 3B, with heads of one row
    whole = fusion.join(list(labelled([16, 2, 2])), counts)
    assert list(whole.read()) == [*range(8), 16, 18, *range(8, 16), 17, 19]
    assert [list(part.read()) for part in fusion.cut(whole, counts)] == [list(range(16)), [16, 17], [18, 19]]


def test_vision_q_k_and_v_are_interleaved_by_head():
    fusion = Fusion("qkv", dict.fromkeys("qkv", "heads"), "heads", stacked=True)
    (stacked,) = labelled([12])  # two heads of two rows
    whole = fusion.join([stacked], {"heads": 2})
    assert list(whole.read()) == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    assert list(fusion.cut(whole, {"heads": 2})[0].read()) == list(range(12))


def test_heads_that_do_not_divide_are_refused():
    fusion = Fusion("qkv", {"q": "num_heads", "k": "num_kv_heads", "v": "num_kv_heads"}, "num_kv_heads")
    with pytest.raises(ValueError, match="qkv has 20 rows; they cannot be 3 groups of q 6, k 3, v 3 heads"):
        fusion.cut(next(labelled([20])), {"num_heads": 6, "num_kv_heads": 3})


def test_fused_names_are_cut_and_joined_again():
    ours = TABLE.shapes("mindspeed", TINY, {"i": 2, "j": 3}, ["untied"])
    tensors = {name: Computed("U8", shape, zeros(prod(shape[1:]))) for name, shape in ours.items()}
    counts = {"num_heads": 4, "num_kv_heads": 2, "vision_heads": 4}
    joined = join_fused(tensors, QWEN2_5_VL, "mindspeed", counts)
    assert joined["text_decoder.decoder.layers.1.self_attention.linear_qkv.weight"].shape == (64, 32)
    assert not [name for name in joined if "#" in name]
    again = cut_fused(joined, QWEN2_5_VL, "mindspeed", counts, "tiny")
    assert {name: tensor.shape for name, tensor in again.items()} == ours
