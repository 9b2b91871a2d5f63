"""The commands of MindSpeed-MM's guides, as they stand there, on toys at the paths that they name."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from mm_convert import convert, convert_ckpt, convert_ckpt_to_mm, inspect, open_checkpoint, open_lora, save_lora
from mm_convert.cli import main
from mm_convert.families import FAMILIES
from mm_convert.read.content import identify
from mm_convert.store.torch_file import write_torch_file
from mm_convert.tensors.views import Stored

FAMILY = {family.name: family for family in FAMILIES}
HEADS = dict(num_heads=4, num_kv_heads=2, vision_heads=4)
QWEN = dict(dim=32, ffn_dim=48, q_dim=32, kv_dim=16, vocab_size=72, vision_dim=48, vision_ffn_dim=56, merged_dim=192)
QWEN |= dict(channels=3, pt=2, ph=4, pw=4)


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def mm_convert(command):
    main(shlex.split(command.replace("\\\n", " ")))


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same(a, b):
    a, b = open_checkpoint(a, published=True), open_checkpoint(b)
    assert list(sorted(a)) == list(sorted(b))
    assert all(a.tensors[name].read() == b.tensors[name].read() for name in a.tensors)


def hub(toys, folder, name, layers, groups=(), sizes=QWEN, files=2, **known):
    """A folder of the hub with a toy of a family, under our names, which are the published ones."""
    family = FAMILY[name]
    ours = family.table.dialects[0]
    shapes = family.table.shapes(ours, sizes, layers, groups)
    toys.write_checkpoint(folder, shapes, files)
    config, _ = family.complete({**identify(shapes, name).config, **known})
    (folder / "config.json").write_text(json.dumps(family.write_config[ours](config)))
    return folder


def test_qwen_3b(toys, tmp_path):
    source = hub(toys, tmp_path / "ckpt/hf_path/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl", {"i": 36, "j": 32}, **HEADS)
    (source / "tokenizer.json").write_text("{}")
    for layout in ("mm", "mindspeed"):
        mm_convert(
            f"""mm-convert  Qwen2_5_VLConverter hf_to_mm \\
            --cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" \\
            --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-3B-Instruct" \\
            --cfg.parallel_config.llm_pp_layers [[36]] \\
            --cfg.parallel_config.vit_pp_layers [[32]] \\
            --cfg.parallel_config.tp_size 1 --cfg.target_layout {layout} --overwrite"""[len("mm-convert ") :]
        )
        assert open_checkpoint("ckpt/mm_path/Qwen2.5-VL-3B-Instruct").layout == layout
        mm_convert(
            """mm-convert  Qwen2_5_VLConverter mm_to_hf \\
            --cfg.save_hf_dir "ckpt/mm_to_hf/Qwen2.5-VL-3B-Instruct" \\
            --cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" \\
            --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-3B-Instruct" \\
            --cfg.parallel_config.llm_pp_layers [36] \\
            --cfg.parallel_config.vit_pp_layers [32] \\
            --cfg.parallel_config.tp_size 1 --overwrite"""[len("mm-convert ") :]
        )
        back = tmp_path / "ckpt/mm_to_hf/Qwen2.5-VL-3B-Instruct"
        same(source, back)
        assert names(back) == names(source) | {"mm_convert.json"}


def test_qwen_7b_resplit_by_the_documentation(toys, tmp_path):
    hub(toys, tmp_path / "hf", "qwen2.5-vl", {"i": 28, "j": 32}, ["untied"], **HEADS)
    hf_to_mm = "Qwen2_5_VLConverter hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir hf --cfg.target_layout mindspeed "
    mm_convert(hf_to_mm + "--cfg.parallel_config.llm_pp_layers [[12,16]] --cfg.parallel_config.vit_pp_layers [[32,0]]")
    resplit = "Qwen2_5_VLConverter resplit --cfg.source_dir mm --cfg.target_dir new "
    there = "--cfg.source_parallel_config.llm_pp_layers [12,16] --cfg.source_parallel_config.vit_pp_layers [32,0] "
    then = (
        "--cfg.target_parallel_config.llm_pp_layers [1,10,10,7] --cfg.target_parallel_config.vit_pp_layers [32,0,0,0] "
    )
    mm_convert(resplit + there + then + "--cfg.target_parallel_config.tp_size 2")
    assert inspect("new").split == {"tp": 2, "pp": 4, "vpp": 1, "layers": {"llm": [1, 10, 10, 7], "vit": [32, 0, 0, 0]}}
    same("hf", "new")
    with pytest.raises(SystemExit, match=r"is said to be split by llm \[14, 14\], it has \[12, 16\]"):
        mm_convert(resplit.replace("new", "other") + there.replace("[12,16]", "[14,14]") + then)
    with pytest.raises(SystemExit, match=r"llm are 27 layers, the model has 28"):
        mm_convert(resplit.replace("new", "other") + then.replace("10,7", "10,6"))


@pytest.mark.parametrize("layout", ["mm", "mindspeed"])
def test_wan_in_place_and_back(layout, toys, tmp_path):
    folder = toys.diffusers(tmp_path / "weights/Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer", files=2)
    published = names(folder)
    mm_convert(f"""WanConverter hf_to_mm \\
        --cfg.source_path ./weights/Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer \\
        --cfg.target_path ./weights/Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer --cfg.target_layout {layout}""")
    assert published < names(folder)
    assert open_checkpoint(folder).layout == layout
    with pytest.raises(SystemExit, match="exists; name another target, or replace it with --overwrite true"):
        mm_convert(
            f"WanConverter hf_to_mm --cfg.source_path {folder} --cfg.target_path {folder} --cfg.target_layout {layout}"
        )
    for spelling in ("hf_path", "hf_dir"):
        mm_convert(f"""WanConverter mm_to_hf \\
            --cfg.source_path ./weights/Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer \\
            --cfg.target_path ./converted_weights/{spelling}/transformer \\
            --cfg.{spelling} weights/Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer""")
        same(folder, f"converted_weights/{spelling}/transformer")
        assert names(tmp_path / f"converted_weights/{spelling}/transformer") == published | {"mm_convert.json"}


def test_both_experts_at_once_are_refused(toys, tmp_path):
    for expert in ("transformer", "transformer_2"):
        toys.diffusers(tmp_path / "Wan2.2" / expert)
    with pytest.raises(SystemExit, match=r"holds two models; name one of Wan2\.2/transformer \(high noise\)"):
        mm_convert("WanConverter hf_to_mm --cfg.source_path Wan2.2 --cfg.target_path out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--cfg.target_parallel_config.pp_layers", "--pp_layers", "--cfg.pp_layers"])
@pytest.mark.parametrize(("said", "files"), [("[1,2]", 2), ("'[1, 2]'", 2), ("[[1],[2]]", 1), ('"[[1,1],[1,0]]"', 0)])
def test_every_spelling_of_pp_layers(option, said, files, toys, tmp_path):
    toys.diffusers(tmp_path / "s")
    command = (
        f"WanConverter hf_to_mm --cfg.source_path s --cfg.target_path t --cfg.target_layout mindspeed {option} {said}"
    )
    if not files:
        with pytest.raises(SystemExit, match="stage 3 has no layer"):
            mm_convert(command)
        return
    mm_convert(command)
    assert len(list((tmp_path / "t").rglob("*.pt"))) == files
    same("s", "t")


def test_vace_to_one_file(toys, tmp_path):
    sizes = dict(dim=24, ffn_dim=40, freq_dim=32, text_dim=16, in_channels=16, out_channels=16, control_channels=96)
    sizes |= dict(patch_t=1, patch_h=2, patch_w=2)
    folder = tmp_path / "weights/Wan-AI/Wan2.1-VACE-1.3B"
    hub(toys, folder, "vace", {"i": 4, "j": 2}, sizes=sizes, files=1, num_heads=2)
    (folder / "Wan2.1_VAE.pth").write_bytes(b"not looked at")
    mm_convert("""VACEConverter hf_to_mm \\
        --cfg.source_path ./weights/Wan-AI/Wan2.1-VACE-1.3B/ \\
        --cfg.target_path ./weights/Wan-AI/Wan2.1-VACE-1.3B/ \\
        --cfg.target_parallel_config.pp_layers [1,1,1,1] --cfg.target_layout mindspeed""")
    mm_convert("""VACEConverter mm_to_hf \\
        --cfg.source_path ./weights/Wan-AI/Wan2.1-VACE-1.3B/ \\
        --cfg.target_path ./converted_weights/Wan-AI/Wan2.1-VACE-1.3B/post_train.pt""")
    same(folder, "converted_weights/Wan-AI/Wan2.1-VACE-1.3B/post_train.pt")
    mm_convert(f"VACEConverter mm_to_hf_diffusers --cfg.source_path {folder} --cfg.target_path d")
    assert open_checkpoint("d").dialect == "diffusers"
    assert open_checkpoint("d").config["vace_layers"] == [0, 2]
    mm_convert("VACEConverter hf_diffusers_to_mm --cfg.source_path d --cfg.target_path m")
    same(folder, "m")
    with pytest.raises(SystemExit, match="is a checkpoint of vace, not of wan"):
        mm_convert("WanConverter hf_to_mm --cfg.source_path d --cfg.target_path x")


@pytest.mark.parametrize("layout", ["mm", "mindspeed"])
def test_the_older_script_of_wan(layout, toys, tmp_path):
    folder = toys.diffusers(tmp_path / "weights/Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer", files=2)
    published = names(folder)
    to_mm = f"--source_path {folder}/ --target_path {folder}/ --mode convert_to_mm --target_layout {layout}"
    convert_ckpt.main(shlex.split(to_mm + " --pp_vpp_layers '[1,2]'"))
    assert open_checkpoint(folder).layout == layout
    back = f"--source_path {folder} --ckpt_path {folder} --target_path back --mode convert_to_hf"
    convert_ckpt.main(shlex.split(back))
    same(folder, "back")
    assert names(tmp_path / "back") == published | {"mm_convert.json"}
    if layout == "mindspeed":  # the guide's own line: published files into the folder of what was trained
        convert(folder, "saved", "mindspeed")
        convert_ckpt.main(
            shlex.split(f"--source_path saved --ckpt_path {folder} --target_path saved --mode convert_to_hf")
        )
        same("saved", folder)
        assert published < names(tmp_path / "saved")
        assert open_checkpoint("saved").layout == "mindspeed"
        with pytest.raises(SystemExit, match="exists"):
            convert_ckpt.main(
                shlex.split(f"--source_path saved --ckpt_path {folder} --target_path saved --mode convert_to_hf")
            )
    with pytest.raises(SystemExit) as stop:
        convert_ckpt.main(["--mode", "convert_to_mm", "--source_path", "x"])
    assert stop.value.code == 2


OSP = dict(dim=48, ffn_dim=192, caption_dim=32, in_channels=4, out_channels=4)


@pytest.mark.parametrize("layout", ["mm", "mindspeed"])
def test_the_older_script_of_open_sora_plan(layout, toys, tmp_path):
    table = FAMILY["opensoraplan"].table
    sizes = {side: 2 for row in table.rows for side in row.shape.replace("*", " ").split() if not side.isdecimal()}
    sizes |= dict(dim=48, ffn_dim=192)
    raw = tmp_path / "raw_ckpt/open-sora-plan"
    folder = hub(toys, raw / "93x480p", "opensoraplan", {"i": 3}, sizes=sizes, files=1, num_heads=2)
    vae = FAMILY["opensoraplan-vae"].table
    vae_sizes = {side: 2 for row in vae.rows for side in row.shape.replace("*", " ").split() if not side.isdecimal()}
    shapes = vae.shapes("original", vae_sizes, {})
    toys.write_safetensors(tmp_path / "vae.safetensors", shapes)
    from mm_convert.store.safetensors import read_file

    tensors, _ = read_file(tmp_path / "vae.safetensors")
    assert all(isinstance(tensor, Stored) for tensor in tensors.values())
    (raw / "vae").mkdir()
    ema = {f"module.{name}": tensor for name, tensor in tensors.items()}
    write_torch_file(raw / "vae/checkpoint.ckpt", {"ema_state_dict": ema, "epoch": 3}, lambda _: None)
    convert_ckpt_to_mm.main(["--mode=split", "--tp-size=2", f"--target-layout={layout}"])
    same(folder, "ckpt/open-sora-plan-12/93x480p")
    same("vae.safetensors", "ckpt/vae" if layout == "mm" else "ckpt/vae/casualvae_mm.pt")
    assert inspect("ckpt/open-sora-plan-12/93x480p").split.get("tp") == (2 if layout == "mindspeed" else None)
    convert_ckpt_to_mm.main(["--mode", "merge", "--tp_size", "2", "--target_layout", layout])
    same(folder, "ckpt/open-sora-plan-12/merge")
    with pytest.raises(SystemExit) as stop:
        convert_ckpt_to_mm.main(["--mode", "split", "--tp-sizes=2"])
    assert stop.value.code == 2


def test_the_scripts_are_installed_under_their_names():
    for module in ("convert_ckpt", "convert_ckpt_to_mm"):
        command = [sys.executable, "-m", f"mm_convert.{module}", "--help"]
        assert "--mode" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_options_from_a_file_and_from_the_environment(toys, tmp_path, monkeypatch, capsys):
    toys.diffusers(tmp_path / "s")
    words = "WanConverter hf_to_mm --cfg.source_path s --cfg.target_path t --cfg.target_parallel_config.pp_layers [1,2]"
    with pytest.raises(SystemExit):
        mm_convert(f"{words} --print_config")
    (tmp_path / "c.toml").write_text(capsys.readouterr().out)
    mm_convert("WanConverter hf_to_mm --config c.toml")
    same("s", "t")
    (tmp_path / "c.yaml").write_text("cfg:\n  source_path: s\n  target_path: t2\n")  # as upstream's users have them
    mm_convert("WanConverter hf_to_mm --config c.yaml")
    same("s", "t2")
    with pytest.raises(SystemExit):
        mm_convert("WanConverter hf_to_mm --print_config=comments")
    template = capsys.readouterr().out
    assert "# source_path =   (required)" in template
    assert "# published files" in template
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("MM_CONVERT_WANCONVERTER__HF_TO_MM__CFG__SOURCE_PATH", "s")
    monkeypatch.setenv("MM_CONVERT_WANCONVERTER__HF_TO_MM__CFG__TARGET_PARALLEL_CONFIG__PP_LAYERS", "[2,1]")
    mm_convert("WanConverter hf_to_mm --cfg.target_path t3")
    assert len(list((tmp_path / "t3").glob("*.safetensors"))) == 2
    monkeypatch.setenv("MM_CONVERT_WANCONVERTER__HF_TO_MM__CFG__SORCE_PATH", "s")
    with pytest.raises(SystemExit) as stop:
        mm_convert("WanConverter hf_to_mm --cfg.target_path t4")
    assert stop.value.code == 2


def test_a_dry_run_writes_nothing(toys, tmp_path, capsys):
    toys.diffusers(tmp_path / "s")
    command = "WanConverter hf_to_mm --cfg.source_path s --cfg.target_path t --cfg.target_layout mindspeed"
    mm_convert(f"{command} --pp_layers [1,2] --dry_run")
    said = capsys.readouterr().out
    assert "release/mp_rank_00_001/model_optim_rng.pt" in said
    assert "latest_checkpointed_iteration.txt: release" in said
    assert not (tmp_path / "t").exists()


def save_adapter(module, height, width):
    """Of ones, of rank 2 and alpha 6."""
    torch = pytest.importorskip("torch")
    factors = {"A": torch.ones(2, width), "B": torch.ones(height, 2)}
    save_lora("lora", {f"{module}.lora_{part}.weight": factor for part, factor in factors.items()}, 6.0)


@pytest.mark.parametrize(
    ("converter", "family", "module"),
    [
        ("WanConverter", "wan", "blocks.1.ffn.0"),
        ("WanConverter", "vace", "vace_blocks.1.ffn.0"),
        ("VACEConverter", "vace", "vace_blocks.1.ffn.0"),
        ("OpenSoraPlanConverter", "opensoraplan", "transformer_blocks.0.attn1.to_q"),
        ("Qwen2_5_VLConverter", "qwen2.5-vl", "model.layers.0.self_attn.k_proj"),
        ("", "qwen2.5-vl", "visual.blocks.0.mlp.up_proj"),
        ("", "vace", "blocks.0.self_attn.q"),
    ],
)
def test_an_adapter_merges_into_every_family(converter, family, module, toys, tmp_path):
    torch = pytest.importorskip("torch")
    if family in ("opensoraplan", "qwen2.5-vl"):
        sides = {side for row in FAMILY[family].table.rows for side in row.shape.replace("*", " ").split()}
        osp = {side: 2 for side in sides if not side.isdecimal()} | dict(dim=48, ffn_dim=192)
        how = dict(sizes=osp, num_heads=2) if family == "opensoraplan" else HEADS
        hub(toys, tmp_path / "base", family, {"i": 1, "j": 1}, **how)
    else:
        kind = toys.control if family == "vace" else toys.kinds["t2v"]
        toys.write_checkpoint(tmp_path / "base", toys.shapes("original", kind))
    base = open_checkpoint("base")
    height, width = base.shape(f"{module}.weight")
    save_adapter(module, height, width)
    if converter:
        words = "merge_lora_to_base --cfg.source_path base --cfg.lora_path lora --cfg.target_path merged"
        mm_convert(f"{converter} {words}")
    else:
        mm_convert("convert base merged --lora lora")
    merged = open_checkpoint("merged")
    assert (merged.family, list(sorted(merged))) == (family, list(sorted(base)))
    different = [name for name in base if base.tensors[name].read() != merged.tensors[name].read()]
    assert different == [f"{module}.weight"]
    torch.testing.assert_close(merged[f"{module}.weight"], base[f"{module}.weight"] + 6 / 2 * 2, equal_nan=True)


def test_an_adapter_of_wan_is_taken_for_the_vace_that_it_is_meant_for(tmp_path):
    save_adapter("blocks.0.self_attn.q", 8, 8)
    line = "lora_hf_to_mm --cfg.source_path lora --target_layout mindspeed --cfg.target_path"
    mm_convert(f"VACEConverter {line} vace")
    mm_convert(f"WanConverter {line} wan")
    assert open_lora("vace", family="vace").family.name == "vace"
    assert (open_lora("vace").alpha, open_lora("wan").alpha) == (6, 6)
    assert open_lora("wan").family.name == "wan"
