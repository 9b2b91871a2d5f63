"""Weights & Biases: written without network, gone on with, and never a reason to end."""

import json
import struct
import sys
from pathlib import Path

import pytest

from mm_models.wan.testing import write_encoders
from mm_train import tracker
from mm_train.checks import check
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import config, rows, write_features


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "store")


def records(folder: Path) -> list:
    """What lies in the files of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, begun = [], b""
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at = file.read_bytes(), 7  # LevelDB's log: blocks of 32 KiB, parts of records with a header of 7 bytes
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            size, kind = struct.unpack_from("<HB", data, at + 4)
            begun = (b"" if kind in (1, 2) else begun) + data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                found.append(Record.FromString(begun))
    return found


def test_an_offline_run_holds_numbers_configuration_and_samples_and_goes_on(features, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    encoders = write_encoders(tmp_path / "encoders", text_dim=8)
    sampled = ("--sample.prompts", '["a cat"]', "--sample.encoders", str(encoders), "--sample.every", "2")
    sampled += ("--sample.frames", "5", "--sample.height", "32", "--sample.width", "32", "--sample.steps", "1")
    flags = ("--log.wandb", "toys", *sampled)
    train(config(features, tmp_path / "run", *flags, "--steps", "1"))
    train(config(features, tmp_path / "run", *flags, "--steps", "2"))
    said = capfd.readouterr().err
    assert said.count("wandb      ") == 2
    assert "offline: `wandb sync` sends it" in said
    found = records(tmp_path / "run")
    runs = [record.run for record in found if record.HasField("run")]
    assert {run.run_id for run in runs} == {json.loads((tmp_path / "run/wandb.json").read_text())["id"]}
    assert {run.project for run in runs} == {"toys"}
    settings = {item.key: item.value_json for run in runs for item in run.config.update}
    assert json.loads(settings["optim"])["lr"] == 1e-2
    history = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    kept = {row["step"]: row["loss"] for row in rows(tmp_path / "run") if "loss" in row}
    assert {row["step"]: row["loss"] for row in history if "loss" in row} == pytest.approx(kept)
    assert any("samples/000" in key for row in history for key in row)


def test_what_fails_there_is_said_once_and_the_run_goes_on(features, tmp_path, monkeypatch, capfd):
    import wandb

    def broken(**_):
        raise OSError("no route to host")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    train(config(features, tmp_path / "keyless", "--log.wandb", "toys", "--steps", "1"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", broken)
    train(config(features, tmp_path / "broken", "--log.wandb", "toys", "--steps", "2"))
    said = capfd.readouterr().err
    assert said.count("wandb      ") == 2
    assert "there is no key: `wandb login`, or WANDB_MODE=offline; the run goes on without it" in said
    assert "no route to host; the run goes on without it" in said
    assert len(rows(tmp_path / "broken")) == 2


def test_one_that_never_answers_is_left_alone(monkeypatch):
    import threading

    monkeypatch.setattr(tracker, "PATIENCE", 0.05)
    with pytest.raises(TimeoutError, match="no answer in"):
        tracker._within(threading.Event().wait)


def test_a_name_without_a_project_and_a_missing_package_are_refused(features, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--log.wandb_name mine: give --log.wandb"):
        check(config(features, tmp_path / "run", "--log.wandb_name", "mine"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--log\.wandb toys needs the package wandb: pip install wandb"):
        check(config(features, tmp_path / "run", "--log.wandb", "toys"))
