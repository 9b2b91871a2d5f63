"""What a run will take, said before it is started: of all families, without a device, weights or data."""

from __future__ import annotations

import json
import re
import resource
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mm_data import FeatureDataset
from mm_models.families import find, presets
from mm_models.family import ClipSize
from mm_parallel.devices import find_device
from mm_train.config import LayoutConfig
from mm_train.estimate.__main__ import main
from mm_train.estimate.config import EstimateConfig
from mm_train.estimate.estimate import Subject, estimate
from mm_train.estimate.layouts import MEMORIES, command, describe, find_layouts, with_memory
from mm_train.estimate.search import search
from mm_train.estimate.workload import find_samples
from mm_train.objective import build_objective
from mm_train.recipe import load_config
from mm_train.start import outline
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import arguments, rows, write_features


def asked(model: str, *more: str) -> EstimateConfig:
    """The configuration of an estimate; of two experts, of the first."""
    expert = ["--expert", "high"] if find(model)[1].boundary else []
    return load_config(["--model", model, *expert, *more], EstimateConfig, "estimate")


ALL = [(name, task.name) for name in presets() for task in find(name)[0].tasks(find(name)[1].config) if task.trained]


@pytest.mark.parametrize(("model", "task"), ALL, ids=[f"{model}-{task}" for model, task in ALL])
def test_an_example_is_what_the_model_takes(model, task):
    """By its own check of shapes, and what the objective makes of it has a loss for each sample."""
    config = asked(model, "--objective.task", task, "--data.global_batch", "4")
    objective, samples = build_objective(config), find_samples(config, config.size)
    work = samples.step(config, data_ranks=2)
    whole = outline(config)
    arguments, losses = work.ask(objective)
    output = whole.head(whole.stem(**arguments))
    assert output.is_meta
    assert len(losses(output)) == len(objective.weigh(work.tensors))
    assert work.micro_batches * work.samples == 2


def test_an_example_is_what_features_hold(tmp_path):
    """Names and shapes of one sample in the cache, and of the batch that training gets."""
    features = write_features(tmp_path / "features", task="i2v")
    family, preset = find("wan-tiny-i2v")
    config = family.config(**{**vars(preset.config), "text_dim": 8, "image_dim": 32})
    made = family.example(config, "i2v", ClipSize(5, 48, 32, text=6))
    dataset = FeatureDataset(features)
    item = dataset[[bucket[2:] for bucket in dataset.buckets].index((6, 4))]
    held = {"latents": item["latents"], "text": item["text"][0], **item["conditions"]}
    assert {name: x.shape[1:] for name, x in made.items()} == {name: x.shape[1:] for name, x in held.items()}
    assert made.keys() == held.keys()


@pytest.mark.parametrize(
    ("size", "said"),
    [((80, 480, 832), "80 is not 4k.1.*77 and 81"), ((81, 488, 832), "height 488.*480 and 496"), ((81, 480, 8), "16")],
)
def test_a_size_that_leaves_no_whole_tokens_is_refused(size, said):
    family, preset = find("wan2.1-t2v-1.3b")
    with pytest.raises(ValueError, match=said):
        family.example(preset.config, "t2v", ClipSize(*size))


def test_sizes_are_those_of_features_of_the_geometry_or_as_published(tmp_path):
    features = write_features(tmp_path / "features")
    config = load_config(arguments(features, tmp_path / "run"))
    found = find_samples(config)
    assert found.counted
    assert found.sample["latents"].shape == (16, 2, 4, 6) or found.sample["latents"].shape == (16, 2, 6, 4)
    assert found.sample["text"].shape == (6, 8), "the longest text there is"
    work = found.step(config, 1)
    assert sum(share for share, _ in work.others) == pytest.approx(1)
    assert (work.tensors["latents"].shape[0], work.micro_batches) == (2, 2)

    published = find_samples(asked("wan2.1-t2v-14b"))
    assert published.sample["latents"].shape[1:] == (21, 90, 160)
    assert "as published" in published.source
    geometry = find_samples(asked("wan2.1-t2v-14b", "--data.manifest", "none.txt"))
    assert geometry.sample["latents"].shape[1:] == (21, 60, 104)
    (tmp_path / "sets.toml").write_text(
        '[[set]]\npath = "."\nsizes = [[480, 832], [720, 1280]]\nframes = 49\n[[set]]\npath = "."\n', encoding="utf-8"
    )
    sets = find_samples(asked("wan2.1-t2v-14b", "--data.manifest", str(tmp_path / "sets.toml")))
    assert sets.sample["latents"].shape[1:] == (13, 90, 160)
    assert f"49x720x1280 (the largest of {tmp_path}/sets.toml)" in sets.source
    config = asked("wan2.1-t2v-14b", "--size.frames", "17", "--size.text", "77")
    assert find_samples(config, config.size).sample["text"].shape == (77, 4096)
    config = asked("wan2.1-t2v-14b", "--data.features", str(features), "--size.frames", "17")
    with pytest.raises(ValueError, match=r"--size.frames is for where there is no data, and --data.features .* is"):
        find_samples(config, config.size)
    missing = find_samples(asked("wan2.1-t2v-14b", "--data.features", "not/there"))
    assert not missing.counted, "paths need not be there"


def test_packs_are_as_full_as_the_step_makes_them(tmp_path):
    def step(*more: str, data_ranks: int = 1):
        config = asked("qwen2.5-vl-tiny", "--data.max_tokens", "4096", "--output", str(tmp_path), *more)
        return find_samples(config, config.size).step(config, data_ranks)

    full = step("--data.global_batch", "64", data_ranks=8)
    assert (full.tensors["input_ids"].shape, full.micro_batches, full.samples) == ((1, 4096), 2, 4)
    assert len(full.tensors["grid_thw"][0]) == 4
    assert 7000 < full.tensors["pixel_values"].shape[1] <= 8192
    assert int((full.tensors["labels"] != -100).sum()) == 1024
    few = step("--data.global_batch", "16", data_ranks=8)
    assert (few.tensors["input_ids"].shape[1], few.micro_batches) == (2048, 1)
    alone = step("--data.global_batch", "16", "--data.packing", "false", data_ranks=8)
    assert (alone.tensors["input_ids"].shape[1], alone.micro_batches) == (1024, 2)
    tokens, patches = np.array([100, 300, -2], np.int32), np.array([0, 800, 0], np.int32)
    np.savez(tmp_path / "survey.npz", tokens=tokens, patches=patches)
    looked = step("--data.global_batch", "16")
    assert (looked.samples, looked.micro_batches) == (16, 1), "200 tokens each, of which 16 are 3,200"
    assert looked.tensors["input_ids"].shape[1] == 3200


def test_layouts_use_all_ranks_and_share_the_batch():
    config = asked("wan2.1-t2v-14b", "--data.global_batch", "64")
    found = list(find_layouts(config, 64, layers=40, tokens=75600, per_host=8))
    assert len(found) > 200
    assert len({describe(one) for one in found}) == len(found)
    for one in found:
        layout = one.parallel.resolve(64)
        one.micro_batches(layout.dp_replicate * layout.dp_shard)
        assert layout.tp <= 8
    stages = [len(one.parallel.stages) if one.parallel.pp_layers else 0 for one in found]
    kinds = {(one.parallel.tp > 1, one.parallel.ring > 1, n) for one, n in zip(found, stages, strict=True)}
    assert kinds == {
        (tp, ring, n) for tp, ring, n in product((True, False), (True, False), (0, 1, 2)) if not tp or not ring
    }


def test_a_layout_is_a_command_that_gives_it(tmp_path):
    """Whatever the file and the flags that were given say of the layout."""
    mine = tmp_path / "mine.toml"
    mine.write_text('steps = 7\n[parallel]\ncp = 4\n[memory]\noffload = "inputs"\n', encoding="utf-8")
    given = ["--model", "wan2.1-t2v-14b", "--config", str(mine), "--data.global_batch=64", "--parallel.tp", "2"]
    given += ["--world=64", "--device", "h100", "--search", "true", "--size.frames", "49", "--memory.recompute", "none"]
    config = load_config(given, EstimateConfig)
    for one in list(find_layouts(config, 64, layers=40, tokens=75600, per_host=8))[::37]:
        for memory in MEMORIES:
            wanted = with_memory(one, memory)
            words = shlex.split(command(wanted, given, 64, 8))
            read = load_config(words[words.index("mm_train") + 1 :])
            assert read.parallel.resolve(64) == wanted.parallel.resolve(64)
            assert (read.memory, read.data, read.steps) == (wanted.memory, wanted.data, 7)
    assert words[:3] == ["torchrun", "--nnodes", "8"]
    twelve = shlex.split(command(replace(config, parallel=LayoutConfig(dp_shard=12)), given, 12, 8))
    assert (twelve[2], twelve[twelve.index("--nproc_per_node") + 1]) == ("2", "6"), "each host starts as many"


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--optim.ema", "0.9", "--memory.recompute", "full", "--dtype", "bfloat16"),
        ("--trained", '["blocks.1.*", "head.*"]', "--optim.kernel", "foreach"),
        ("--trained", '["blocks.1.*", "head.*"]', "--memory.base", "int8", "--memory.host_layers", "1"),
    ],
)
def test_a_run_holds_what_was_estimated(tmp_path, capsys, more):
    """On one rank: parameters, moments and average to the byte; told beside each other, and kept."""
    features = write_features(tmp_path / "features")
    train(load_config([*arguments(features, tmp_path / "run"), *more]))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("estimate ")]
    assert len(said) == 1
    kept = json.loads((tmp_path / "run" / "estimate.json").read_text(encoding="utf-8"))
    (rank,) = kept["estimate"]["memory"]
    for name in ("parameters", "moments", "average"):
        assert rank[name] == kept["measured"][name]
    first, *others = rows(tmp_path / "run")
    assert first["estimated_memory_gib"] == kept["estimate"]["peak"] / 2**30
    assert first["estimate_took"] < 20
    assert not any("estimated_memory_gib" in row for row in others)
    assert "measured" in said[0]
    assert "of the whole process" in said[0]


H100 = ("--device", "h100")
REAL = {
    "wan2.1-t2v-14b": ("--world", "64", "--data.global_batch", "64", "--parallel.cp", "8"),
    "wan2.1-i2v-1.3b": (*("--recipe", "wan2.1-i2v-1.3b-lora", "--world", "8"), *H100),
    "wan2.2-i2v-a14b": ("--world", "32", "--data.global_batch", "32", "--parallel.pp_layers", "[20,20]", *H100),
    "vace-14b": ("--world", "16", "--parallel.tp", "2", "--parallel.ring", "2", *H100),
    "opensoraplan-1.2": ("--world", "8", "--memory.recompute", "but_attention", *H100),
    "qwen2.5-vl-7b": ("--world", "8", "--data.max_tokens", "8192", "--data.global_batch", "96", *H100),
}


def run(capsys, *argv: str) -> str:
    main([*argv])
    return capsys.readouterr().out


@pytest.mark.parametrize("model", REAL)
def test_the_real_ones_are_told_in_three_columns(model, tmp_path, capsys):
    """And the file has the same numbers."""
    expert = ["--expert", "low"] if find(model)[1].boundary else []
    said = run(capsys, "--model", model, *expert, *REAL[model], "--json", str(tmp_path / "e.json"), "--output", "none")
    kept = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert re.search(r"counted +modelled +constant\n +parameters +[\d.]+ .iB", said)
    assert re.search(r"peak +[\d.,]+ GiB", said)
    assert ("MFU" in said) == (kept["time"] is not None) == ("--device" in REAL[model])
    assert kept["flops"] > 1e15
    assert kept["peak"] == max(rank["peak"] for rank in kept["memory"])
    assert len(kept["memory"]) == (2 if "--parallel.pp_layers" in REAL[model] else 1)
    if kept["time"]:
        parts = ("gemm", "attention", "memory", "communication", "offload", "bubble", "optimizer")
        step = sum(kept["time"][part] for part in parts)
        assert 0.05 < kept["time"]["mfu"] < 1
        assert kept["flops"] / step / kept["world"] / 989e12 == pytest.approx(kept["time"]["mfu"])
        assert f" {step:,.2f} s" in said


def test_trained_parts_cost_what_is_trained():
    """Parameters, gradients and moments of a model and of its LoRA on 8 ranks, by hand."""
    found = estimate(asked("wan2.1-t2v-1.3b"), 8)
    whole = found.fullest
    assert whole.parameters == pytest.approx(4 * found.parameters / 8, rel=2e-3)
    assert whole.gradients == whole.parameters
    assert whole.moments == pytest.approx(2 * whole.parameters, rel=1e-5)
    lora = estimate(asked("wan2.1-t2v-1.3b", "--recipe", "wan2.1-t2v-1.3b-lora"), 8)
    assert lora.parameters == found.parameters + lora.trained
    assert lora.fullest.moments == pytest.approx(8 * lora.trained / 8, rel=1e-2)
    assert lora.fullest.parameters == pytest.approx((2 * found.parameters + 4 * lora.trained) / 8, rel=4e-2)
    assert lora.disk.checkpoint == 12 * lora.trained


@pytest.mark.parametrize(
    ("model", "world", "more"),
    [
        ("wan2.1-t2v-1.3b", 16, ("--architecture", '{"num_layers": 8}')),
        ("qwen2.5-vl-3b", 8, ("--architecture", '{"num_layers": 8}')),
    ],
)
def test_a_search_ends_with_a_command_that_starts(model, world, more, capsys):
    """The layout that it prints is legal for its ranks, fits, and is the fastest of those that do."""
    given = ["--model", model, *more, "--data.global_batch", "64", "--output", "none"]
    said = run(capsys, *given, "--world", str(world), *H100, "--search")
    assert "the command to start, when --weights and data are given, too" in said
    words = shlex.split(said.splitlines()[-1])
    assert words[:2] == ["torchrun", "--nnodes"] or words[:3] == ["torchrun", "--nproc_per_node", "8"]
    config = load_config(words[words.index("mm_train") + 1 :])
    found = estimate(config, world, find_device("h100"))
    assert found.fits(find_device("h100"))
    table = re.findall(r"^ +([\d.,]+) +[\d.]+ %", said.partition("would be faster")[0], flags=re.MULTILINE)
    assert len(table) == 5
    assert [float(seconds) for seconds in table] == sorted(float(seconds) for seconds in table)
    assert float(table[0]) == pytest.approx(found.seconds, abs=0.006)


def test_best_first_finds_what_looking_at_all_finds():
    """On the layouts of 4 ranks, with a device that is too small for many of them."""
    small = replace(find_device("h100"), name="small", memory=4 * 2**30)
    config = asked("wan2.1-t2v-1.3b", "--architecture", '{"num_layers": 2}', "--data.global_batch", "4")
    subject = Subject(config)
    found = search(subject, config, 4, small, shown=3)
    everything = []
    for one in find_layouts(config, 4, 2, subject.tokens, small.per_host):
        with suppress(ValueError):
            everything += [subject.estimate(with_memory(one, memory), 4, small) for memory in MEMORIES]
    fitting = sorted(one.seconds for one in everything if one.fits(small))
    assert 3 < len(fitting) < len(everything)
    assert [option.estimate.seconds for option in found.best] == pytest.approx(fitting[:3])
    assert all(not option.estimate.fits(small) for option in found.faster)
    assert all(option.estimate.seconds < fitting[0] for option in found.faster)


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (4, ("--recipe", "wan2.1-t2v-1.3b-lora", "--memory.base", "int8")),  # and no tp
        (2, ("--memory.offload_params", "true")),  # and something that is sharded
        (4, ("--parallel.schedule", "zero_bubble", "--memory.reduce", "bfloat16")),  # and no pipeline
    ],
)
def test_a_search_leaves_out_what_the_memory_does_not_go_with(world, more):
    """On a device that is too small for all, so that all are looked at; each is a layout that a run takes."""
    small = replace(find_device("h100"), name="small", memory=2**27)
    config = asked("wan2.1-t2v-1.3b", *more, "--architecture", '{"num_layers": 2}', "--data.global_batch", "4")
    subject = Subject(config)
    found = search(subject, config, world, small)
    assert found.illegal > 0
    assert found.faster
    for option in found.faster:
        subject.check(option.config, world)


def test_sixty_four_ranks_take_seconds():
    """Of the processor, all of Python included: 5 s beside others; a user waits 10 s at most."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    given = ["--model", "wan2.1-t2v-14b", "--data.global_batch", "64", "--world", "64", *H100, "--search"]
    command = [sys.executable, "-m", "mm_train.estimate", *given, "--output", "none"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "64 ranks of h100" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_what_takes_less_is_told_where_it_does_not_fit(capsys):
    """Only what does take less; and what else there is."""
    given = [
        "--model",
        "wan2.1-t2v-1.3b",
        "--architecture",
        '{"num_layers": 4}',
        "--device",
        "rtx-4090",
        "--output",
        "x",
    ]
    given += ["--size.frames", "161", "--size.height", "1056", "--size.width", "1920"]
    said = run(capsys, *given, "--memory.recompute", "full").partition("what would take less\n")[2]
    assert "--memory.recompute full --memory.offload inputs" in said
    assert "--memory.recompute none" not in said
    assert "more ranks" in said
    assert ("smaller samples" in said) == ("✓" not in said)


def test_what_does_not_go_together_is_one_line(capsys):
    for argv, said in (
        (
            ["--world", "64"],
            "--data.global_batch 8 cannot be cut.* 64 data-parallel .*give --data.global_batch 64",
        ),
        (["--device", "h1000"], "no device is named 'h1000', do you mean h100"),
        (["--search"], "give --device"),
        (["--size.frames", "80"], "frames 80 is not 4k.1"),
        (["--size.frames", "65537", "--size.height", "2048", "--size.width", "2048"], "is more than an estimate looks"),
        (["--size.conversation", "5"], "--size.conversation is for conversations, and wan2.1-t2v-14b makes videos"),
        (["--model", "qwen2.5-vl-3b", "--size.frames", "81"], "--size.frames is for videos, and qwen2.5-vl-3b reads"),
        (["--model", "qwen2.5-vl-3b", "--size.conversation", "5000"], "5000 is more than --data.max_tokens 4096"),
        (["--world", "3", "--parallel.tp", "3", "--data.global_batch", "3"], "heads cannot be cut over tp=3"),
        (["--learning_rate", "1"], "unknown option --learning_rate"),
        (["--compile", "true", "--parallel.schedule", "zero_bubble"], "splits a backward in two"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--model", "wan2.1-t2v-14b", *argv])
        assert stop.value.code == 2
        assert re.search(said, capsys.readouterr().err)
