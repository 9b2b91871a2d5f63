"""Names that would command a terminal, and folders of encoders that are broken or ask for more, through the command."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from mm_infer.__main__ import main

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SMALL = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1"]
NAMES = ["\x1b]0;x\x07\x9b2J", "a\rb\nc", "\u202exfdp\u2066", os.fsdecode(b"a\xff\x9b2J")]


def run(argv: list[str], capfd) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    code = 0
    try:
        main(argv)
    except SystemExit as stop:
        code = stop.code
    shown = "".join(capfd.readouterr())
    assert not CONTROLS.search(shown), shown
    assert "Traceback" not in shown
    return code, shown


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_and_not_obeyed(name, pipeline, tmp_path, capfd):
    weights = Path(shutil.copytree(pipeline, tmp_path / f"w{name}"))
    asked = ["--weights", str(weights), *SMALL, "--prompt"]
    written = "\udcff" not in name
    code, shown = run([*asked, f"a cat {name}", "--output", str(tmp_path / f"out{name}")], capfd)
    assert code == (0 if written else 2)
    if written:
        assert (tmp_path / f"out{name}" / "video_0.mp4").exists()
        kept = next(line for line in shown.splitlines() if "/video_0.mp4: " in line)
        assert str(tmp_path) in kept, "a name takes one line"
    wrong = {
        "lora": ["--lora", str(tmp_path / name)],
        "image": ["--image", str(tmp_path / name)],
        "prompt_file": ["--prompt_file", str(tmp_path / name)],
        "output": ["--output", str(weights / "model_index.json" / name)],
        "option": [f"--{name}", "1"],
        "value": ["--steps", name],
        "weights": ["--weights", str(tmp_path / f"{name}-missing")],
    }
    for flags in wrong.values():
        assert run([*asked, "a cat", "--output", str(tmp_path / "out"), *flags], capfd)[0] == 2


def own_code(folder: Path) -> None:
    (folder / "tokenizer" / "own.py").write_text("import os\nos.mkdir('code_was_run')\n")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["own.A", "own.A"]}}))


def pipe(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    os.mkfifo(folder / "vae" / "config.json")


def pipe_as_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    os.mkfifo(folder / "model_index.json")


def pickled(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")


def deep(folder: Path) -> None:
    (folder / "text_encoder" / "config.json").write_text('{"a":' * 1000 + "1" + "}" * 1000)


def flat(folder: Path) -> None:
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latents_std": [0.0] * 16}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (own_code, "names code of its own (auto_map), which is never run"),
        (pipe, "vae/config.json is no regular file"),
        (pipe_as_index, "model_index.json is not a JSON object: it is no regular file"),
        (pickled, "holds pickled weights (pytorch_model.bin)"),
        (deep, "is nested more than 32 deep"),
        (flat, "latents_mean and latents_std must be finite"),  # found when it is loaded
    ],
)
def test_folders_are_refused_in_one_line(change, reason, pipeline, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change(Path(shutil.copytree(pipeline, tmp_path / "w")))
    code, shown = run(["--weights", "w", *SMALL, "--prompt", "a cat", "--output", "out"], capfd)
    assert code == 2
    *before, error = shown.splitlines()
    kernel = ["attention: cpu"]
    assert before in ([], kernel, [*kernel, "text: encoding 1 prompt(s)"], [*kernel, "text: encoding 2 prompt(s)"])
    assert error.startswith("mm_infer: error: ")
    assert reason in error
    assert not (tmp_path / "code_was_run").exists()
