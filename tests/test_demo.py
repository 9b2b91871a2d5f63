"""`hatch run demo`, with few clips and few steps: every command of it, up to the report."""

import importlib
import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "docs/demo"
sys.path.insert(0, str(DEMO))

import run as demo_run  # noqa: E402
import tasks  # noqa: E402

SHORTER = {  # than the flags of the demo, which the commands have as well
    "mm_train.extract": "--data.workers 0",
    "mm_train": "--data.workers 0 --data.global_batch 2 --data.micro_batch 1 --steps 2 --optim.warmup 0 "
    "--sample.steps 2 --validation.timesteps [500]",
    "mm_infer": "--steps 2",
}


@pytest.mark.long
def test_the_demo_runs_to_its_report(tmp_path):
    command = [sys.executable, "docs/demo/run.py", "--steps", "4", "--repeats", "1", "--output", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Done in" in done.stdout

    out = tmp_path / "demo"
    prompts = (out / "clips/held_out.txt").read_text().splitlines()
    scores = json.loads((out / "scores.json").read_text())
    assert [clip["prompt"] for clip in scores["clips"]] == prompts
    steps = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3, 4]
    report = (out / "report.html").read_text()
    assert report.count("data:video/mp4;base64,") == len(prompts) + 2  # and the samples of steps 0 and 4
    assert all(prompt in report for prompt in prompts)
    assert "mm_train.extract --model wan-tiny" in report

    again = subprocess.run([*command[:2], "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1  # the folder above is not a demo's, and is left alone
    assert "not replaced" in again.stderr
    assert out.is_dir()


@pytest.mark.parametrize(
    ("task", "heads", "videos", "images"),
    [
        ("i2v", "<th>image</th><th>result</th>", 2 + 2, 2),  # two results, samples of steps 0 and 2; two first frames
        ("ti2v", "<th>image</th><th>result</th>", 2 + 2, 2),
        ("vace", "<th>source</th><th>mask</th><th>reference</th><th>result</th>", 2 * 2 * 3 + 2, 2),
        ("experts", "", 2, 0),
        ("opensoraplan", "", 2 + 2, 0),
    ],
    ids=["i2v", "ti2v", "vace", "experts", "opensoraplan"],
)
def test_the_commands_of_a_task(task, heads, videos, images, tmp_path, monkeypatch):
    demo, stages = tasks.DEMOS[task], []
    for name, command in demo.commands.items():
        stages.append((name, 0.0, command.format(here=DEMO, out=tmp_path, repeats=1)))
        _run(stages[-1][2], monkeypatch)
        if len(stages) == 1:
            _keep_two(tmp_path / "clips")
    demo_run.show(tmp_path, demo, stages)
    report = (tmp_path / "report.html").read_text()
    assert heads in report
    assert "python -m mm_infer.page --weights" in report
    assert report.count("data:video/mp4;base64,") == videos
    assert report.count("data:image/png;base64,") == images
    for name in demo.scores:
        clips = json.loads((tmp_path / f"{name}.json").read_text())["clips"]
        assert len(clips) == 2
        assert all(f">{clip['prompt']}<" in report for clip in clips)
        assert all(bool(clip["given"]) == (clip["kept"] is not None) == ("<th>" in heads) for clip in clips)


def test_the_commands_of_questions(tmp_path, monkeypatch):
    """One question of each kind; then the same report as a model that knows everything would get."""
    monkeypatch.setitem(
        SHORTER,
        "mm_train",
        "--data.workers 0 --data.global_batch 7 --steps 2 --optim.warmup 0 "
        "--validation.max_samples 7 --validation.answers 7 --sample.max_new_tokens 4",
    )
    monkeypatch.setitem(SHORTER, "mm_infer.chat", "--max_new_tokens 4")
    demo, stages = tasks.DEMOS["qwen"], []
    for name, command in demo.commands.items():
        stages.append((name, 0.0, command.format(here=DEMO, out=tmp_path, repeats=1)))
        _run(stages[-1][2], monkeypatch)
        if len(stages) == 2:  # the tokenizer has learned from all of them
            _keep_one_of_each_kind(tmp_path / "questions")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert 0 <= rows[-1]["validation_exact"] <= 1
    scores = json.loads((tmp_path / "scores.json").read_text())
    kinds = [row["kind"] for row in scores["answers"]]
    assert len(kinds) == len(set(kinds)) == 7
    assert list(scores["totals"]) == [*kinds, "all"]
    demo_run.show(tmp_path, demo, stages)
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 6  # two of them in one question
    assert report.count("data:video/mp4;base64,") == 1
    assert report.count('<rect class="given"') == 1
    assert "mm-convert Qwen2_5_VLConverter mm_to_hf" in report
    assert "python -m mm_infer.page --weights" in report

    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    known = "".join(json.dumps(one | {"answer": one["reference"]}) + "\n" for one in answers)
    (tmp_path / "answers.jsonl").write_text(known)
    _run(stages[-1][2], monkeypatch)
    assert set(json.loads((tmp_path / "scores.json").read_text())["totals"].values()) == {1.0}
    demo_run.show(tmp_path, demo, stages)
    assert (tmp_path / "report.html").read_text().count('<rect class="answered"') == 1


def _keep_one_of_each_kind(folder: Path) -> None:
    for file in folder.glob("*.json"):
        entries = {entry["kind"]: entry for entry in json.loads(file.read_text())}
        file.write_text(json.dumps(list(entries.values())))


def _run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has torch loaded already; with less work."""
    program, *words = shlex.split(command)
    if program == "mm-convert":
        importlib.import_module("mm_convert.cli").main(words)
    elif words[0] == "-m":
        name = words[1]
        module = importlib.import_module(name if "." in name else f"{name}.__main__")
        module.main([*words[2:], *shlex.split(SHORTER[name])])
    else:
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")


def _keep_two(clips: Path) -> None:
    """The first two entries of every list."""
    for file in clips.glob("*.json"):
        file.write_text(json.dumps(json.loads(file.read_text())[:2]))
    for file in clips.glob("*.txt"):
        file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:2]))
