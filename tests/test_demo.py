"""`hatch run demo`, with few clips and few steps: every command of it, up to the report."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
