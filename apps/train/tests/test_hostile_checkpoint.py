"""A training checkpoint that was handed around: what is pickled in it is read, and never run."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from mm_convert import convert, inspect, open_dcp
from mm_train.export import export
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import config, rows, write_features


class Code:
    """Is run where it is unpickled."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "store")


@pytest.fixture
def run(features, tmp_path):
    train(config(features, tmp_path / "run", "--steps", "1"))
    return tmp_path / "run"


def poison(checkpoint: Path, name: str, value: object) -> None:
    """What was saved under a name becomes this, pickled."""
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    file = checkpoint / "__0_0.distcp"
    start = file.stat().st_size
    with file.open("ab") as end:
        torch.save(value, end)
    place = _StorageInfo(file.name, start, file.stat().st_size - start)
    index.storage_data[MetadataIndex(name)] = place
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def poison_index(checkpoint: Path, victim: Path) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    index.planner_data = Code(victim)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def test_code_in_the_index_is_run_by_nothing(run, features, tmp_path, capfd):
    checkpoint, victim = run / "checkpoints/step-00000001", tmp_path / "victim"
    poison_index(checkpoint, victim)
    for read in (
        lambda: train(config(features, run, "--steps", "2")),
        lambda: export(run, tmp_path / "exported"),
        lambda: inspect(checkpoint),
        lambda: convert(run, tmp_path / "converted"),
        lambda: open_dcp(checkpoint),
    ):
        with pytest.raises(ValueError, match=r"\.metadata names pathlib\.\w+.*nothing of it was run") as error:
            read()
        assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not victim.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())  # as torch's own reader does
    assert victim.exists()


def test_code_in_a_value_is_not_run_on_continuing(run, features, tmp_path):
    checkpoint, victim = run / "checkpoints/step-00000001", tmp_path / "victim"
    names = pickle.loads((checkpoint / ".metadata").read_bytes()).state_dict_metadata
    rate = next(name for name in names if name.endswith(".lr"))
    poison(checkpoint, rate, Code(victim))
    with pytest.raises(ValueError, match=r"cannot be read .*names pathlib\.\w+.*nothing of it was run") as error:
        train(config(features, run, "--steps", "2"))
    assert "\n" not in str(error.value)
    assert not victim.exists()


@pytest.mark.parametrize("value", [torch.ones(3), {"a": torch.float32}, (1, [torch.zeros(1)])])
def test_values_are_numbers_and_text(value, run, features):
    checkpoint = run / "checkpoints/step-00000001"
    names = pickle.loads((checkpoint / ".metadata").read_bytes()).state_dict_metadata
    rate = next(name for name in names if name.endswith(".lr"))
    poison(checkpoint, rate, value)
    with pytest.raises(ValueError, match=r"cannot be read .*where a training checkpoint has numbers and text"):
        train(config(features, run, "--steps", "2"))


def test_a_number_in_place_of_a_weight_is_refused(run, features):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    checkpoint = run / "checkpoints/step-00000001"
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    weight = next(name for name in index.state_dict_metadata if name.startswith("model."))
    index.state_dict_metadata[weight] = BytesStorageMetadata()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    poison(checkpoint, weight, 1.0)
    with pytest.raises(ValueError, match=r"cannot be read .*should be a tensor, but there lies float"):
        train(config(features, run, "--steps", "2"))


@pytest.mark.parametrize(
    "said",
    [
        {"step": "x"},
        {"step": None},
        {"step": 1.5},
        {"step": -5},
        {"cursor": "x"},
        {"cursor": -3},
        {"dataset": [1]},
        {"contents": [1]},
        {"contents": {"weights": 3}},
        {"contents": {"data.features": {"a": 1}}},
        {"more": 1},
    ],
)
def test_a_progress_that_no_run_has_written_is_one_clear_line(said, run, features):
    path = run / "checkpoints/step-00000001/progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(ValueError, match=rf"progress\.json says {next(iter(said))} .*: it is not that of a run"):
        train(config(features, run, "--steps", "2"))
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"progress\.json does not say step, cursor, dataset"):
        train(config(features, run, "--steps", "2"))


@pytest.mark.parametrize("name", ["../../other/checkpoints/step-00000001", "", "..", "/tmp", "a\0/b"])
def test_the_newest_checkpoint_lies_beside_its_name(name, run, features):
    (run / "checkpoints/latest").write_text(name)
    with pytest.raises(ValueError, match="which is no checkpoint beside it: write step-… into it"):
        train(config(features, run, "--steps", "2"))


def test_lines_of_metrics_that_no_run_has_written_are_dropped(run, features):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[]\n3\n{}\n{"step": "x"}\n' + "[" * 100_000 + "\n")
    train(config(features, run, "--steps", "2"))
    assert [row["step"] for row in rows(run)] == [1, 2]
