"""Folders and files that hold more than one thing, or the thing under other names: taken, or named."""

from __future__ import annotations

import json

import pytest

from mm_convert import convert, inspect, open_checkpoint
from mm_convert.cli import main
from mm_convert.families import QWEN2_5_VL, UMT5
from mm_convert.store.safetensors import read_file, write_file
from mm_convert.store.torch_file import write_torch_file
from mm_convert.tensors.views import Computed


def save(path, tensors, metadata=()):
    write_file(path, tensors, dict(metadata), lambda done: None)
    return path


def tensors_of(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in read_file(file)[0].items()}


def filled(shape, byte, dtype="F32", width=4):
    row = width
    for side in shape[1:]:
        row *= side
    return Computed(dtype, shape, lambda start, stop: bytes([byte]) * row * (stop - start))


# --- two checkpoints in a folder


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "old.pt"])
def test_another_checkpoint_beside_an_index_is_refused(name, toys, tmp_path):
    source = toys.diffusers(tmp_path / "model", files=2)
    tensors = tensors_of(source)
    if name.endswith(".safetensors"):
        save(source / name, tensors)
    else:
        write_torch_file(source / name, tensors, lambda done: None)
    with pytest.raises(ValueError, match=rf"holds diffusion_pytorch_model-00001-of-00002.* and {name} with weights"):
        open_checkpoint(source)
    assert len(open_checkpoint(source / name)) == len(tensors)
    index = open_checkpoint(source / "diffusion_pytorch_model.safetensors.index.json")
    assert {file.name for file in index.files} == {
        f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)
    }


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.pth"])
def test_torch_files_beside_safetensors_are_refused(name, toys, tmp_path):
    source = toys.diffusers(tmp_path / "model")
    write_torch_file(source / name, tensors_of(source), lambda done: None)
    with pytest.raises(ValueError, match=f"and {name} with weights of the same model"):
        open_checkpoint(source)
    if name.startswith("diffusion"):
        (source / name).write_bytes(b"half")  # of the same name, and not even readable
        with pytest.raises(ValueError, match=f"and {name} with weights of the same model"):
            open_checkpoint(source)


def test_other_models_and_adapters_beside_are_no_rivals(toys, tmp_path):
    source = toys.diffusers(tmp_path / "model", files=2)
    shapes = toys.published(UMT5, "umt5-xxl", "original")
    encoder = {name: Computed("BF16", (1,) * len(shape), lambda a, b: b"\0\0") for name, shape in shapes.items()}
    write_torch_file(source / "models_t5_umt5-xxl-enc-bf16.pth", encoder, lambda done: None)
    lora = {f"blocks.0.attn1.to_q.lora_{part}.weight": filled((2, 2), 1) for part in "AB"}
    save(source / "pytorch_lora_weights.safetensors", lora)
    (source / "training_args.bin").write_bytes(b"\x80\2cos\nsystem\n.")
    assert len(open_checkpoint(source).files) == 2


def test_links_into_any_cache_of_the_hub_are_followed(toys, tmp_path):
    source, blobs = toys.diffusers(tmp_path / "local", files=2), tmp_path / "cache/models--Wan-AI--Wan2.1/blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / f"{i:064x}")
        file.symlink_to(blobs / f"{i:064x}")
    assert open_checkpoint(source).family == "wan"
    blobs.parent.rename(tmp_path / "cache/other")
    for i, file in enumerate(sorted(source.iterdir())):
        file.unlink()
        file.symlink_to(tmp_path / f"cache/other/blobs/{i:064x}")
    with pytest.raises(ValueError, match="outside its folder"):
        open_checkpoint(source)


# --- wrapped and bundled


@pytest.fixture
def wan(toys, tmp_path):
    return tensors_of(toys.write_checkpoint(tmp_path / "wan", toys.shapes("original", toys.kinds["t2v"])))


@pytest.mark.parametrize("prefix", ["module.", "generator_ema.", "_orig_mod.", "module._orig_mod.model.", "model."])
def test_names_that_trainers_wrap(prefix, wan, tmp_path):
    path = save(tmp_path / "one.safetensors", {f"{prefix}{name}": tensor for name, tensor in wan.items()})
    assert set(open_checkpoint(path)) == set(wan)


def test_names_with_wrappers_in_their_midst(wan, tmp_path):
    wrapped = {n.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."): t for n, t in wan.items()}
    assert wrapped.keys() != wan.keys()
    assert set(open_checkpoint(save(tmp_path / "one.safetensors", wrapped))) == set(wan)


@pytest.mark.parametrize("keys", [("module",), ("state_dict", "module"), ("generator",), ("generator_ema",), ("ema",)])
def test_dictionaries_that_trainers_wrap(keys, wan, tmp_path):
    content = wan
    for key in reversed(keys):
        content = {key: content, "step": 3}
    write_torch_file(tmp_path / "a.pt", content, lambda done: None)
    assert set(open_checkpoint(tmp_path / "a.pt")) == set(wan)


def test_what_else_a_dictionary_holds_is_said(wan, tmp_path):
    content = {"generator": wan, "generator_ema": wan, "critic": {"a": filled((2,), 1)}, "step": 3}
    write_torch_file(tmp_path / "a.pt", content, lambda done: None)
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert "generator_ema, critic of a.pt is left out: generator is taken" in checkpoint.notes
    assert set(open_checkpoint(tmp_path / "a.pt", part="ema")) == set(wan)


def test_what_a_file_without_a_known_model_holds_is_said(wan, tmp_path):
    write_torch_file(tmp_path / "model.pt", {"params": wan, "step": 3}, lambda done: None)
    with pytest.raises(ValueError, match=r"holds no tensors under names.*; it holds params, step"):
        open_checkpoint(tmp_path / "model.pt")


def test_an_all_in_one_file_of_comfyui(wan, tmp_path):
    bundle = {f"model.diffusion_model.{name}": tensor for name, tensor in wan.items()}
    beside = {"vae.decoder.conv1.weight": filled((2, 2), 1), "text_encoders.umt5xxl.shared.weight": filled((2, 2), 1)}
    checkpoint = open_checkpoint(save(tmp_path / "all.safetensors", bundle | beside))
    assert set(checkpoint) == set(wan)
    assert checkpoint.notes[0].startswith("2 tensors of other models are left out (text_encoders.*, vae.*)")


def test_a_tree_that_dcp_to_torch_made_of_a_run_of_ours(wan, tmp_path):
    rank = tmp_path / "tree/release/mp_rank_00"
    rank.mkdir(parents=True)
    (tmp_path / "tree/latest_checkpointed_iteration.txt").write_text("release")
    content = {"model": wan, "optimizer": {"state": {"a": filled((2,), 1)}}, "ema": wan}
    write_torch_file(rank / "model_optim_rng.pt", content, lambda done: None)
    for part in ("model", "ema"):
        assert set(open_checkpoint(tmp_path / "tree", part=part)) == set(wan)


# --- what is no model that is known

OTHERS = {
    "a VAE": [f"{side}.layers.{i}.conv1.weight_v" for side in ("encoder", "decoder") for i in range(4)],
    "a language model": [f"transformer.h.{i}.attn.c_attn.weight" for i in range(9)],
    "a transformer of HunyuanVideo or Flux": [f"double_blocks.{i}.img_attn.qkv.weight" for i in range(9)],
    "a CLIP encoder; take a diffusers repository's image_encoder/": [
        f"visual.transformer.resblocks.{i}.ln_1.weight" for i in range(9)
    ],
    "states of an optimizer": [f"blocks.{i}.exp_avg" for i in range(9)],
    r"a\.\* \(1 tensors\), b \(1 tensors\)": ["a.x", "b"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_model_is_named_for_what_it_is(what, tmp_path, capsys):
    path = save(tmp_path / "a.safetensors", {name: filled((2, 2), 1) for name in OTHERS[what]})
    with pytest.raises(ValueError, match=f"belongs to no known family .* by its names it is {what}$") as error:
        open_checkpoint(path)
    assert "nearest" not in str(error.value)
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(path)])
    assert end.value.code not in (0, None)


@pytest.mark.parametrize("name", ["blocks.0.ffn.0.weight_scale_inv", "blocks.0.ffn.0.weight_scale_2", "a.scales"])
def test_fp8_with_other_scales_is_named(name, toys, tmp_path):
    source = toys.write_checkpoint(tmp_path / "a", toys.shapes("original", toys.kinds["t2v"]), dtype="F8_E4M3")
    tensors = tensors_of(source) | {name: filled((1,), 1)}
    with pytest.raises(ValueError, match=rf"is scaled fp8: .*{name}.* dequantise"):
        open_checkpoint(save(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("dtype", ["I8", "U8"])
def test_whole_numbers_are_no_weights(dtype, toys, tmp_path):
    source = toys.diffusers(tmp_path / "model")
    tensors = tensors_of(source)
    name = "blocks.1.attn1.to_q.weight"
    tensors[name] = filled(tensors[name].shape, 1, dtype, 1)
    whole = save(tmp_path / "whole.safetensors", tensors)
    with pytest.raises(ValueError, match=f"is quantised: {name} is {dtype}, as are 0 more, and nothing says of what"):
        open_checkpoint(whole)


# --- fp8 is floating point


def test_fp8_is_cast(toys, tmp_path):
    pytest.importorskip("torch")
    source = toys.diffusers(tmp_path / "fp8", dtype="F8_E4M3")
    convert(source, tmp_path / "bf16", "original", dtype="bfloat16")
    assert inspect(tmp_path / "bf16").dtypes.keys() == {"BF16"}
    fp8, bf16 = open_checkpoint(source), open_checkpoint(tmp_path / "bf16")
    import torch

    name = "blocks.0.ffn.0.weight"
    same = torch.equal(fp8[name].float().nan_to_num(7), bf16[name].float().nan_to_num(7))
    assert same


def test_an_adapter_is_merged_into_fp8_in_another_dtype(toys, tmp_path, capsys):
    pytest.importorskip("torch")
    source = toys.diffusers(tmp_path / "fp8", dtype="F8_E4M3")
    names = {f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight": shape for part, shape in
             (("down", (2, 24)), ("up", (24, 2)))}  # fmt: skip
    save(tmp_path / "lora.safetensors", {name: filled(shape, 0) for name, shape in names.items()})
    merge = ["WanConverter", "merge_lora_to_base", "--cfg.source_path", str(source), "--cfg.lora_path"]
    merge += [str(tmp_path / "lora.safetensors"), "--cfg.target_path", str(tmp_path / "merged")]
    with pytest.raises(SystemExit) as end:
        main(merge)
    said = str(end.value.code) + capsys.readouterr().err
    assert "this base cannot take an adapter as it is" in said
    assert "give --dtype bfloat16" in said
    main([*merge, "--dtype", "bfloat16"])
    assert inspect(tmp_path / "merged").dtypes.keys() == {"BF16"}


# --- copies of tied tensors


def qwen(folder, toys, copy, said):
    small = dict(dim=256, ffn_dim=8, q_dim=256, kv_dim=128, vocab_size=16, vision_dim=80, vision_ffn_dim=8)
    small |= dict(channels=3, pt=2, ph=14, pw=14, merged_dim=320)
    shapes = QWEN2_5_VL.table.shapes("transformers", small, {"i": 1, "j": 1})
    tensors = {name: filled(shape, 1) for name, shape in shapes.items()}
    if copy is not None:
        tensors["lm_head.weight"] = filled(shapes["model.embed_tokens.weight"], copy)
    folder.mkdir()
    save(folder / "model.safetensors", tensors)
    if said is not None:
        (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": said}))
    return folder


@pytest.mark.parametrize(
    ("copy", "said", "tied"), [(1, True, True), (1, None, True), (1, False, False), (2, None, False)]
)
def test_equal_copies_stay_tied(copy, said, tied, toys, tmp_path):
    checkpoint = open_checkpoint(qwen(tmp_path / "qwen", toys, copy, said))
    assert checkpoint.config["tied"] is tied
    assert ("lm_head.weight" in checkpoint) is not tied
    assert any("they stay tied" in note for note in checkpoint.notes) is tied


def test_tied_tensors_that_differ_are_refused(toys, tmp_path):
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_checkpoint(qwen(tmp_path / "qwen", toys, 2, True))


def umt5(path, copy, **more):
    sizes = dict(vocab_size=16, dim=8, ffn_dim=8, num_heads=2, head_dim=4, buckets=4)
    shapes = UMT5.table.shapes("transformers", sizes, {"i": 1, "j": 0})
    tensors = {name: filled(shape, 1) for name, shape in shapes.items()} | more
    return save(path, tensors | {"encoder.embed_tokens.weight": filled((16, 8), copy)})


def test_a_second_name_is_compared(tmp_path):
    same = open_checkpoint(umt5(tmp_path / "same.safetensors", 1, spiece_model=filled((9,), 1, "U8", 1)))
    assert "encoder.embed_tokens.weight" not in same
    assert "spiece_model" not in same
    assert any("the tokenizer's model" in note for note in same.notes)
    with pytest.raises(ValueError, match=r"encoder\.embed_tokens\.weight differs from shared\.weight"):
        open_checkpoint(umt5(tmp_path / "other.safetensors", 2))
    tensors = read_file(tmp_path / "same.safetensors")[0]
    del tensors["shared.weight"]
    assert "shared.weight" in open_checkpoint(save(tmp_path / "alone.safetensors", tensors))
