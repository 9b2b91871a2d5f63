"""What the README says can be typed, can be typed; only the sizes are made small."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mm_infer
from mm_convert import convert, save_lora, write_experts
from mm_data import write_video
from mm_infer.__main__ import main
from mm_models import build
from mm_models.lora import LoRAConfig, add_lora
from mm_models.opensoraplan import testing as opensoraplan

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")


@pytest.fixture
def home(pipeline, tmp_path, monkeypatch) -> Path:
    (tmp_path / "Wan2.1-T2V-1.3B-Diffusers").symlink_to(pipeline)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    convert(pipeline / "transformer", tmp_path / "run" / "weights", to="mm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands(home):
    commands = re.findall(r"```\n(.*?)```", README, re.DOTALL)[0]
    small = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1"]
    for command in commands.splitlines():
        _, _, flags = command.partition("-m mm_infer ")
        main([*shlex.split(flags), *small])
    videos = {str(file.relative_to(home)) for file in home.glob("*/video_*.mp4")}
    pairs = {f"{folder}/video_{i}.mp4" for folder in ("out480", "out8") for i in (0, 1)}
    assert videos == {"out/video_0.mp4", "trained/video_0.mp4"} | pairs


PUBLISHED = {
    "Wan2.1-I2V-14B-480P": "i2v",
    "Wan2.1-I2V-14B-720P": "i2v",
    "Wan2.1-FLF2V-14B-720P": "flf2v",
    "Wan2.1-T2V-14B": "t2v",
    "Wan2.2-T2V-A14B": "a14b",
    "Wan2.2-I2V-A14B": "a14b-i2v",
    "Wan2.2-TI2V-5B": "5b",
}


@pytest.fixture
def files(home, tiny) -> Path:
    """What the commands of the second block name."""
    for name, kind in PUBLISHED.items():
        (home / f"{name}-Diffusers").symlink_to(tiny(kind))
    (home / "Wan2.1-VACE-1.3B-diffusers").symlink_to(tiny("vace"))
    folders = write_experts(home / "pair", 0.875)
    for expert, folder in (("high", "transformer"), ("low", "transformer_2")):
        convert(tiny("a14b") / folder, folders[expert], to="mm")
        convert(tiny("a14b-vace") / folder, home / "Wan2.2-VACE-Fun-A14B" / f"{expert}_noise_model", to="original")
    pair = mm_infer.load(tiny("a14b"))
    model = add_lora(pair.weights.experts[0].load(pair.config, torch.device("cpu"), torch.float32), LoRAConfig(rank=2))
    for folder in ("high_noise_model", "low_noise_model"):
        save_lora(home / "adapters" / folder, model.state_dict(), 16.0)
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    for name in ("clip", "depth", "mask"):
        write_video(home / f"{name}.mp4", frames, fps=16)
    for name in ("cat", "dog"):
        Image.fromarray(frames[0]).save(home / f"{name}.png")
    for name in ("93x480p", "29x480p"):
        write_opensoraplan(opensoraplan.write_encoders(home / "osp") / name)
    (home / "samples_i2v_prompts.txt").write_text("the cat runs\nthe dog runs\n")
    (home / "samples_i2v_images.txt").write_text("cat.png\ndog.png\n")
    return home


def write_opensoraplan(folder: Path) -> None:
    """Weights of the tiny model, as they are published, for videos of 5 frames."""
    folder.mkdir()
    model = build("opensoraplan-tiny")
    tensors = {name: torch.zeros(weight.shape) for name, weight in model.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    said = {"_class_name": "OpenSoraT2V", "num_attention_heads": 4, "attention_head_dim": 36}
    said |= {f"interpolation_scale_{axis}": 1.0 for axis in "thw"} | {"sample_size_t": 2, "sample_size": [4, 4]}
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")


def test_commands_for_every_task(files):
    (commands,) = re.findall(r"```shell\n(.*?)```", README, re.DOTALL)
    lines = [line for line in commands.splitlines() if not line.startswith("#") and "--parallel" not in line]
    for line in lines:
        _, _, flags = line.partition("-m mm_infer ")
        flags = re.sub(r"--model \S+", "", flags)  # ours are no presets
        main(
            [
                *shlex.split(flags),
                "--height",
                "32",
                "--width",
                "32",
                "--frames",
                "5",
                "--steps",
                "4" if "pndm" in line else "2",
            ]
        )
    outputs = [re.search(r"--output (\S+)", line)[1] for line in lines]
    assert len(outputs) == 15
    for output in outputs:
        assert (files / output / "video_0.mp4").exists(), output


def test_python(home):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code, count = re.subn("height=480, width=832, frames=81, steps=50", "height=32, width=48, frames=5, steps=2", code)
    assert count == 2
    exec(code, {})
    assert (home / "cat.mp4").exists()
