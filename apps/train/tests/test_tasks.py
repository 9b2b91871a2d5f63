"""Other tasks than text to video: image to video, first frames, control, and the two experts of one model."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mm_convert import open_checkpoint, open_experts
from mm_data import FeatureCache, FeatureDataset, build_loader, read_video
from mm_models import preset
from mm_models.diffusion.flow import expert_range
from mm_models.wan import WanConfig
from mm_models.wan.testing import write_encoders
from mm_parallel.testing import spawn
from mm_train.objective import build_objective
from mm_train.recipe import load_config
from mm_train.resume import find_checkpoint
from mm_train.step import MicroBatches
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import CONDITIONS, SMALL, arguments, as_torchrun, config, losses, rows, write_features

VACE = ["--model", "wan-tiny-vace", "--architecture", json.dumps(SMALL | {"vace_layers": [0, 1]})]


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """By task, features with its conditions. Latents, texts and ids are not the same in two of them."""
    place = tmp_path_factory.mktemp("features")
    return {task: write_features(place / task, task=task) for task in ("t2v", "i2v", "vace")}


@pytest.fixture(scope="module")
def base(features, tmp_path_factory):
    """A plain Wan of two steps, whose last projection is no longer zero."""
    return train(config(features["t2v"], tmp_path_factory.mktemp("base") / "run", "--steps", "2"))


def first_step(features: Path, *flags: str) -> MicroBatches:
    """The first step of a run, in one micro-batch."""
    read = config(features, Path("unused"), *flags)
    step = next(iter(build_loader(FeatureDataset(features), global_batch=4, micro_batch=4, num_workers=0)))
    return MicroBatches(step, build_objective(read), seed=0, device=torch.device("cpu"))


def test_image_to_video_is_told_mask_condition_and_image(features):
    given = first_step(features["i2v"], "--model", "wan-tiny-i2v").inputs(0)
    batch = next(
        iter(build_loader(FeatureDataset(features["i2v"]), global_batch=4, micro_batch=4, num_workers=0))
    ).micro[0]
    assert given["video"].shape[1] == 36
    assert torch.equal(given["video"][:, 20:], batch.tensors["condition"])
    assert given["video"][:, 16:20, 0].eq(1).all()
    assert given["video"][:, 16:20, 1:].eq(0).all()
    assert torch.equal(given["image"], batch.tensors["image"])


def test_a_first_frame_is_clean_at_time_zero_and_not_learned(features):
    job = first_step(features["t2v"], "--objective.task", "ti2v")
    given, clean = job.inputs(0), job.micro[0].tensors["latents"]
    tokens = clean.shape[3] * clean.shape[4] // 4
    assert torch.equal(given["video"][:, :, 0], clean[:, :, 0])
    assert not torch.equal(given["video"][:, :, 1], clean[:, :, 1])
    assert given["t"][:, :tokens].eq(0).all()
    assert given["t"][:, tokens:].gt(0).all()
    prediction = torch.zeros_like(clean)
    other = prediction.clone()
    other[:, :, 0] = 7.0
    first = first_step(features["t2v"], "--objective.task", "ti2v").losses(prediction, 0)
    assert torch.equal(first, first_step(features["t2v"], "--objective.task", "ti2v").losses(other, 0))


def test_control_reaches_the_model_with_its_mask(features):
    given = first_step(features["vace"], *VACE).inputs(0)
    assert given["control"].shape[1] == 96


@pytest.mark.parametrize(("model", "task"), [(["--model", "wan-tiny-i2v"], "i2v"), (VACE, "vace")])
def test_features_without_the_conditions_are_refused(features, tmp_path, model, task):
    with pytest.raises(ValueError, match=f"conditioned on for {task}.*--model {model[1]} --task {task}"):
        train(config(features["t2v"], tmp_path / "run", *model))
    with pytest.raises(ValueError, match=f"can be trained for {task}"):
        train(config(features["t2v"], tmp_path / "run", *model, "--objective.task", "t2v"))


def test_every_task_learns(features, tmp_path):
    for model, task in ((["--model", "wan-tiny-i2v"], "i2v"), (VACE, "vace"), ([], "ti2v")):
        data = features.get(task, features["t2v"])
        flags = [*model, "--objective.task", task, "--steps", "30", "--validation.features", str(data)]
        train(config(data, tmp_path / task, *flags))
        errors = [row["validation_loss"] for row in rows(tmp_path / task) if "validation_loss" in row]
        assert errors[-1] < 0.98 * errors[0], task


def test_control_on_a_plain_wan_begins_as_that_wan(base, features, tmp_path):
    """The first loss is that of the plain model on the same samples; what is exported is the plain model with control
    that has learned; and a run that was stopped goes on as one that was not.
    """
    control = [*VACE, "--weights", str(base), "--trained", '["vace_*"]']
    with FeatureCache(tmp_path / "uncontrolled") as cache:
        for i, sample in enumerate(FeatureDataset(features["vace"])):
            texts = {f"text.{n}": text for n, text in enumerate(sample["text"])}
            cache.put(f"{i:064d}", {"latents": sample["latents"]} | texts, {"id": sample["id"]})
        cache.finish()
    with pytest.raises(ValueError, match="reference images stand before the latents"):
        train(config(features["vace"], tmp_path / "refused", "--weights", str(base)))
    train(config(tmp_path / "uncontrolled", tmp_path / "plain", "--weights", str(base), "--optim.lr", "0"))
    weights = train(config(features["vace"], tmp_path / "control", *control))
    assert losses(tmp_path / "control")[0] == losses(tmp_path / "plain")[0]
    assert losses(tmp_path / "control")[2] != losses(tmp_path / "plain")[2]
    before, after = open_checkpoint(base), open_checkpoint(weights)
    assert after.family == "vace"
    assert all(torch.equal(before[name], after[name]) for name in before)
    learned = [name for name in after if name.startswith("vace_")]
    assert after["vace_blocks.0.after_proj.weight"].any()
    assert len(learned) + len(before) == len(after)

    train(config(features["vace"], tmp_path / "stopped", *control, "--steps", "2"))
    saved = open_checkpoint(train(config(features["vace"], tmp_path / "stopped", *control)))
    assert all(torch.equal(saved[name], after[name]) for name in after)
    with pytest.raises(ValueError, match="would not be the same run"):
        find_checkpoint(config(features["vace"], tmp_path / "stopped", *control, "--weights", "random"))


def test_validation_samples_are_made_again_while_training(features, tmp_path):
    """With their control, whose reference frame (the first, in which nothing changes) is no part of the video."""
    encoders = write_encoders(tmp_path / "encoders", text_dim=8)
    path, random = tmp_path / "referenced", torch.Generator().manual_seed(0)
    with FeatureCache(path) as cache:
        for i in range(4):
            tensors = {name: torch.randn(n, 3, 4, 6, generator=random) for name, n in CONDITIONS["vace"].items()}
            tensors["control"][16:, 0] = 0
            tensors |= {"latents": torch.randn(16, 3, 4, 6, generator=random), "text.0": torch.ones(2, 8)}
            cache.put(f"{i:064d}", tensors, {"id": f"{i}"})
        cache.finish()
    asked = ["--validation.features", str(path), "--sample.from_validation", "2", "--sample.encoders", str(encoders)]
    train(config(path, tmp_path / "run", *VACE, "--steps", "1", *asked, "--sample.steps", "2"))
    videos = sorted((tmp_path / "run/samples/step-00000001").glob("*.mp4"))
    assert [read_video(video).frames.shape for video in videos] == [(5, 32, 48, 3)] * 2
    with pytest.raises(ValueError, match="makes no video of text alone"):
        train(config(path, tmp_path / "other", *VACE, *asked, "--sample.prompts", '["a cat"]'))


def test_a_pattern_that_trains_nothing_is_refused(features, tmp_path):
    with pytest.raises(ValueError, match="names no parameter"):
        train(config(features["t2v"], tmp_path / "run", "--trained", '["vace_*"]'))


def test_what_could_learn_nothing_is_refused(base, features, tmp_path):
    """A projection that begins at zero and is frozen lets nothing through."""
    lora = [*VACE, "--weights", str(base), "--lora.rank", "2"]
    with pytest.raises(
        ValueError, match=r"after_proj\.weight of a control ladder on the weights of a plain Wan begins"
    ):
        train(config(features["vace"], tmp_path / "run", *lora))
    with pytest.raises(ValueError, match=r"head\.head\.weight of a fresh model begins at zero"):
        train(config(features["vace"], tmp_path / "run", *VACE, "--trained", '["vace_*"]'))


def on_ranks(rank: int, world: int, argv: list[str]) -> None:
    as_torchrun(rank, world)
    train(load_config(argv))


@pytest.mark.parametrize("flags", [["--parallel.ulysses", "2"], ["--parallel.pp_layers", "[1,1]"]], ids=["cp", "pp"])
def test_control_is_learned_on_several_ranks_as_on_one(base, features, tmp_path, flags):
    more = [*VACE, "--weights", str(base), "--trained", '["vace_*"]', "--memory.recompute", "full"]
    train(config(features["vace"], tmp_path / "one", *more))
    spawn(2, on_ranks, arguments(features["vace"], tmp_path / "two", *more, *flags), timeout=120)
    for name in ("loss", "grad_norm"):
        one, two = ([row[name] for row in rows(tmp_path / run)] for run in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4), name
    assert len(open_checkpoint(tmp_path / "two/weights")) == len(open_checkpoint(tmp_path / "one/weights"))


def test_the_parts_of_the_experts_meet_exactly_at_the_boundary():
    """The guides' fractions, for the boundaries that were published."""
    assert expert_range("high", 0.875, 5.0) == (0.0, 0.417)
    assert expert_range("low", 0.875, 5.0) == (0.417, 1.0)
    assert expert_range("high", 0.9, 5.0) == (0.0, 0.358)
    for model, cut in (("wan2.2-t2v-a14b", 0.417), ("wan2.2-i2v-a14b", 0.358), ("vace-a14b", 0.358)):
        for expert, part in (("high", (0.0, cut)), ("low", (cut, 1.0))):
            read = load_config(["--model", model, "--expert", expert])
            assert build_objective(read).schedule.range == part


def test_two_experts_become_one_artifact(base, features, tmp_path):
    both = ["--model", "wan-tiny-a14b", "--weights", str(base), "--steps", "2"]
    for flags, message in (([], "is two models"), (["--expert", "high", "--model", "wan-tiny"], "is one model")):
        with pytest.raises(ValueError, match=message):
            train(config(features["t2v"], tmp_path / "run", *both, *flags))
    for expert in ("high", "low"):
        train(config(features["t2v"], tmp_path / "run", *both, "--expert", expert))
    pair = open_experts(tmp_path / "run/weights")
    assert pair.boundary == 0.875
    high, low = open_checkpoint(pair.high), open_checkpoint(pair.low)
    assert any(not torch.equal(high[name], low[name]) for name in high)
    assert losses(tmp_path / "run/high") != losses(tmp_path / "run/low")
    with pytest.raises(ValueError, match=r"part at noise level 0\.875; this run would part at 0\.9"):
        train(config(features["t2v"], tmp_path / "run", *both, "--expert", "high", "--objective.boundary", "0.9"))
    # neither is overwritten by a run of another kind, nor mixed with it
    with pytest.raises(ValueError, match="belongs to two experts, and this run trains one model"):
        train(config(features["t2v"], tmp_path / "run", "--weights", str(base)))
    with pytest.raises(ValueError, match="belongs to one model, and this run trains an expert of two"):
        train(config(features["t2v"], base.parent, *both, "--expert", "high"))
    assert not (base.parent / "high").exists()
    with pytest.raises(ValueError, match="is the expert for low noise, and --expert is high"):
        train(config(features["t2v"], tmp_path / "other", *both, "--weights", str(pair.low), "--expert", "high"))
    # an expert starts from its own part of a pair
    more = [*both, "--weights", str(tmp_path / "run/weights"), "--expert", "low", "--optim.lr", "0", "--steps", "1"]
    again = open_checkpoint(train(config(features["t2v"], tmp_path / "again", *more)) / "low_noise_model")
    assert all(torch.equal(low[name], again[name]) for name in low)


def test_a_preset_of_two_experts_is_one_architecture():
    assert isinstance(preset("wan2.2-i2v-a14b"), WanConfig)
