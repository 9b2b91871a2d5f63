"""Open-Sora-Plan is trained: DDPM, text with its mask, weights that say what they were trained for."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm_convert import open_checkpoint
from mm_convert.cli import main as mm_convert
from mm_data import FeatureCache, FeatureDataset, build_loader, made_with, read_video
from mm_data.random import generator
from mm_models import build, preset
from mm_models.families import find
from mm_models.opensoraplan.testing import write_encoders
from mm_models.wan import testing as wan_testing
from mm_parallel import forward_backward
from mm_parallel.testing import spawn
from mm_train.adapter import check_adapter
from mm_train.checks.paths import check_encoders
from mm_train.config import Config
from mm_train.data import training_data
from mm_train.objective import build_objective
from mm_train.recipe import load_config
from mm_train.start import Start
from mm_train.step import MicroBatches
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import as_torchrun, losses

SMALL = {"dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_dim": 8, "text_tokens": 16}


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    path, random = tmp_path_factory.mktemp("features"), torch.Generator().manual_seed(0)
    with FeatureCache(path) as cache:
        for i in range(8):
            tensors = {"latents": torch.randn(4, 2, 4, 6, generator=random)}
            cache.put(f"{i:064d}", tensors | {"text.0": torch.randn(3 + i, 8, generator=random)}, {"id": f"{i}.mp4"})
        cache.put_empty_text(torch.randn(1, 8, generator=random))
        cache.finish()
    return path


def config(features: Path, output: Path, *more: str, architecture: dict | None = None) -> Config:
    return load_config(
        [
            *("--model", "opensoraplan-tiny", "--weights", "random", "--dtype", "float32"),
            *("--architecture", json.dumps(SMALL | (architecture or {}))),
            *("--data.features", str(features), "--output", str(output), "--data.workers", "0"),
            *("--data.global_batch", "4", "--data.micro_batch", "2", "--optim.lr", "1e-2", "--steps", "3"),
            *more,
        ]
    )


@pytest.fixture(scope="module")
def trained(features, tmp_path_factory) -> Path:
    """The output of a run of three steps."""
    output = tmp_path_factory.mktemp("run") / "run"
    train(config(features, output))
    return output


def test_text_is_padded_and_its_padding_is_masked(features):
    step = next(iter(build_loader(FeatureDataset(features), global_batch=4, micro_batch=4, num_workers=0)))
    job = MicroBatches(step, build_objective(config(features, Path("unused"))), seed=0, device=torch.device("cpu"))
    given, tensors = job.inputs(0), job.micro[0].tensors
    assert given["text"].shape == (4, 16, 8)
    assert torch.equal(given["text_mask"].sum(1), tensors["text_mask"].sum(1))
    assert len(set(given["text_mask"].sum(1).tolist())) > 1
    assert not given["text"][~given["text_mask"]].any()
    assert "video_mask" not in given  # all of it is seen
    assert ((given["t"] >= 0) & (given["t"] <= 999)).all()


def test_text_of_more_rows_than_are_read_is_refused_at_the_start(features, tmp_path):
    """The longest of eight has 10."""
    train(config(features, tmp_path / "run", "--steps", "1", architecture={"text_tokens": 10}))
    with pytest.raises(
        ValueError, match=r"text of 7\.mp4 has 10 rows, .* asked to read 9: .* text_tokens of at least 10"
    ):
        train(config(features, tmp_path / "other", architecture={"text_tokens": 9}))


def test_a_run_and_what_it_writes(trained):
    values = losses(trained)
    assert len(values) == 3
    assert all(0 < value < 3 for value in values)  # of standard noise, near 1 or below by min-SNR
    file = open_checkpoint(trained / "weights")
    assert file.family == "opensoraplan"
    assert set(file.config) == set(vars(preset("opensoraplan-tiny")))
    assert (file.config["sample_size"], file.config["prediction_type"]) == (None, "epsilon")


def run(rank: int, world: int, features: Path, output: Path, flags: list[str]) -> None:
    as_torchrun(rank, world)
    train(config(features, output, *flags))


@pytest.mark.parametrize("flags", [["--parallel.ulysses", "2"], ["--parallel.pp_layers", "[1,1]"]], ids=["cp", "pp"])
def test_two_ranks_train_as_one(features, trained, tmp_path, flags):
    spawn(2, run, features, tmp_path / "run", flags, timeout=180)
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-5)


def test_videos_drawn_meanwhile_have_the_same_noise_each_time(features, tmp_path):
    """…also that which the sampler adds at each step; and settings that are not given are the published ones."""
    encoders = write_encoders(tmp_path / "encoders", text_dim=8)
    asked = ["--sample.prompts", '["a cat", "a dog"]', "--sample.from_validation", "1", "--sample.every", "1"]
    asked += ["--validation.features", str(features), "--sample.encoders", str(encoders), "--sample.steps", "3"]
    asked += ["--sample.height", "32", "--sample.width", "48", "--sample.frames", "5", "--optim.lr", "0"]
    asked += ["--sample.prompt_template", "{}", "--sample.negative_prompt", ""]  # there are 16 rows of text only
    train(config(features, tmp_path / "run", *asked, "--steps", "2"))
    first, second = (sorted((tmp_path / "run/samples" / f"step-0000000{i}").glob("*.mp4")) for i in (1, 2))
    assert [video.name for video in first] == [video.name for video in second] == ["000.mp4", "001.mp4", "002.mp4"]
    frames = [[read_video(video).frames for video in videos] for videos in (first, second)]
    for one, other in zip(*frames, strict=True):
        assert (one == other).all()
    assert (frames[0][0] != frames[0][1]).any()
    record, published = made_with(first[0]), find("opensoraplan-tiny")[1].published
    assert (record["sampler"], record["flow_shift"], record["steps"]) == ("euler_ancestral", None, 3)
    assert (record["guidance"], record["fps"]) == (published.guidance, published.fps)


def test_training_goes_on_with_another_size(features, trained, tmp_path, capsys):
    """As the makers trained stage after stage: longer, then larger with other positions; and it is said."""
    weights = ["--weights", str(trained / "weights"), "--steps", "1"]
    larger = {"sample_size": [2, 4, 6], "interpolation_scale": [1, 1.5, 2]}
    train(config(features, tmp_path / "larger", *weights, architecture=larger))
    said = capsys.readouterr()
    assert "trained with interpolation_scale (1.0, 1.0, 1.0) (asked for: (1.0, 1.5, 2.0))" in said.out + said.err
    file = open_checkpoint(tmp_path / "larger" / "weights")
    assert file.config["interpolation_scale"] == [1.0, 1.5, 2.0]
    with pytest.raises(ValueError, match="weights holds opensoraplan, and the model asked for is of wan"):
        Start(build("wan-tiny", device="meta"), config(features, tmp_path / "wan", *weights))
    with pytest.raises(ValueError, match=r"another architecture: num_heads 2 \(asked for: 4\)"):
        train(config(features, tmp_path / "other", *weights, architecture={"num_heads": 4}))


@pytest.mark.parametrize(("size", "noted"), [([24, 4, 6], True), ([2, 8, 6], True), ([2, 4, 6], False)])
def test_a_size_that_no_sample_has_is_told_before_the_first_step(features, size, noted):
    """…as config.json will say that the weights make it, and mm_infer makes no other length then."""
    asked = config(features, Path("unused"), architecture={"sample_size": size})
    notes = training_data(asked, build_objective(asked), None, torch.device("cpu")).notes
    assert len(notes) == noted
    if noted:
        frames, rows, columns = (size[0] - 1) * 4 + 1, size[1] * 8, size[2] * 8
        assert notes[0].startswith(f"no sample has {frames} frames of {rows}x{columns}, which config.json will say")
        assert "Samples have 5 frames of 32x48: choose another --model" in notes[0]
        assert """--architecture '{"sample_size": [2, 4, 6]}'""" in notes[0]


def test_encoders_of_another_family_are_refused_before_they_are_loaded(tmp_path):
    """…each folder of them, by what its config.json says it is."""
    theirs = {"opensoraplan-tiny": tmp_path / "osp", "wan-tiny": tmp_path / "wan"}
    write_encoders(theirs["opensoraplan-tiny"])
    wan_testing.write_encoders(theirs["wan-tiny"])
    reasons = {
        ("opensoraplan-tiny", "vae"): "_class_name is 'AutoencoderKLWan', and must be 'CausalVAEModel'",
        ("opensoraplan-tiny", "text_encoder"): "model_type is 'umt5', and must be 'mt5'",
        ("wan-tiny", "vae"): "_class_name is 'CausalVAEModel', and must be 'AutoencoderKLWan'",
        ("wan-tiny", "text_encoder"): "model_type is 'mt5', and must be 'umt5'",
    }
    for (model, part), reason in reasons.items():
        family, preset = find(model)
        folders = family.video.encoders(preset.config)
        check_encoders(family.video, theirs[model], folders, "--encoders")
        mixed = tmp_path / f"{model} {part}"
        for folder in folders:
            (source,) = (path for name, path in theirs.items() if (name == model) != (folder == part))
            shutil.copytree(source / folder, mixed / folder)
        with pytest.raises(ValueError, match=reason):
            check_encoders(family.video, mixed, folders, "--encoders")


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_every_visible_latent_of_a_step_weighs_the_same(features, micro_batch):
    """…in whatever micro-batch it is: the loss and the gradient of the makers' formula over the whole step."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    asked = config(features, Path("unused"))
    loader = build_loader(FeatureDataset(features), global_batch=4, micro_batch=micro_batch, num_workers=0)
    step = next(iter(loader))
    for batch in step.micro:
        seen = torch.ones(len(batch.ids), 2, 4, 6, dtype=torch.bool)
        for i, name in enumerate(batch.ids):
            seen[i, :, :, 2 + int(name.removesuffix(".mp4")) % 4 :] = False
        batch.tensors["video_mask"] = seen
    torch.manual_seed(0)
    model = build(asked.model, **asked.architecture)
    job = MicroBatches(step, build_objective(asked), asked.seed, torch.device("cpu"))
    total = float(job.weigh())
    losses = forward_backward(model, len(job), job.inputs, job.losses, total)
    found = model.proj_out.weight.grad.clone()

    theirs, errors, visible = DDPMScheduler(), 0, 0
    for batch in step.micro:
        for i, name in enumerate(batch.ids):
            one = {key: value[i : i + 1] for key, value in batch.tensors.items()}

            def random(purpose, name=name, epoch=batch.epochs[i]):
                return generator(asked.seed, epoch, name, purpose)

            t = torch.randint(0, 1000, (1,), generator=random("timestep"))
            noise = torch.randn(1, 4, 2, 4, 6, generator=random("noise"))
            noise = noise + 0.02 * torch.randn(1, 4, 1, 1, 1, generator=random("noise_offset"))
            noisy = theirs.add_noise(one["latents"], noise, t)
            output = model(noisy, t, one["text"], one["text_mask"], one["video_mask"])
            weight = compute_snr(theirs, t).clamp(max=5) / compute_snr(theirs, t)
            mask = one["video_mask"][:, None].expand_as(output)
            errors, visible = errors + (weight * (output - noise) ** 2 * mask).sum(), visible + mask.sum()
    assert torch.cat(losses).sum() / total == pytest.approx((errors / visible).item(), rel=1e-5)
    (expected,) = torch.autograd.grad(errors / visible, [model.proj_out.weight])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_peft_puts_an_adapter_on_the_class_of_diffusers(features, tmp_path):
    """…as it is written: merged by peft and by mm-convert, it makes the same weights."""
    from diffusers import AllegroTransformer3DModel
    from peft import PeftModel
    from safetensors.torch import load_file

    wide = {"ffn_dim": 192}  # four times the width, as Allegro has it
    base = train(config(features, tmp_path / "base", "--steps", "1", architecture=wide))
    lora = ["--weights", str(base), "--lora.rank", "2", "--lora.alpha", "4"]
    adapter = train(config(features, tmp_path / "lora", *lora, architecture=wide))
    other = config(features, tmp_path / "v", *lora, architecture=wide | {"prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match=r"trained on weights of prediction epsilon .* these are of .* v_prediction: "):
        check_adapter(replace(other, lora=replace(other.lora, weights=adapter)))
    merged = tmp_path / "merged"
    mm_convert(["convert", str(base), str(merged), "--lora", str(adapter), "--to", "original"])
    model = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48, caption_channels=8
    )
    model.load_state_dict(dict(load_file(next(base.glob("*.safetensors")))))
    tuned = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    written = load_file(next(merged.glob("*.safetensors")))
    before = load_file(next(base.glob("*.safetensors")))
    moved = {name for name, tensor in written.items() if not torch.equal(tensor, before[name])}
    assert len(moved) == 2 * (4 + 4 + 2)  # layers x linears of both attentions and of the feed-forward
    for name, tensor in tuned.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-5, atol=1e-6)
