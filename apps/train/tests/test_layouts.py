"""One run that is stopped and continued in one layout after another: the losses of one device."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mm_parallel.testing import spawn
from mm_train.recipe import load_config
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import SMALL, arguments, as_torchrun, config, losses, rows, state, write_features

FOUR = {**SMALL, "num_heads": 4, "num_layers": 4}
LAYOUTS = [  # ranks, flags
    (2, ["--parallel.dp_replicate", "2"]),
    (2, ["--parallel.cp", "2", "--memory.recompute", "but_attention", "--memory.offload", "attention"]),
    (2, ["--parallel.ring", "2", "--memory.recompute", "full", "--memory.offload", "inputs"]),
    (2, ["--parallel.tp", "2"]),
    (2, ["--parallel.pp_layers", "[1,3]"]),
    (2, ["--parallel.pp_layers", "[[1,1],[1,1]]", "--memory.recompute", "but_attention"]),
    (4, ["--parallel.ulysses", "2", "--parallel.ring", "2", "--memory.recompute", "1"]),
    (4, ["--parallel.tp", "2", "--parallel.pp_layers", "[3,1]"]),
]  # FSDP alone: where a step is skipped, below
STEPS = 2  # in each


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "store")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Few, as each run looks at them once more at its end, and an odd number, so that ranks have unequal shares."""
    return write_features(tmp_path_factory.mktemp("features") / "held_out", count=5)


def command(features: Path, output: Path, steps: int, *flags: str) -> list[str]:
    shared = ["--architecture", json.dumps(FOUR), "--data.global_batch", "4", "--optim.lr", "1e-3"]
    shared += ["--optim.ema", "0.9", "--data.text_dropout", "0.2", "--checkpoint.every", "1000"]
    shared += ["--data.micro_batch", "1"]
    return arguments(features, output, *shared, "--steps", str(steps), *flags)


@pytest.mark.long
def test_a_run_goes_through_every_layout_with_the_losses_of_one_device(features, held_out, tmp_path):
    """The start by torchrun is that of tests/test_chain_guide.py."""
    total = STEPS * len(LAYOUTS)
    validated = ["--validation.features", str(held_out), "--validation.every", "4"]
    validated += ["--validation.timesteps", "[300,700]"]
    train(config(features, tmp_path / "one", *command(features, tmp_path / "one", total, *validated)[8:]))
    for turn, (ranks, flags) in enumerate(LAYOUTS, 1):
        argv = command(features, tmp_path / "many", turn * STEPS, *validated, *flags)
        spawn(ranks, ranks_train, [argv] * ranks, timeout=120)
    one, many = rows(tmp_path / "one"), rows(tmp_path / "many")
    for name in ("loss", "grad_norm", "validation_loss", "samples"):
        expected = {row["step"]: row[name] for row in one if name in row}
        seen = {row["step"]: row[name] for row in many if name in row}
        seen = {step: seen[step] for step in expected}  # every run validates at its end as well
        assert seen == pytest.approx(expected, rel=1e-4), name
    assert len(losses(tmp_path / "many")) == total


def ranks_train(rank: int, world: int, flags: list[list[str]]) -> None:
    as_torchrun(rank, world)
    train(load_config(flags[rank]))


def test_a_step_that_is_not_finite_is_skipped_on_every_rank(tmp_path):
    features = write_features(tmp_path / "features", count=6, poison="clip2.mp4")
    flags = ["--data.global_batch", "2", "--steps", "4", "--on_nonfinite", "skip", "--checkpoint.every", "1"]
    train(config(features, tmp_path / "one", *command(features, tmp_path / "one", 4, *flags)[8:]))
    spawn(2, ranks_train, [command(features, tmp_path / "two", 4, *flags)] * 2)  # one of them has the sample
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["samples"] for row in one] == [row["samples"] for row in two]
    assert one[-1]["samples"] > 4 * 2
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4), name


def test_ranks_with_different_configurations_are_refused(features, tmp_path):
    argv = command(features, tmp_path / "run", 2)
    other = [*argv, "--optim.lr", "2e-3"]
    with pytest.raises(
        RuntimeError, match=r"the configuration differs between ranks: --optim.lr is 0.001 on rank 0, 0.002 on rank 1: "
    ):
        spawn(2, ranks_train, [argv, other])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel.tp", "3"], r"2 ranks cannot be laid out as tp=3"),
        (["--parallel.pp_layers", "[2,1]"], r"pp_layers.* 3 .*4"),
        (["--parallel.pp_layers", "[2,2]", "--parallel.schedule", "zero_bubble", "--memory.recompute", "full"], "zero"),
        (["--memory.recompute", "5"], r"recompute=5 .*the model has 4"),
        (["--memory.offload", "attention"], r"offload=.attention. moves what"),
    ],
)
def test_impossible_layouts_are_refused_before_anything_is_read(features, tmp_path, flags, message):
    argv = command(features, tmp_path / "run", 2, *flags)
    with pytest.raises(RuntimeError, match=message):
        spawn(2, ranks_train, [argv, argv])


def test_exact_runs_have_the_same_bits(features, tmp_path):
    kept = []
    for ranks in (1, 4):
        flags = ["--parallel.exact", "true", "--parallel.cp", str(ranks)]
        argv = command(features, tmp_path / str(ranks), 3, *flags)
        spawn(ranks, ranks_train, [argv] * ranks, timeout=120)
        kept.append((losses(tmp_path / str(ranks)), state(tmp_path / str(ranks) / "checkpoints/step-00000003")))
    for more_losses, more_state in kept[1:]:
        assert more_losses == kept[0][0]
        assert more_state.keys() == kept[0][1].keys()
        assert all(torch.equal(more_state[name], tensor) for name, tensor in kept[0][1].items())
