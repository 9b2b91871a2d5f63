"""Stages and ranks as arithmetic: who holds what, and what is refused with the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_convert.families import FAMILIES
from mm_convert.tensors.stages import Places, Split, check

CUTS = {family.name: family.cuts for family in FAMILIES}
WAN, QWEN, VACE = CUTS["wan"], CUTS["qwen2.5-vl"], CUTS["vace"]


def places(layers, cuts=WAN, config=()):
    return Places(Split.of(layers), cuts, dict(config))


def test_virtual_stages_are_dealt_out_in_order():
    place = places({"layers": [[1, 1], [1, 1]]})  # pp 2, vpp 2: rank 0 has layers 0 and 2, rank 1 has 1 and 3
    assert [place(f"blocks.{i}.ffn.0.weight") for i in range(4)] == [(s, "blocks.0.ffn.0.weight") for s in range(4)]
    assert place("patch_embedding.weight")[0] == 0
    assert place("head.head.weight")[0] == 3


def test_the_whole_image_branch_is_on_the_first_stage():
    place = places({"layers": [2, 2]})
    names = [f"img_emb.proj.{n}.{kind}" for n in (0, 1, 3, 4) for kind in ("weight", "bias")] + ["img_emb.emb_pos"]
    assert {place(name)[0] for name in names} == {0}


def test_vision_and_language_have_their_own_first_and_last_stage():
    place = places({"llm": [0, 3, 2], "vit": [2, 2, 0]}, QWEN)
    assert place("image_encoder.encoder.patch_embed.proj.weight")[0] == 0
    assert place("image_encoder.encoder.blocks.layers.2.input_layernorm.weight") == (
        1,
        "image_encoder.encoder.blocks.layers.0.input_layernorm.weight",
    )
    assert place("image_encoder.projector.layernorm.weight")[0] == 1
    assert place("text_decoder.embedding.word_embeddings.weight")[0] == 1
    assert place("text_decoder.decoder.final_layernorm.weight")[0] == 2
    assert place("text_decoder.output_layer.weight")[0] == 2


def test_control_blocks_follow_the_layers_they_feed():
    place = places({"layers": [2, 1, 3]}, VACE, {"vace_layers": [0, 2, 4]})
    block = "vace_dit.vace_blocks.{}.after_proj.weight"
    assert [place(block.format(j)) for j in range(3)] == [(stage, block.format(0)) for stage in range(3)]
    assert place("vace_dit.vace_patch_embedding.weight")[0] == 0
    assert place("wan_dit.head.modulation")[0] == 2


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_every_layer_has_one_place_and_the_places_are_dense(counts):
    place = places({"layers": counts})
    found = [place(f"blocks.{i}.x") for i in range(sum(counts))]
    assert found == [(stage, f"blocks.{n}.x") for stage, count in enumerate(counts) for n in range(count)]


@pytest.mark.parametrize(
    ("cuts", "layers", "tp", "said"),
    [
        (WAN, {"layers": [10, 10]}, 1, r"pp_layers \[10, 10\] of layers are 20 layers, the model has 30"),
        (WAN, {"layers": [[10, 10], [5, 6]]}, 1, r"are 31 layers, the model has 30"),
        (WAN, {"layers": [10, 0, 20]}, 1, r"stage 1 has no layer \(layers \[10, 0, 20\]\)"),
        (WAN, {"layers": [-1, 31]}, 1, "cannot be negative"),
        (WAN, {"layers": [[10, 10], [10]]}, 1, "as many numbers as there are pipeline ranks"),
        (WAN, {}, 7, r"12 heads cannot be split over tp_size 7: tp_size must divide them \(1, 2, 3, 4, 6, 12\)"),
        (WAN, {}, 0, "tp_size is 0"),
        (WAN, {"lairs": [30]}, 1, "there is no ladder lairs; there are layers"),
        (QWEN, {"llm": [30]}, 1, "the layers of vit must be given too"),
        (
            QWEN,
            {"llm": [10, 20], "vit": [30]},
            1,
            r"vit \[\[30\]\] have different numbers of stages",
        ),
        (QWEN, {"llm": [0, 30], "vit": [0, 30]}, 1, r"stage 0 has no layer \(llm \[0, 30\], vit \[0, 30\]\)"),
        (QWEN, {}, 4, r"2 key-value heads cannot be split over tp_size 4"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(cuts, layers, tp, said):
    config = {"num_heads": 12, "num_kv_heads": 2, "vision_heads": 16, "ffn_dim": 64, "vision_ffn_dim": 64}
    with pytest.raises(ValueError, match=said):
        check(Split.of(layers, tp), cuts, {"i": 30, "j": 30}, config | {"vocab_size": 8})


def test_vision_alone_on_a_stage_is_the_guides_own_layout():
    split = check(Split.of({"llm": [0, 28], "vit": [32, 0]}), QWEN, {"i": 28, "j": 32}, {})
    assert (split.pp, split.vpp, split.stages) == (2, 1, 2)
    assert check(Split.of({"llm": [12, 16], "vit": [32, 0]}), QWEN, {"i": 28, "j": 32}, {}).flat("vit") == [32, 0]
