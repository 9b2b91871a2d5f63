"""What the page does without a browser: flags, commands, and what is missing. tests/test_pages.py opens it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from mm_infer.page import __main__ as program
from mm_infer.page.studio import command, difference

RECORD = {"prompt": "a cat", "weights": "W", "mm_infer": "0", "torch": "0", "contents": {}, "steps": 4}


def test_a_command_says_all_that_is_not_usual():
    record = RECORD | {
        "prompt": "--a 'cat'\n",
        "image": {"path": "my cat.png", "sha256": "x"},
        "references": [{"path": "a.png"}, {"path": "b.png"}],
        "lora": ["a", "b"],
        "guidance": [4.0, 3.0],
        "clip_crop": True,
        "other_frames": False,
        "strength": None,
        "vae_tiling": "none",
    }
    words = shlex.split(command(record, Path("new out")).replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "mm_infer"]
    assert words[3] == "--prompt=--a 'cat'\n"
    pairs = dict(zip(words[4::2], words[5::2], strict=True))
    assert pairs == {
        "--weights": "W",
        "--steps": "4",
        "--image": "my cat.png",
        "--references": '["a.png", "b.png"]',
        "--lora": '["a", "b"]',
        "--guidance": "[4.0, 3.0]",
        "--clip_crop": "true",
        "--vae_tiling": "false",
        "--output": "new out",
    }


def test_what_no_command_makes_says_why():
    with pytest.raises(ValueError, match="mm_infer has not made"):
        command({"prompt": "a cat", "step": 3}, Path("out"))
    with pytest.raises(ValueError, match="in no file"):
        command(RECORD | {"video": {"sha256": "x"}}, Path("out"))


def test_settings_that_differ():
    assert difference({"a": 1, "b": 2}, {"a": 1, "c": 3}) == [("b", 2, None), ("c", None, 3)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weights", "missing"], "missing does not exist"),
        (["--processor", "hub"], "and --processor is of others"),
        (["--prompt_file", "a.txt"], "unknown option --prompt_file"),
        (["--port", "99999"], "port is 99999"),
        (["--height", "half"], "--height is half"),
    ],
)
def test_commands_that_cannot_work(flags, said, pipeline, tmp_path, capsys):
    base = ["--weights", str(pipeline), "--output", str(tmp_path / "out"), "--port", "0"]
    with pytest.raises(SystemExit) as ended:
        program.main([*base, *flags])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_without_gradio(pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as ended:
        program.main(["--weights", str(pipeline), "--output", str(tmp_path / "out"), "--port", "0"])
    assert ended.value.code == 2
    assert "pip install 'mm-infer[page]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
