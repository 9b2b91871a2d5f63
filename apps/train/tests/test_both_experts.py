"""Two experts in one run: whose turn it is, and that each trains as it would alone."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm_convert import open_checkpoint, open_experts
from mm_data.random import uniform
from mm_models.wan.testing import write_encoders
from mm_parallel.testing import spawn
from mm_train import run as running
from mm_train.checks import check
from mm_train.run import Run
from mm_train.train import train
from mm_train.turns import draw_high

sys.path.insert(0, str(Path(__file__).parent))
from runs import arguments, as_torchrun, config, losses, rows, state, write_features

A14B = ("--model", "wan-tiny-a14b", "--expert_steps", "2", "--steps", "6", "--seed", "11", "--optim.ema", "0.5")
BOTH = (*A14B, "--expert", "both")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "store")


@pytest.fixture(scope="module")
def done(features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("both") / "run"
    train(config(features, folder, *BOTH))
    return folder


def whose(folder: Path) -> list[str]:
    return [row["expert"] for row in rows(folder / "both") if "expert" in row]


def test_turns_come_as_often_as_their_part_is_drawn():
    turns = [draw_high(7, turn, 0.417) for turn in range(4000)]
    assert sum(turns) / len(turns) == pytest.approx(0.417, abs=0.025)
    assert turns[5] == (uniform(7, 5, "", "expert") < 0.417)


def test_each_expert_trains_as_it_would_alone_on_the_same_steps(features, done, tmp_path, monkeypatch):
    """Bit for bit: weights, moments, average and losses."""
    turns = whose(done)
    assert turns[::2] == turns[1::2]
    assert {*turns} == {"high", "low"}
    seen = losses(done / "both")
    both = state(done / "both/checkpoints/step-00000006")
    for expert in ("high", "low"):
        mine = [number for number, name in enumerate(turns) if name == expert]

        class Some(Run):
            """A run of one expert that is given those steps of the data alone."""

            def batches(self, mine=mine):
                steps = self.data.steps
                some = lambda cursor: (step for step in steps(cursor) if step.index in mine)  # noqa: E731
                self.data = replace(self.data, steps=some)
                yield from super().batches()

            def outcome(self, batch, losses, updated):
                found = super().outcome(batch, losses, updated)
                return running.Outcome(batch.step.index, *list(vars(found).values())[1:])

        monkeypatch.setattr(running, "Run", Some)
        one = ("--steps", str(len(mine)), "--expert", expert)
        train(config(features, tmp_path / "alone", *A14B[:2], *A14B[6:], *one))
        assert losses(tmp_path / "alone" / expert) == [seen[number] for number in mine]
        alone = state(tmp_path / f"alone/{expert}/checkpoints/step-{len(mine):08d}")
        for key, value in alone.items():
            part, _, name = key.partition(".")
            kind, _, name = name.partition(".") if part == "optimizer" else ("", "", name)
            key = f"{part}.{kind}.{expert}.{name}" if kind else f"{part}.{expert}.{name}"
            assert torch.equal(both[key], value), key
    assert len(both) == 2 * len(alone)
    pair, other = (open_experts(folder / "weights") for folder in (done, tmp_path / "alone"))
    for expert in ("high", "low"):
        ours, theirs = open_checkpoint(getattr(pair, expert)), open_checkpoint(getattr(other, expert))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_goes_on_to_the_bit_also_within_a_turn_and_looks_at_both(features, done, tmp_path):
    encoders = write_encoders(tmp_path / "encoders", text_dim=8)
    looks = ("--validation.features", str(features), "--validation.max_samples", "2", "--validation.every", "3")
    looks += ("--sample.prompts", '["a cat"]', "--sample.encoders", str(encoders), "--sample.every", "3")
    looks += ("--sample.frames", "5", "--sample.height", "32", "--sample.width", "32", "--sample.steps", "4")
    train(config(features, tmp_path / "run", *BOTH, *looks, "--steps", "3"))
    train(config(features, tmp_path / "run", *BOTH))
    a, b = (state(folder / "both/checkpoints/step-00000006") for folder in (done, tmp_path / "run"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert losses(done / "both") == losses(tmp_path / "run/both")
    looked = [row for row in rows(tmp_path / "run/both") if "validation_loss_high" in row]
    assert [row["step"] for row in looked] == [0, 3]
    assert all(row["validation_loss_low"] != row["validation_loss_high"] for row in looked)
    assert (tmp_path / "run/both/samples/step-00000003/000.mp4").exists()


def ranks_train(rank: int, world: int, argv: list[str]) -> None:
    from mm_train.recipe import load_config

    as_torchrun(rank, world)
    train(load_config(argv))


def test_two_ranks_give_the_curve_of_one(features, done, tmp_path):
    """They share tokens, and parameters by FSDP."""
    argv = arguments(features, tmp_path / "two", *BOTH, "--parallel.cp", "2")
    spawn(2, ranks_train, argv, timeout=120)
    assert losses(tmp_path / "two/both") == pytest.approx(losses(done / "both"), rel=1e-4)
    assert whose(tmp_path / "two") == whose(done)


def test_adapters_become_a_pair(features, done, tmp_path):
    lora = ("--weights", str(done / "weights"), "--lora.rank", "2", "--steps", "4", "--architecture", "{}")
    pair = open_experts(train(config(features, tmp_path / "run", *BOTH[:-2], "--expert", "both", *lora[:6])))
    assert pair.boundary == 0.875
    assert (pair.high / "adapter_config.json").exists()
    assert (pair.low / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--parallel.pp_layers", "[1,1]"), "--parallel.pp_layers with --expert both"),
        (("--memory.host_layers", "1"), "--memory.host_layers with --expert both"),
        (("--objective.range", "[0, 0.5]"), "each has its own part"),
        (("--optim.name", "schedulefree"), "--optim.name schedulefree with --expert both"),
        (("--expert", "high"), "--expert_steps 2 is for --expert both"),
    ],
)
def test_what_does_not_take_turns_is_refused(features, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        check(config(features, tmp_path / "run", *BOTH, *flags))


def test_runs_of_one_and_of_both_do_not_mix(features, done):
    with pytest.raises(ValueError, match="is a run of both experts, and this trains one"):
        check(config(features, done, "--model", "wan-tiny-a14b", "--expert", "high"))
