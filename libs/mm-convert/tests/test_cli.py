"""The command as a person types it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time

import pytest

from mm_convert import open_checkpoint
from mm_convert.cli import main


def mm_convert(capsys, line):
    """(exit code, stdout, stderr) of a command line."""
    try:
        main([str(word) for word in line])
        code = 0
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    if isinstance(code, str):  # what Python prints for sys.exit(text)
        code, err = 1, err + code
    return code, out, err


@pytest.fixture
def run(capsys):
    return lambda *line: mm_convert(capsys, line)


def test_inspect_and_convert(run, toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    code, out, _ = run("inspect", source)
    assert code == 0
    assert "num_heads      2" in out
    code, _, err = run("convert", source, tmp_path / "out", "--to", "original")
    assert code == 0
    assert "100%" in err
    code, _, err = run("convert", source, tmp_path / "out")
    assert code == 1
    assert "--overwrite" in err
    assert run("convert", "--overwrite", source, tmp_path / "out", "--shard_gb", "0.00004")[0] == 0
    assert open_checkpoint(tmp_path / "out").layout == "mm"


def test_the_commands_of_the_guides(run, toys, tmp_path):
    source = toys.diffusers(tmp_path / "source/transformer", "i2v", files=2)
    line = ["WanConverter", "hf_to_mm", "--cfg.source_path", source, "--cfg.target_path", tmp_path / "mm"]
    assert run(*line)[0] == 0
    line = ["WanConverter", "mm_to_hf", "--cfg.source_path", tmp_path / "mm", "--cfg.target_path"]
    assert run(*line, tmp_path / "a", "--cfg.hf_path", source)[0] == 0
    assert run(*line, tmp_path / "b", "--cfg.hf_dir", source)[0] == 0
    assert run(*line, tmp_path / "c")[0] == 0
    for name in ("a", "b", "c"):
        for file in source.glob("*.safetensors"):
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()
    code, _, err = run(*line, tmp_path / "d", "--cfg.hf_dir", "x", "--cfg.hf_path", "y")
    assert code == 2
    assert "--cfg.hf_dir is given twice" in err


def test_dropped_tensors_are_reported(run, toys, tmp_path):
    shapes = toys.shapes("original", toys.kinds["t2v"] | dict(dim=128))
    toys.write_checkpoint(tmp_path / "source", toys.shapes("diffusers", toys.kinds["t2v"] | dict(dim=128)))
    extra = toys.shapes("diffusers", toys.kinds["t2v"] | dict(dim=128)) | {"blocks.0.attn2.norm_added_q.weight": (128,)}
    toys.write_checkpoint(tmp_path / "source", extra)
    _, _, err = run("convert", tmp_path / "source", tmp_path / "out")
    assert "note: 1 tensors are left out" in err
    assert set(open_checkpoint(tmp_path / "out")) == set(shapes)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["inspct", "x"], "did you mean inspect?"),
        (["WanConverter", "hf_to_m"], "did you mean WanConverter hf_to_mm?"),
        (["WanConverter", "hf_to_mm", "--cfg.sorce_path", "x"], "did you mean --cfg.source_path?"),
        (["WanConverter", "hf_to_mm", "--cfg.source_path", "x"], "required: --cfg.target_path"),
        (["convert", "a", "b", "--to", "difusers"], "--to is difusers; it takes one of mm, mindspeed"),
        (["convert", "a", "b", "--shard_gb", "0"], "--shard_gb is 0; it takes a number (more than 0), or null"),
        (["convert", "a"], "required: target"),
        (["convert", "nowhere", "b"], "nowhere does not exist"),
        (["diff", "nowhere", "b"], "nowhere does not exist"),
        (["WanConverter", "hf_to_mm", "--cfg.source_path", "no", "--cfg.target_path", "b"], "no does not exist"),
        (["convert", "a", "b", "c"], "'c' belongs to no option"),
    ],
)
def test_what_is_said_wrongly_exits_with_2(line, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*line)
    assert code == 2
    assert words in err
    assert not out
    assert not list(tmp_path.iterdir())


def test_help(run):
    assert run()[0] == 2
    assert "hf_to_mm  mm_to_hf  resplit" in run("--help")[1]
    assert "merge_lora_to_base" in run("WanConverter", "--help")[1]
    assert "vae_convert" not in run("VACEConverter", "--help")[1]  # only what it can do
    assert "regroup into files" in run("convert", "--help")[1]
    assert run("--version")[1].startswith("mm-convert ")


def test_the_package_is_the_command(toys, tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "mm_convert", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("--help").stdout.startswith("usage: mm-convert COMMAND [options]")
    assert "num_heads      2" in run("inspect", toys.diffusers(tmp_path / "source")).stdout
    failed = run("inspect", tmp_path / "nowhere")
    assert (failed.returncode, failed.stderr) == (2, f"mm-convert: error: {tmp_path / 'nowhere'} does not exist\n")
    assert run("inspct").returncode == 2
    (tmp_path / "a.txt").write_text("no weights")
    assert run("inspect", tmp_path / "a.txt").returncode == 1
    assert run("inspect", tmp_path).returncode == 1


LOADED = "import sys; {}; heavy = {{'torch', 'numpy', 'diffusers'}} & set(sys.modules); assert not heavy, heavy"


@pytest.mark.parametrize(
    "code",
    [
        "import mm_convert",
        "from mm_convert import convert, open_checkpoint",
        "import mm_convert.cli.commands, mm_convert.__main__",
    ],
)
def test_importing_loads_no_torch(code):
    subprocess.run([sys.executable, "-c", LOADED.format(code)], check=True)


@pytest.mark.parametrize("code", ["import mm_convert", "from mm_convert.cli import main; main(['--help'])"])
def test_answers_in_half_a_second(code):
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < 0.5


def test_diff_says_what_differs_and_ends_with_1(run, toys, tmp_path):
    pytest.importorskip("torch")
    source = toys.diffusers(tmp_path / "source", files=2)
    assert run("convert", source, tmp_path / "tree", "--to", "mindspeed", "--pp_layers", "[1,2]")[0] == 0
    assert run("diff", source, tmp_path / "tree")[:2] == (0, f"{len(open_checkpoint(source))} tensors, all equal\n")
    assert run("convert", source, tmp_path / "b", "--dtype", "bfloat16")[0] == 0
    assert set(open_checkpoint(tmp_path / "b").tensors[n].dtype for n in open_checkpoint(source)) == {"BF16"}
    code, out, _ = run("diff", source, tmp_path / "b")
    assert code == 1
    assert "head.modulation: F32 and BF16, largest difference" in out


def test_sums_are_of_what_was_written(run, toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    for to, file, name in (
        ("original", "diffusion_pytorch_model.safetensors", "head.modulation"),
        ("mindspeed", "release/mp_rank_00/model_optim_rng.pt", "model:head.modulation"),
    ):
        assert run("convert", source, tmp_path / to, "--to", to, "--sha256")[0] == 0
        sums = json.loads((tmp_path / to / "mm_convert.json").read_text())["sha256"]
        expected = hashlib.sha256(open_checkpoint(source).tensors["head.modulation"].read()).hexdigest()
        assert sums[file][name] == expected


def adapter(toys, folder, module, rank=2):
    name = f"blocks.0.{module}.lora_{{}}.default.weight"
    shapes = {name.format("A"): (rank, 24), name.format("B"): (24, rank)}
    folder.mkdir()
    toys.write_safetensors(folder / "adapter.safetensors", shapes, "BF16")
    return folder / "adapter.safetensors"


def test_an_adapter_of_mindspeed_needs_its_alpha(run, toys, tmp_path):
    pytest.importorskip("torch")
    base = toys.diffusers(tmp_path / "base")
    lora = adapter(toys, tmp_path / "lora", "self_attn.proj_q")
    merge = ["WanConverter", "merge_lora_to_base", "--cfg.source_path", base, "--cfg.lora_path", lora]
    for command in ([*merge, "--cfg.target_path", tmp_path / "merged"], ["inspect", lora]):
        code, _, err = run(*command)
        assert code == 1
        assert "--lora_alpha" in err
    code, _, err = run(*merge, "--cfg.target_path", tmp_path / "merged", "--lora_rank", "8", "--lora_alpha", "4")
    assert code == 1
    assert "8" in err
    assert not (tmp_path / "merged").exists()
    code, _, err = run(*merge, "--cfg.target_path", tmp_path / "merged", "--lora_rank", "2", "--lora_alpha", "4")
    assert code == 0
    assert "1 weights are merged" in err
    code, out, _ = run("diff", base, tmp_path / "merged")
    assert code == 1
    assert out.splitlines()[0].startswith("blocks.0.self_attn.q.weight: largest difference")
    assert len(out.splitlines()) == 2


def test_rank_and_alpha_travel_with_an_adapter(run, toys, tmp_path):
    lora = adapter(toys, tmp_path / "lora", "self_attn.proj_q")
    line = ["WanConverter", "lora_hf_to_mm", "--cfg.source_path", lora, "--cfg.target_path", tmp_path / "tree"]
    assert run(*line, "--lora_alpha", "4", "--target_layout", "mindspeed")[0] == 0
    assert (tmp_path / "tree/release/mp_rank_00/model_optim_rng.pt").exists()
    for to in ("diffusers", "comfyui", "peft"):
        line = ["WanConverter", "lora_mm_to_hf", "--cfg.source_path", tmp_path / "tree", "--cfg.target_path"]
        assert run(*line, tmp_path / to, "--to", to)[0] == 0
        code, out, _ = run("inspect", tmp_path / to)
        assert code == 0
        assert "rank, alpha    2, 4" in out
    assert run("convert", tmp_path / "comfyui", tmp_path / "back.safetensors", "--to", "mindspeed")[0] == 1
    assert run("convert", tmp_path / "comfyui", tmp_path / "one.safetensors", "--to", "diffusers")[0] == 0
    assert "rank, alpha    2, 4" in run("inspect", tmp_path / "one.safetensors")[1]
    code, _, err = run("convert", tmp_path / "comfyui", tmp_path / "x", "--tp_size", "2")
    assert code == 1
    assert "--tp_size" in err
