"""What the README says can be typed, can be typed; only the sizes are made small."""

import re
import shlex
from pathlib import Path

import pytest

from mm_convert import convert
from mm_infer.__main__ import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def home(pipeline, tmp_path, monkeypatch) -> Path:
    (tmp_path / "Wan2.1-T2V-1.3B-Diffusers").symlink_to(pipeline)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    convert(pipeline / "transformer", tmp_path / "run" / "weights", to="mm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands(home):
    (commands,) = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    small = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1"]
    for command in commands.splitlines():
        _, _, flags = command.partition("-m mm_infer ")
        main([*shlex.split(flags), *small])
    videos = {str(file.relative_to(home)) for file in home.glob("*/video_*.mp4")}
    pairs = {f"{folder}/video_{i}.mp4" for folder in ("out480", "out8") for i in (0, 1)}
    assert videos == {"out/video_0.mp4", "trained/video_0.mp4"} | pairs


def test_python(home):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code, count = re.subn("height=480, width=832, frames=81, steps=50", "height=32, width=48, frames=5, steps=1", code)
    assert count == 1
    exec(code, {})
    assert (home / "cat.mp4").exists()
