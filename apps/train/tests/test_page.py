"""What the page of runs reads: numbers as they grow, and nothing outside the folders that were named."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest

from mm_data import write_video
from mm_train.page import __main__ as program
from mm_train.page.curves import Curves
from mm_train.page.runs import Runs, differences


def add(file: Path, *rows: dict) -> None:
    with open(file, "a", encoding="utf-8") as opened:
        opened.writelines(json.dumps(row) + "\n" for row in rows)


def test_curves_grow_with_the_file(tmp_path):
    file = tmp_path / "metrics.jsonl"
    curves = Curves(file)
    curves.read()
    assert (curves.lines, curves.share, curves.curve("loss", 10)) == (0, 1.0, ([], [], []))
    add(file, {"step": 1, "loss": 2.0, "note": "x"}, {"step": 2, "loss": None})
    with open(file, "a", encoding="utf-8") as opened:
        opened.write('{"step": 3, "lo')  # a line that is being written
    curves.read()
    assert curves.curve("loss", 10) == ([1, 2], [2.0, None], [])
    assert list(curves.metrics) == ["loss"]
    with open(file, "a", encoding="utf-8") as opened:
        opened.write('ss": 1.0}\nrubbish\n{"step": "4"}\n')
    curves.read()
    assert curves.curve("loss", 10, first=2, last=3) == ([2, 3], [None, 1.0], [])
    assert (curves.lines, curves.unread, curves.last) == (5, 2, 3)
    assert curves.broken.startswith("line 4: JSONDecodeError")


def test_a_run_that_goes_on_writes_its_file_anew(tmp_path):
    """As `mm_train.metrics` does: without the steps that are repeated."""
    file = tmp_path / "metrics.jsonl"
    add(file, *({"step": step, "loss": 1.0} for step in range(1, 6)))
    curves = Curves(file)
    curves.read()
    add(tmp_path / "new", *({"step": step, "loss": 1.0} for step in range(1, 4)))
    add(tmp_path / "new", *({"step": step, "loss": 3.0} for step in range(4, 9)))
    os.replace(tmp_path / "new", file)
    curves.read()
    assert curves.curve("loss", 100).values == [1.0] * 3 + [3.0] * 5


def test_of_many_steps_no_peak_is_lost_and_the_mean_is_that_of_all(tmp_path):
    file = tmp_path / "metrics.jsonl"
    losses = [math.sin(step / 50) for step in range(5000)]
    losses[1234], losses[2345], losses[77] = 50.0, -50.0, None
    add(file, *({"step": step, "loss": loss} for step, loss in enumerate(losses)))
    curves = Curves(file)
    curves.read(until=time.monotonic() - 1)  # a block, and no more
    assert 0 < curves.share <= 1
    curves.read()
    found = curves.curve("loss", 100, 0.9)
    assert len(found.steps) <= 100
    assert found.steps == sorted(set(found.steps))
    assert {50.0, -50.0} <= set(found.values)
    mean = weight = 0.0
    for step, loss in enumerate(losses[: found.steps[30] + 1]):
        if loss is not None:
            mean, weight = 0.9 * mean + 0.1 * loss, 1 - 0.9 ** (step + 1 - (step > 77))
    assert found.smooth[30] == pytest.approx(mean / weight)


def test_runs_are_found_in_folders_of_folders_and_links_are_not_followed(tmp_path):
    for name in ("a", "deep/high", "deep/low"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        add(tmp_path / "runs" / name / "metrics.jsonl", {"step": 1, "loss": 1.0})
    (tmp_path / "secret/samples/step-00000001").mkdir(parents=True)
    write = tmp_path / "secret/samples/step-00000001/000.mp4"
    write.write_bytes(b"secret")
    (tmp_path / "runs/link").symlink_to(tmp_path / "secret")
    (tmp_path / "runs/a/samples").symlink_to(tmp_path / "secret/samples")
    runs = Runs([tmp_path / "runs"])
    assert [run.name for run in runs.look()] == ["a", "deep/high", "deep/low"]
    first = runs.by_name["a"]
    assert first.sample_steps() == []
    assert first.video(1, "000.mp4") is None
    assert first.samples(1) == {"videos": [], "answers": []}
    first.describe(math.inf)
    (tmp_path / "runs/b/checkpoints").mkdir(parents=True)
    assert [run.name for run in runs.look()] == ["a", "b", "deep/high", "deep/low"]
    assert runs.by_name["a"] is first  # and nothing is read twice
    assert runs.by_name["b"].describe(math.inf)["problems"] == ["no step yet: metrics.jsonl is empty, or not there"]
    assert "first checkpoint" in runs.by_name["b"].config()[1]
    [nothing] = Runs([tmp_path / "secret/samples/step-00000001"]).look()
    assert "no run lies here" in nothing.describe(math.inf)["problems"][0]


def test_samples_are_named_by_their_prompts(tmp_path):
    import numpy as np

    folder = tmp_path / "samples/step-00000005"
    folder.mkdir(parents=True)
    write_video(folder / "000.mp4", np.zeros((1, 32, 32, 3), np.uint8), 8, {"prompt": "a cat"})
    (folder / "001.mp4").write_bytes(b"broken")
    (folder / "notes.txt").write_text("x", encoding="utf-8")
    add(folder / "answers.jsonl", {"question": "what?", "answer": "a", "reference": "a", "exact": True})
    [run] = Runs([tmp_path]).look()
    found = run.samples(5)
    assert [video["file"] for video in found["videos"]] == ["000.mp4", "001.mp4"]
    assert found["videos"][0]["prompt"] == "a cat"
    assert found["videos"][1]["prompt"].startswith("001.mp4: ")
    assert found["answers"][0]["question"] == "what?"
    assert run.samples(6) == {"videos": [], "answers": []}


def test_differences_pass_over_runs_without_a_configuration():
    rows = differences([{"lr": 1, "model": "m"}, {}, {"lr": 2, "model": "m", "new": 1}])
    assert rows == [("lr", [1, None, 2], True), ("model", ["m", None, "m"], False), ("new", [None, None, 1], True)]


def test_a_folder_that_is_not_there(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit) as ended:
        program.main([str(tmp_path / "run"), "--port", "0"])
    assert ended.value.code == 2
    assert f"did you mean {tmp_path / 'runs'}?" in capsys.readouterr().err
