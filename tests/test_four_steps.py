"""Distilled adapters: four steps in one command, by their known names; and samples in four steps while training."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "apps/train/tests"))
from runs import write_features

from mm_data import made_with, read_video
from mm_infer.__main__ import main
from mm_models import build
from mm_models.wan.model import WanModel
from mm_models.wan.testing import write_encoders
from mm_parallel.frozen import frozen_linears
from mm_parallel.mesh import make_mesh
from mm_parallel.testing import spawn
from mm_parallel.weights import full_tensors
from mm_train.recipe import load_config
from mm_train.sample_adapter import acting, open_sample_adapter
from mm_train.start import build_model, outline
from mm_train.train import train

SMALL = {"dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_dim": 8}
NAME = "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors"
SIZE = ("--height", "32", "--width", "48", "--frames", "5")
SAMPLE_SIZE = tuple(word.replace("--", "--sample.") for word in SIZE)


def write_distilled(path: Path) -> Path:
    """An adapter as LightX2V's extractor writes it: factors of large matrices, whole differences of all the rest."""
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for name, tensor in build("wan-tiny", **SMALL).state_dict().items():
        module, _, part = name.rpartition(".")
        if tensor.ndim == 2 and "blocks" in name:
            rank = 2 + len(tensors) % 3
            for letter, shape in (("down", (rank, tensor.shape[1])), ("up", (len(tensor), rank))):
                tensors[f"diffusion_model.{module}.lora_{letter}.weight"] = torch.randn(shape, generator=random) * 0.2
            tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(3.0)
        else:
            difference = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[part]
            drawn = torch.randn(tensor.shape, generator=random) * 0.1
            tensors[f"diffusion_model.{f'{module}.' if module else ''}{difference}"] = drawn
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    write_encoders(folder / "encoders", text_dim=8)
    write_features(folder / "features", count=6)
    write_distilled(folder / NAME)
    return folder


def command(place: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model", "wan-tiny", "--weights", "random", "--dtype", "float32", "--architecture", json.dumps(SMALL)),
        *("--data.features", str(place / "features"), "--output", str(output), "--data.workers", "0"),
        *("--data.global_batch", "2", "--data.micro_batch", "2", "--optim.lr", "1e-2", "--steps", "2"),
        *more,
    ]


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def frames(path: Path) -> np.ndarray:
    return np.asarray(read_video(path).frames).astype(int)


@pytest.fixture(scope="module")
def runs(place):
    """A run of all weights, and one of adapters on those in four bits; each also with samples in between."""
    sampled = ["--sample.prompts", '["a cat"]', "--sample.encoders", str(place / "encoders"), "--sample.every", "1"]
    sampled += [*SAMPLE_SIZE, "--sample.lora", str(place / NAME), "--sample.lora_strength", "0.5"]
    kinds = {
        "full": ["--optim.ema", "0.9"],
        "lora": ["--weights", str(place / "full/weights"), "--lora.rank", "2", "--memory.base", "nf4"],
    }
    for kind, flags in kinds.items():
        train(load_config(command(place, place / kind, *flags)))
        train(load_config(command(place, place / f"{kind}-sampled", *flags, *sampled)))
    return place


@pytest.mark.parametrize(("kind", "exported"), [("full", "weights"), ("lora", "adapter")])
def test_samples_with_an_adapter_leave_the_training_as_it_was(runs, kind, exported):
    """Bit for bit: losses, and what is exported."""
    assert len(losses(runs / kind)) == 2
    assert losses(runs / kind) == losses(runs / f"{kind}-sampled")
    files = [next((runs / run / exported).glob("*.safetensors")) for run in (kind, f"{kind}-sampled")]
    plain, sampled = map(load_file, files)
    assert plain.keys() == sampled.keys()
    assert all(torch.equal(plain[name], sampled[name]) for name in plain)


def generate(place: Path, output: str, *flags: str) -> Path:
    asked = ["--encoders", str(place / "encoders"), "--prompt", "a cat", *SIZE, "--output", str(place / output)]
    main([*asked, "--dtype", "float32", *flags])
    return place / output / "video_0.mp4"


def test_samples_are_what_mm_infer_makes_of_the_exported_weights(runs):
    """Of the averaged ones, as samples are. There the factors stay beside the weights, here they are in them."""
    strength = ("--lora", str(runs / NAME), "--lora_strength", "0.5")
    weights = str(runs / "full-sampled/weights-ema")
    ours = generate(runs, "made", "--weights", weights, *strength)
    sample = runs / "full-sampled/samples/step-00000002/000.mp4"
    plain = generate(runs, "without", "--weights", weights, "--steps", "4", "--guidance", "1")
    same, other = (np.abs(frames(sample) - frames(video)).mean() for video in (ours, plain))
    assert same < 0.1 * other, (same, other)  # rounding, which H.264 makes larger in places
    both = (made_with(sample), made_with(ours))
    for name in ("steps", "guidance", "flow_shift", "sampler"):
        assert both[0][name] == both[1][name] == {"steps": 4, "guidance": 1, "flow_shift": 5, "sampler": "euler"}[name]


def test_a_video_in_four_steps_by_one_command(runs, capsys, monkeypatch):
    """The name of the file says how it samples: four forwards in all, as there is no negative pass."""
    calls, forward = [], WanModel.forward
    monkeypatch.setattr(
        WanModel, "forward", lambda self, *args, **more: calls.append(1) or forward(self, *args, **more)
    )
    asked = ("--weights", str(runs / "full/weights"), "--lora", str(runs / NAME))
    video = generate(runs, "four", *asked)
    assert len(calls) == 4
    assert made_with(video)["known_as"].startswith("lightx2v")
    said = capsys.readouterr().out
    assert "4 steps, guidance 1, flow_shift 5, sampler euler: known of lightx2v's distilled models and LoRAs" in said
    calls.clear()
    generate(runs, "two", *asked, "--steps", "2", "--guidance", "3")
    assert len(calls) == 4  # two steps of two passes
    assert "flow_shift 5, sampler euler: known of" in capsys.readouterr().out


def test_the_adapter_of_samples_is_looked_at_before_the_start(place, tmp_path):
    made = ["--sample.prompts", '["a cat"]', "--sample.encoders", str(place / "encoders")]
    wrong = tmp_path / "other.safetensors"
    shapes = {"down": (2, 24), "up": (48, 2)}
    save_file({f"diffusion_model.blocks.0.ffn.0.lora_{p}.weight": torch.ones(s) for p, s in shapes.items()}, wrong)
    for flags, message in (
        (["--sample.lora", str(place / NAME)], "acts while samples are made, and none are"),
        ([*made, "--sample.lora_strength", "0.5"], "is that of an adapter"),
        ([*made, "--sample.lora", "nowhere"], "nowhere does not exist"),
        ([*made, "--sample.lora", str(wrong)], r"is for another model.*ffn.0.weight \(\[48, 24\], here \[64, 48\]\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train(load_config(command(place, tmp_path / "run", *flags, *SAMPLE_SIZE)))
    assert not (tmp_path / "run/checkpoints").exists()


def test_beside_a_base_in_four_bits(runs):
    """What is quantised stays as it is: the factors, and the bias, make the difference."""
    flags = ["--weights", str(runs / "full/weights"), "--lora.rank", "2", "--memory.base", "nf4"]
    config = load_config(command(runs, runs / "nowhere", *flags, "--sample.lora", str(runs / NAME)))
    adapter = open_sample_adapter(config, outline(config))
    model = build_model(config, None, torch.device("cpu"), continuing=False).parameters
    linears = frozen_linears(model)
    assert len(linears) == 2 * 10
    for name, linear in linears.items():
        published = name.replace(".base_layer.", ".")
        x = torch.randn(3, linear.in_features)
        before = linear(x)
        with acting(adapter, model):
            added = linear(x) - before
        bias = adapter.added(published.replace(".weight", ".bias"))
        torch.testing.assert_close(added, x @ adapter.added(published).T + bias, rtol=1e-4, atol=1e-4)
        assert torch.equal(linear(x), before)


LAYOUTS = (["--parallel.dp_shard", "2"], ["--parallel.tp", "2"], ["--parallel.pp_layers", "[1,1]"])


def in_layouts(rank: int, world: int, argv: list[str]) -> None:
    """Whatever the layout, the weights have the adapter inside the block, and outside of it their own bits."""
    for flags in LAYOUTS:
        config = load_config([*argv, *flags])
        whole = outline(config)
        adapter = open_sample_adapter(config, whole)
        built = build_model(config, make_mesh(config.parallel, "cpu"), torch.device("cpu"), continuing=False)
        before = dict(full_tensors(built.parameters))
        with acting(adapter, built.parameters):
            inside = dict(full_tensors(built.parameters))
        changed = [name for name in before if name in adapter.parameters]
        assert len(changed) > 10, flags
        for name in changed:
            torch.testing.assert_close(inside[name], before[name] + adapter.added(name), msg=f"{flags} {name}")
        after = dict(full_tensors(built.parameters))
        assert all(torch.equal(after[name], before[name]) for name in before), flags


def test_in_every_layout(place):
    spawn(2, in_layouts, command(place, place / "nowhere", "--sample.lora", str(place / NAME)), timeout=120)
