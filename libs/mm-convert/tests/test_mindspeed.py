"""MindSpeed-MM's trees: written as its tools read them, read back without being told how they are split."""

from __future__ import annotations

import json
import shutil
from math import prod

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_convert import convert, inspect, open_checkpoint
from mm_convert.families import FAMILIES
from mm_convert.read.content import identify
from mm_convert.store.mindspeed import read_ranks
from mm_convert.write.prepare import prepare_conversion

FAMILY = {family.name: family for family in FAMILIES}
WAN = dict(
    dim=24, ffn_dim=40, freq_dim=32, text_dim=16, in_channels=16, out_channels=16, image_dim=20, image_tokens=514
)
WAN |= dict(patch_t=1, patch_h=2, patch_w=2)
QWEN = dict(dim=32, ffn_dim=48, q_dim=32, kv_dim=16, vocab_size=72, vision_dim=48, vision_ffn_dim=56, merged_dim=192)
QWEN |= dict(channels=3, pt=2, ph=4, pw=4)


def toy(name, layers, groups=(), sizes=None):
    """Our names and shapes of a toy of a family."""
    family = FAMILY[name]
    return family.table.shapes(family.table.dialects[0], sizes, layers, groups)


@pytest.fixture
def source(toys, tmp_path):
    """Writes a toy under published names, with the config.json of the family."""

    def write(name, layers, groups=(), **heads):
        sizes = {"wan": WAN, "vace": WAN | {"control_channels": 96}, "qwen2.5-vl": QWEN}[name]
        folder = tmp_path / f"source-{len(list(tmp_path.iterdir()))}"
        shapes = toy(name, layers, groups, sizes)
        toys.write_checkpoint(folder, shapes, files=2)
        family = FAMILY[name]
        config, _ = family.complete({**identify(shapes, name).config, **heads})
        ours = family.table.dialects[0]
        (folder / "config.json").write_text(json.dumps(family.write_config[ours](config)))
        return folder

    return write


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def assert_same(a, b):
    a, b = open_checkpoint(a), open_checkpoint(b)
    assert {n: (t.dtype, t.shape) for n, t in a.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in b.tensors.items()
    }
    assert all(a.tensors[name].read() == b.tensors[name].read() for name in a.tensors)


def test_the_tree_of_one_rank(source, tmp_path):
    convert(source("wan", {"i": 2}, ["image", "image kv"], num_heads=2), tmp_path / "t", "mindspeed")
    files = sorted(str(path.relative_to(tmp_path / "t")) for path in (tmp_path / "t").rglob("*") if path.is_file())
    expected = ["latest_checkpointed_iteration.txt", "mm_convert.json", "release/mp_rank_00/model_optim_rng.pt"]
    assert files == expected
    assert (tmp_path / "t/latest_checkpointed_iteration.txt").read_text() == "release"
    torch = pytest.importorskip("torch")
    content = torch.load(tmp_path / "t/release/mp_rank_00/model_optim_rng.pt", weights_only=True)
    assert set(content) == {"model"}
    assert {"blocks.1.cross_attn.k_norm_img.weight", "img_emb.proj.4.bias", "head.modulation"} <= set(content["model"])


def test_every_stage_holds_what_mindspeed_expects(source, tmp_path):
    convert(source("wan", {"i": 4}, num_heads=2), tmp_path / "t", "mindspeed", pp_layers=[[1, 1], [1, 1]])
    torch = pytest.importorskip("torch")
    for rank, outside in ((0, {"patch_embedding.weight"}), (1, {"head.modulation"})):
        content = torch.load(tmp_path / f"t/release/mp_rank_00_00{rank}/model_optim_rng.pt", weights_only=True)
        assert set(content) == {"model0", "model1", "checkpoint_version"}
        for model in ("model0", "model1"):
            numbers = {name.split(".")[1] for name in content[model] if name.startswith("blocks.")}
            assert numbers == {"0"}
        assert outside <= set(content["model0" if rank == 0 else "model1"])
    original = open_checkpoint(next(tmp_path.glob("source-*")))
    second = torch.load(tmp_path / "t/release/mp_rank_00_000/model_optim_rng.pt", weights_only=True)["model1"]
    found, expected = second["blocks.0.ffn.0.weight"], original["blocks.2.ffn.0.weight"]
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


SPLITS = st.lists(st.integers(1, 3), min_size=1, max_size=4).flatmap(
    lambda flat: st.sampled_from([v for v in (1, 2) if len(flat) % v == 0]).map(
        lambda vpp: [flat[v * len(flat) // vpp : (v + 1) * len(flat) // vpp] for v in range(vpp)]
    )
)
SETTINGS = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def there_and_back(folder, tmp_path, **split):
    for name in ("tree", "mm", "back"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    convert(folder, tmp_path / "tree", "mindspeed", **split)
    assert_same(folder, tmp_path / "tree")
    convert(tmp_path / "tree", tmp_path / "back", open_checkpoint(folder).dialect)
    convert(folder, tmp_path / "mm", "mm", **split)
    assert_same(folder, tmp_path / "back")
    assert_same(folder, tmp_path / "mm")
    for name in ("back", "mm"):
        assert open_checkpoint(tmp_path / name).config == open_checkpoint(folder).config


@SETTINGS
@given(layers=SPLITS, image=st.booleans())
def test_any_split_of_wan_comes_back(layers, image, source, tmp_path):
    folder = source(
        "wan", {"i": sum(map(sum, layers))}, ["image", "image kv", "image positions"] if image else [], num_heads=2
    )
    there_and_back(folder, tmp_path, pp_layers=layers, tp_size=2)


@SETTINGS
@given(layers=SPLITS, data=st.data())
def test_any_split_of_vace_comes_back(layers, data, source, tmp_path):
    count = sum(map(sum, layers))
    vace = sorted({0, *data.draw(st.sets(st.integers(0, count - 1)))})
    folder = source("vace", {"i": count, "j": len(vace)}, num_heads=2, vace_layers=vace)
    there_and_back(folder, tmp_path, pp_layers=layers)


@SETTINGS
@given(llm=SPLITS, tp=st.sampled_from([1, 2]), tied=st.booleans(), data=st.data())
def test_any_split_of_qwen_comes_back(llm, tp, tied, data, source, tmp_path):
    vit = [[data.draw(st.integers(0, 2)) for _ in virtual] for virtual in llm]
    vit[0][0] += not any(map(any, vit))
    layers = {"i": sum(map(sum, llm)), "j": sum(map(sum, vit))}
    heads = dict(num_heads=4, num_kv_heads=2, vision_heads=4)
    folder = source("qwen2.5-vl", layers, [] if tied else ["untied"], **heads)
    there_and_back(folder, tmp_path, pp_layers={"llm": llm, "vit": vit}, tp_size=tp)


def test_slices_of_ranks(source, tmp_path):
    heads = dict(num_heads=4, num_kv_heads=2, vision_heads=4)
    folder = source("qwen2.5-vl", {"i": 2, "j": 2}, ["untied"], **heads)
    convert(folder, tmp_path / "t", "mindspeed", tp_size=2)
    ours = open_checkpoint(folder).tensors
    ranks, _ = read_ranks(tmp_path / "t/release")
    (first,), (second,) = ranks
    gate, up = (ours[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    fc1 = "text_decoder.decoder.layers.0.mlp.linear_fc1.weight"
    assert first[fc1].read() == gate.read(0, 24) + up.read(0, 24)
    assert second[fc1].read() == gate.read(24, 48) + up.read(24, 48)
    q, k, v = (ours[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    qkv = "text_decoder.decoder.layers.1.self_attention.linear_qkv.weight"
    assert second[qkv].read() == q.read(16, 32) + k.read(8, 16) + v.read(8, 16)  # one group: two heads and their k, v
    o = ours["model.layers.0.self_attn.o_proj.weight"].read()
    proj = first["text_decoder.decoder.layers.0.self_attention.linear_proj.weight"]
    assert proj.shape == (32, 16)
    assert bytes(proj.read()) == b"".join(o[row * 128 : row * 128 + 64] for row in range(32))
    norm = "text_decoder.decoder.final_layernorm.weight"
    assert first[norm].read() == second[norm].read() == ours["model.norm.weight"].read()


def test_tied_embeddings_stand_on_the_last_stage_too(source, tmp_path):
    folder = source("qwen2.5-vl", {"i": 2, "j": 1}, num_heads=4, num_kv_heads=2, vision_heads=4)
    split = {"llm": [1, 1], "vit": [1, 0]}
    convert(folder, tmp_path / "t", "mindspeed", pp_layers=split)
    ranks, files = read_ranks(tmp_path / "t/release")
    first, last = ranks[0]
    copy = last["text_decoder.output_layer.weight"]
    assert copy.read() == first["text_decoder.embedding.word_embeddings.weight"].read()
    (tmp_path / "t/mm_convert.json").unlink()  # as MindSpeed-MM itself leaves it: equal bytes tell that they are tied
    heads = dict(num_heads=4, num_kv_heads=2, vision_heads=4)
    assert open_checkpoint(tmp_path / "t", config=heads).config["tied"]
    data = bytearray(files[1].read_bytes())
    data[copy.start] ^= 1
    files[1].write_bytes(data)
    assert not open_checkpoint(tmp_path / "t", config=heads).config["tied"]
    with pytest.raises(ValueError, match=r"differs from .* though the configuration says that they are tied"):
        open_checkpoint(tmp_path / "t", config=heads | {"tied": True})


@pytest.mark.parametrize("text", ["release", "release\n", " release \r\n"])
def test_the_tracker_with_and_without_newline(text, source, tmp_path):
    folder = source("wan", {"i": 2}, num_heads=2)
    convert(folder, tmp_path / "t", "mindspeed")
    (tmp_path / "t/latest_checkpointed_iteration.txt").write_text(text)
    assert_same(folder, tmp_path / "t")


def test_a_training_save_by_number(source, tmp_path):
    folder = source("wan", {"i": 2}, num_heads=2)
    convert(folder, tmp_path / "t", "mindspeed", pp_layers=[1, 1])
    (tmp_path / "t/release").rename(tmp_path / "t/iter_0000500")
    (tmp_path / "t/latest_checkpointed_iteration.txt").write_text("500\n")
    assert_same(folder, tmp_path / "t")
    assert_same(folder, tmp_path / "t/iter_0000500")
    about = inspect(tmp_path / "t")
    assert (about.layout, about.files) == ("mindspeed", 2)
    assert about.split == {"tp": 1, "pp": 2, "vpp": 1, "layers": {"layers": [1, 1]}}
    (tmp_path / "t/latest_checkpointed_iteration.txt").write_text("600")
    with pytest.raises(ValueError, match=r"says 600, but .*iter_0000600 is not there"):
        open_checkpoint(tmp_path / "t")
    (tmp_path / "t/latest_checkpointed_iteration.txt").write_text("latest")
    with pytest.raises(ValueError, match="must say release or a number"):
        open_checkpoint(tmp_path / "t")


def test_missing_ranks_are_named(source, tmp_path):
    convert(source("wan", {"i": 3}, num_heads=2), tmp_path / "t", "mindspeed", pp_layers=[1, 1, 1], tp_size=2)
    shutil.rmtree(tmp_path / "t/release/mp_rank_01_001")
    with pytest.raises(ValueError, match="ranks of tp 2 and pp 3, but mp_rank_01_001 is missing"):
        open_checkpoint(tmp_path / "t")


def test_converting_in_place_leaves_the_published_files(source, tmp_path):
    folder = source("wan", {"i": 2}, num_heads=2)
    before = contents(folder)
    convert(folder, folder, "mindspeed")
    assert contents(folder) == before
    assert open_checkpoint(folder).layout == "mindspeed"
    assert "also holds published files" in open_checkpoint(folder).notes[0]
    assert open_checkpoint(folder, published=True).layout == "safetensors"
    with pytest.raises(ValueError, match="release exists"):
        prepare_conversion(open_checkpoint(folder, published=True), folder, "mindspeed").write()
    convert(folder, tmp_path / "back", "original")  # from the tree, which says how many heads there are
    assert contents(tmp_path / "back").keys() == {"diffusion_pytorch_model.safetensors"}
    assert_same(folder, tmp_path / "back")


def test_sizes_of_the_toys():
    assert sum(map(prod, toy("qwen2.5-vl", {"i": 2, "j": 2}, sizes=QWEN).values())) < 150_000
