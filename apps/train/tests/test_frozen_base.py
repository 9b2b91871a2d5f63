"""Adapters beside a base in few bits, or on the host: the run, its continuation, and what comes out."""

import sys
from pathlib import Path

import pytest
import torch

from mm_convert import open_checkpoint, open_lora
from mm_train.checks import check
from mm_train.export import export
from mm_train.recipe import load_config
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import arguments, config, losses, state, write_features

LORA = ("--lora.rank", "4", "--lora.alpha", "8", "--steps", "3", "--checkpoint.every", "2")


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return write_features(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def base(features) -> Path:
    return train(config(features, features.parent / "base", "--steps", "1"))


def adapt(features: Path, base: Path, output: Path, *more: str) -> list[str]:
    words = arguments(features, output, *LORA, *more)
    words[words.index("random")] = str(base)
    return words


def test_a_run_on_few_bits_goes_on_and_is_merged_into_the_real_base(tmp_path, features, base, capsys):
    held = ("--memory.base", "nf4", "--memory.host_layers", "2", "--memory.recompute", "full")
    plain = adapt(features, base, tmp_path / "plain")
    words = adapt(features, base, tmp_path / "run", *held)
    train(load_config(plain))
    assert "memory     frozen" not in capsys.readouterr().err
    adapter = train(load_config(words))
    assert "memory     frozen matrices of layers in nf4, those of 2 layers on the host" in capsys.readouterr().err
    assert losses(tmp_path / "run") != losses(tmp_path / "plain")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=0.01)
    saved = state(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert all(".lora_" in name or not name.startswith("model.") for name in saved)

    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000002", encoding="utf-8")
    train(load_config(words))
    again = state(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert all(torch.equal(again[name], saved[name]) for name in saved)

    merged = open_checkpoint(export(tmp_path / "run", tmp_path / "merged", merge=True))
    factors, whole = open_lora(adapter), open_checkpoint(base)
    name = "blocks.1.ffn.0"
    a, b = (factors[f"{name}.lora_{letter}.weight"] for letter in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], whole[f"{name}.weight"] + 8 / 4 * b @ a)
    assert torch.equal(merged["patch_embedding.weight"], whole["patch_embedding.weight"])


def test_layers_on_the_host_change_no_loss(tmp_path, features, base):
    train(load_config(adapt(features, base, tmp_path / "plain", "--steps", "1")))
    train(load_config(adapt(features, base, tmp_path / "run", "--steps", "1", "--memory.host_layers", "2")))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ((), "frozen matrices of layers in int8, but all of the model is trained: give --lora.rank 16"),
        (("--trained", '["head.*"]', "--parallel.tp", "2"), "in int8, with --parallel.tp 2: codes and their scales"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tmp_path, features, more, why):
    with pytest.raises(ValueError, match=why):
        check(config(features, tmp_path / "run", "--memory.base", "int8", *more))


def test_the_recipe_of_one_card_is_told_what_it_holds(capsys):
    words = ["--model", "wan2.1-t2v-14b", "--recipe", "wan2.1-t2v-14b-lora-24gb"]
    asked = load_config(words)
    assert (asked.memory.base, asked.memory.recompute, asked.memory.offload) == ("nf4", "full", "inputs")
    assert asked.lora.rank == 16
