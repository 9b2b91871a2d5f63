"""Names that would command a terminal, folders of encoders that ask for more, and terminals that go away."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mm_data import FeatureDataset, write_video
from mm_models.wan.testing import write_encoders
from mm_train import export, extract
from mm_train.__main__ import main

sys.path.insert(0, str(Path(__file__).parent))
from runs import arguments, rows, write_features

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
NAMES = ["\x1b]0;x\x07\x9b2J", "a\rb\nc", "\u202exfdp\u2066"]
BYTES = os.fsdecode(b"a\xff\x9b2J")


def run(program, argv: list[object], capfd) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    code = 0
    try:
        program([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    shown = "".join(capfd.readouterr())
    assert not CONTROLS.search(shown), shown
    assert "Traceback" not in shown
    return code, shown


@pytest.fixture
def encoders(tmp_path):
    return write_encoders(tmp_path / "encoders", text_dim=64, image_dim=32)


def extracting(encoders: Path, manifest: Path, output: Path) -> list[object]:
    size = ["--geometry.num_frames", 5, "--geometry.max_height", 16, "--geometry.max_width", 16, "--data.workers", 0]
    given = ["--model", "wan-tiny", "--encoders", encoders, "--data.manifest", manifest, "--output", output]
    return [*given, *size]


def test_extraction_shows_names_and_captions(encoders, tmp_path, capfd):
    entries = []
    for i, name in enumerate([*NAMES, BYTES]):
        grey = np.full((5, 16, 16, 3), 40 * i, np.uint8)
        write_video(tmp_path / "clip.mp4", grey, fps=8)
        (tmp_path / "clip.mp4").rename(tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}-broken.mp4").write_bytes(b"no video")
        both = [{"path": f"{name}{end}.mp4", "cap": name} for end in ("", "-broken", "-missing")]
        entries += [one | {"cap": " ".join(["long"] * 600) + name} if not i else one for one in both]
    manifest = tmp_path / f"{NAMES[0]}.json"
    manifest.write_text(json.dumps(entries))
    (tmp_path / "data.txt").write_text(f"{tmp_path},{manifest}\n")
    output = tmp_path / f"out{NAMES[1]}"
    with pytest.warns(UserWarning, match="tokens was cut"):
        code, shown = run(extract.main, extracting(encoders, tmp_path / "data.txt", output), capfd)
    assert code == 0, shown
    assert len(FeatureDataset(output).ids) >= 3
    skipped = [line for line in shown.splitlines() if "-broken.mp4" in line]
    assert any(line.startswith("skipped ") for line in skipped)
    failures = (output / "failures.jsonl").read_text()
    assert not CONTROLS.search(failures)
    for name in (*NAMES, BYTES):
        gone = tmp_path / f"{name}-gone"
        assert run(extract.main, extracting(gone, tmp_path / "data.txt", output), capfd)[0] == 2
        assert run(extract.main, extracting(encoders, gone, output), capfd)[0] == 2


@pytest.mark.parametrize("name", NAMES)
def test_training_and_export_show_names(name, tmp_path, capfd):
    features, output = write_features(tmp_path / f"f{name}"), tmp_path / f"run{name}"
    asked = [*arguments(features, output), "--steps", 1]
    code, shown = run(main, asked, capfd)
    assert code == 0, shown
    assert shown.count("\ndone: ") == 1
    for more in (
        ["--weights", tmp_path / name],
        ["--data.features", tmp_path / name],
        [f"--{name}", 1],
        ["--dtype", name],
    ):
        assert run(main, [*asked, *more], capfd)[0] == 2
    (tmp_path / name).write_text(f"[{name}\n")
    assert run(main, [*asked, "--config", tmp_path / name], capfd)[0] == 2
    code, shown = run(export.main, [output, "--output", tmp_path / f"weights{name}"], capfd)
    assert (code, shown.count("\n")) == (0, 1)
    assert (tmp_path / f"weights{name}" / "config.json").exists()
    code, shown = run(export.main, [output / name, "--output", tmp_path / "x"], capfd)
    assert (code, shown.count("\n")) == (2, 1)


def test_names_in_another_encoding_are_refused(tmp_path, capfd):
    features = write_features(tmp_path / "f")
    code, shown = run(main, arguments(features, tmp_path / BYTES), capfd)
    assert code == 2
    assert "is not UTF-8 text" in shown


def test_names_that_are_too_long_are_refused(encoders, tmp_path, capfd):
    long = tmp_path / ("a" * 300)
    for command, argv in (
        (main, arguments(long, tmp_path / "r")),
        (main, arguments(tmp_path, long)),
        (extract.main, extracting(encoders, long, tmp_path / "f")),
        (extract.main, extracting(long, tmp_path / "data.json", tmp_path / "f")),
        (extract.main, extracting(encoders, tmp_path / "data.json", long)),
    ):
        code, shown = run(command, argv, capfd)
        assert (code, shown.count("\n")) == (2, 1)


def own_code(folder: Path) -> None:
    (folder / "tokenizer" / "own.py").write_text("import os\nos.mkdir('code_was_run')\n")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["own.A", "own.A"]}}))


def pipe(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    os.mkfifo(folder / "vae" / "config.json")


def pickled(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")


@pytest.mark.parametrize("change", [own_code, pipe, pickled])
def test_folders_are_refused_in_one_line(change, encoders, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change(encoders)
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "data.txt").write_text(f"{tmp_path},{tmp_path}/data.json\n")
    online = [*arguments(tmp_path, tmp_path / "out"), "--data.features", "null", "--data.manifest", "data.txt"]
    for program, argv in (
        (extract.main, extracting(encoders, tmp_path / "data.txt", tmp_path / "out")),
        (main, [*online, "--data.encoders", encoders]),
    ):
        code, shown = run(program, argv, capfd)
        assert (code, shown.count("\n")) == (2, 1), shown
        assert str(encoders) in shown
    assert not (tmp_path / "code_was_run").exists()


def start(features: Path, output: Path, *more: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "mm_train", *arguments(features, output), *more]
    return subprocess.Popen(command, text=True, **options)


def test_a_run_outlives_its_terminal(tmp_path):
    """Nobody reads (`| head`), and what starts it ignores that the terminal is closed (nohup)."""
    ends, begins = os.pipe()
    os.close(ends)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(write_features(tmp_path / "f"), tmp_path / "run", stdout=begins, stderr=begins)
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(begins)
    wait_for_steps(tmp_path / "run", 2)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0
    assert len(rows(tmp_path / "run")) == 4
    assert (tmp_path / "run" / "weights" / "config.json").exists()


def test_a_closed_terminal_loses_no_step(tmp_path):
    """Its SIGHUP ends a run after the step, as SIGTERM does."""
    features = write_features(tmp_path / "f")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    try:
        process = start(features, tmp_path / "run", "--steps", "100000", stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_steps(tmp_path / "run", 2)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    last = rows(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "progress.json").exists()


def wait_for_steps(output: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len(rows(output)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
