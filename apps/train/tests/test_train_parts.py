"""Configuration, schedule, groups, average, checkpoint directory, metrics: the parts, each alone."""

import errno
import json
import math
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from mm_convert.cli.arguments import dump, read_config
from mm_data import FeatureDataset, Geometry, build_loader
from mm_models import build, preset, presets
from mm_models.diffusion.flow import FlowMatching
from mm_models.diffusion.objective import Diffusion
from mm_models.families import find
from mm_models.wan import WanConfig
from mm_models.wan.encode import Conditioning
from mm_models.wan.testing import write_encoders
from mm_train import checkpoint as checkpoints
from mm_train import extract
from mm_train.checkpoint import Checkpointer
from mm_train.checks import CHECKS, check
from mm_train.command import claim_output
from mm_train.config import Config, OptimConfig
from mm_train.metrics import Metrics
from mm_train.optim import EMA, build_optimizer, learning_rate, step_if
from mm_train.recipe import RECIPES, load_config
from mm_train.settle import settle_samples
from mm_train.step import MicroBatches

sys.path.insert(0, str(Path(__file__).parent))
from runs import SMALL, arguments, config, write_features


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "store")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("encoders"), text_dim=8)


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.toml")))
def test_every_recipe_is_understood_and_names_a_model(recipe):
    model = re.sub(r"-(lora(-24gb)?|full)$", "", recipe)
    assert model in presets()
    read = load_config(["--model", model, "--recipe", recipe])
    assert (read.lora.rank > 0) == ("-lora" in recipe)


CLIPS = {
    "opensoraplan-1.2": (93, 480, 640),
    "opensoraplan-1.2-29x480p": (29, 480, 640),
    "opensoraplan-1.2-93x720p": (93, 720, 1280),
    "opensoraplan-1.2-29x720p": (29, 720, 1280),
}


@pytest.mark.parametrize("model", CLIPS)
def test_recipes_of_open_sora_plan_have_the_numbers_of_the_guide(model):
    read = load_config(["--model", model, "--data.manifest", "data.txt"])
    optim, geometry = read.optim, read.data.geometry
    assert (optim.lr, optim.schedule, optim.warmup, optim.weight_decay) == (1e-4, "constant", 0, 1e-2)
    assert (optim.betas, optim.eps, optim.clip, optim.ema) == ((0.9, 0.999), 1e-8, 1.0, 0.999)
    assert (read.data.text_dropout, read.data.global_batch, read.memory.recompute) == (0.1, 8, "full")
    assert (geometry.num_frames, geometry.max_height, geometry.max_width) == CLIPS[model]
    assert (geometry.min_frames, geometry.fps) == (geometry.num_frames, 24)
    config = preset(model)
    assert config.sample_size == ((geometry.num_frames - 1) // 4 + 1, geometry.max_height // 8, geometry.max_width // 8)


def test_the_geometry_of_a_recipe_is_for_videos(tmp_path, capsys):
    """Also in extraction; features have one already."""
    model = ["--model", "opensoraplan-1.2-29x720p"]
    (tmp_path / "mine.toml").write_text('[data]\nfeatures = "features"\n')
    for features in (["--data.features", "features"], ["--config", str(tmp_path / "mine.toml")]):
        assert load_config([*model, *features]).data.geometry == Geometry()
        given = load_config([*model, *features, "--data.features", "null", "--data.manifest", "m"]).data
        assert (given.features, given.geometry.num_frames) == (None, 29)  # videos after all
    for flags, frames in (([], 29), (["--geometry.num_frames", "1", "--geometry.min_frames", "1"], 1)):
        with pytest.raises(SystemExit) as stop:
            extract.main([*model, *flags, "--print_config"])
        assert stop.value.code == 0
        geometry = tomllib.loads(capsys.readouterr().out)["geometry"]
        assert (geometry["num_frames"], geometry["max_width"], geometry["fps"]) == (frames, 1280, 24)


def test_recipe_below_file_below_flags(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('model = "wan2.1-t2v-1.3b"\n[optim]\nlr = 2e-5\nclip = 0.5\n')
    read = load_config(["--config", str(mine), "--optim.clip", "0.25"])
    assert (read.optim.lr, read.optim.clip, read.memory.recompute) == (2e-5, 0.25, 20)


def test_the_recipe_is_that_of_the_model_whatever_file_names_it(tmp_path):
    (tmp_path / "a.toml").write_text('model = "wan2.1-t2v-1.3b"\n')
    (tmp_path / "b.toml").write_text("[optim]\nlr = 3e-5\n")
    for order in (("a", "b"), ("b", "a")):
        argv = [word for name in order for word in ("--config", str(tmp_path / f"{name}.toml"))]
        read = load_config(argv)
        assert (read.memory.recompute, read.optim.lr) == (20, 3e-5)
    assert load_config([*argv, "--recipe=wan2.1-t2v-1.3b-lora"]).lora.rank == 16


@pytest.mark.parametrize("text", ["steps = ", 'model = "a"\nmodel = "b"', "\x00"])
def test_a_broken_file_is_named(tmp_path, text, capsys):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        load_config(["--config", str(tmp_path / "c.toml")])
    assert stop.value.code == 2
    assert "c.toml" in capsys.readouterr().err


def test_a_typo_is_refused_with_the_nearest_name(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--model", "wan-tiny", "--optim.leraning_rate", "1"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        load_config(["--model", "wan-tiny", "--data.global_bach", "1"])
    assert "data.global_batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "wan2.1-t2v-13b"), "wan2.1-t2v-1.3b"),
        (("--weights", ""), "--weights random"),
        (("--weights", "nowhere/at/all"), "does not exist"),
        (("--data.features", "nowhere"), "mm_train.extract"),
        (("--steps", "0"), "at least 1"),
        (("--objective.range", "[0.5, 0.5]"), "low < high"),
        (("--data.text_dropout", "1.5"), "at least 0, less than 1"),
        (("--optim.warmup", "4"), "whole run"),
        (("--sample.prompts", '["a cat"]'), "--sample.encoders"),
        (("--sample.prompts", '["a cat"]', "--sample.encoders", "ENCODERS", "--sample.frames", "80"), "77 and 81"),
        (("--sample.prompts", '["a cat"]', "--sample.encoders", "ENCODERS", "--sample.height", "470"), "464 and 480"),
        (("--sample.prompts", '["a cat"]', "--sample.sampler", "ddim"), "--sample.sampler 'ddim' does not fit"),
        (("--sample.prompts", '["a cat"]', "--sample.prompt_template", "best"), "--sample.prompt_template 'best'"),
        (("--objective.snr_gamma", "5"), "--objective.snr_gamma 5.0: wan-tiny is trained otherwise"),
        (("--objective.noise_offset", "-1"), "at least 0"),
        (("--objective.logit_std", "1.5"), "--objective.logit_std 1.5 is for --objective.sampling logit_normal"),
        (("--objective.shift_by", "sqrt"), "--objective.shift_tokens None with --objective.shift_by sqrt: sqrt needs"),
        (("--objective.shift_by", "flux", "--objective.shift", "5"), "which has its own"),
        (("--validation.timesteps", "[1000]"), "more than 0, less than 1000"),
        (("--validation.max_samples", "0"), "at least 1"),
        (("--optim.clip", "-1"), "at least 0"),
        (("--optim.betas", "[0.9, 1.0]"), "at least 0, less than 1"),
        (("--optim.warmup", "-5"), "at least 0"),
        (("--checkpoint.keep", "-1"), "at least 0"),
        (("--lora.alpha", "0"), "more than 0"),
        (("--optim.min_lr", "0.5", "--optim.schedule", "cosine"), "--optim.min_lr 0.5 is more than --optim.lr"),
        (("--optim.min_lr", "1e-6"), "--optim.schedule is constant"),
        (("--architecture", '{"eps": "x"}'), "--architecture: eps is 'x'; it takes a number"),
        (("--architecture", '{"vace_layers": 5}'), "--architecture: vace_layers is 5; it takes a list"),
        (("--architecture", '{"num_layers": 4'), "--architecture is"),
        (("--sample.steps", "0"), "at least 1"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(features, encoders, tmp_path, flags, message, capsys):
    flags = [str(encoders) if flag == "ENCODERS" else flag for flag in flags]
    with pytest.raises((ValueError, SystemExit)) as stop:
        check(config(features, tmp_path / "run", *flags))
    said = capsys.readouterr().err if stop.value.args == (2,) else str(stop.value)
    assert message in said


@pytest.mark.parametrize(
    ("model", "flags", "expected"),
    [
        ("wan2.1-t2v-1.3b", (), (480, 832, 81, 16, 50, 5.0, 3.0, "unipc")),
        ("wan2.1-t2v-14b", (), (720, 1280, 81, 16, 50, 5.0, 5.0, "unipc")),
        (
            "wan2.1-t2v-14b",
            ("--sample.height", "480", "--sample.width", "832"),
            (480, 832, 81, 16, 50, 5.0, 3.0, "unipc"),
        ),
        ("vace-1.3b", ("--sample.sampler", "euler"), (480, 832, 81, 16, 50, 5.0, 16, "euler")),
        ("opensoraplan-1.2", (), (480, 640, 93, 24, 100, 7.5, None, "euler_ancestral")),
        (
            "opensoraplan-1.2",  # for a run that trains it on another length
            ("--architecture", '{"sample_size": [5, 30, 40]}', "--sample.sampler", "pndm", "--sample.steps", "50"),
            (240, 320, 17, 24, 50, 7.5, None, "pndm"),
        ),
        ("wan2.2-ti2v-5b", ("--sample.steps", "4", "--sample.fps", "12"), (704, 1280, 121, 12, 4, 5.0, 5, "unipc")),
    ],
)
def test_sample_videos_are_as_the_model_was_published(tmp_path, model, flags, expected):
    s = settle_samples(load_config(["--model", model, *flags]))
    assert (s.height, s.width, s.frames, s.fps, s.steps, s.guidance, s.flow_shift, s.sampler) == expected
    assert s.negative_prompt == find(model)[1].published.negative_prompt
    assert s.prompt_template == find(model)[1].published.prompt_template
    assert settle_samples(load_config(["--model", model, "--sample.negative_prompt", ""])).negative_prompt == ""


def test_global_batch_has_to_divide(features, tmp_path):
    read = config(features, tmp_path / "run", "--data.global_batch", "10", "--data.micro_batch", "3")
    with pytest.raises(ValueError, match=r"multiple of 6.*6 or 12"):
        read.micro_batches(2)
    assert config(features, tmp_path / "run", "--data.global_batch", "12").micro_batches(2) == 3


def test_learning_rate():
    cosine = OptimConfig(lr=1.0, min_lr=0.1, schedule="cosine", warmup=4)
    rates = [learning_rate(step, 12, cosine) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.55)
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    linear = OptimConfig(lr=1.0, schedule="linear")
    assert [learning_rate(step, 4, linear) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(10**6, 10, OptimConfig(lr=3.0)) == 3.0


def test_biases_and_vectors_are_not_decayed():
    model = build("wan-tiny", **SMALL)
    groups = build_optimizer(model, OptimConfig(weight_decay=0.5)).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    by_name = dict(model.named_parameters())
    assert id(by_name["blocks.0.ffn.0.weight"]) in decayed
    assert id(by_name["blocks.0.ffn.0.bias"]) not in decayed
    assert id(by_name["blocks.0.self_attn.norm_q.weight"]) not in decayed
    assert sum(len(g["params"]) for g in groups) == len(by_name)


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_a_step_that_is_not_finite_changes_nothing(kernel):
    torch.manual_seed(0)
    plain, model = (torch.nn.Linear(3, 2) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    optimizers = [build_optimizer(each, OptimConfig(lr=0.1, kernel=kernel)) for each in (plain, model)]
    for finite in (False, True, False, False, True, True):
        for each in (plain, model):
            torch.manual_seed(7)
            each(torch.randn(4, 3)).square().sum().backward()
        if finite:
            optimizers[0].step()
        else:
            model.weight.grad[0, 0] = math.nan
        step_if(optimizers[1], torch.tensor(finite))
        for optimizer in optimizers:
            optimizer.zero_grad()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys() == {0, 1}
    for place, state in states[0].items():
        assert state["step"] == 3
        for name, value in state.items():
            assert torch.equal(value, states[1][place][name])


def test_average_follows_its_closed_form_and_is_swapped_back():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = EMA(model, 0.5)
    for step, value in enumerate((2.0, 3.0, 4.0)):
        model.weight.data.fill_(value)
        ema.update(step)
    # decays min(0.5, (1 + step) / (10 + step)) = 0.1, 2/11, 3/12
    expected = ((1.0 * 0.1 + 2.0 * 0.9) * 2 / 11 + 3.0 * 9 / 11) * 0.25 + 4.0 * 0.75
    with ema.apply():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 4.0


def objective(**schedule) -> Diffusion:
    return Diffusion(FlowMatching(**schedule), Conditioning(WanConfig(**SMALL), "t2v"))


def test_draws_belong_to_the_sample_not_to_its_place(features):
    """The same (sample, epoch) has the same timestep and noise in any batch, on any rank."""
    data, seen = FeatureDataset(features), {}
    for ranks, micro in ((1, 4), (2, 1), (4, 1)):
        for rank in range(ranks):
            loader = build_loader(
                data, global_batch=4, micro_batch=micro, dp_rank=rank, dp_size=ranks, seed=3, num_workers=0
            )
            for _, step in zip(range(6), loader, strict=False):
                batches = MicroBatches(step, objective(), seed=3, device=torch.device("cpu"))
                for number, batch in enumerate(step.micro):
                    given = batches.inputs(number)
                    for i, key in enumerate(zip(batch.ids, batch.epochs, strict=True)):
                        found = seen.setdefault(key, (given["t"][i], given["video"][i]))
                        assert torch.equal(found[0], given["t"][i])
                        assert torch.equal(found[1], given["video"][i])
    assert len({float(t) for t, _ in seen.values()}) > 10


@pytest.mark.parametrize(
    "how",
    [{"sampling": "logit_normal", "logit": (0.5, 1.0)}, {"shift_by": "sqrt", "shift_tokens": 24, "patch": 4}],
)
def test_draws_of_other_densities_belong_to_the_sample_too(features, how):
    data, seen = FeatureDataset(features), {}
    for micro in (4, 1):
        loader = build_loader(data, global_batch=4, micro_batch=micro, seed=3, num_workers=0)
        for _, step in zip(range(4), loader, strict=False):
            batches = MicroBatches(step, objective(**how), seed=3, device=torch.device("cpu"))
            for number, batch in enumerate(step.micro):
                times = batches.inputs(number)["t"]
                for i, key in enumerate(zip(batch.ids, batch.epochs, strict=True)):
                    assert seen.setdefault(key, times[i].item()) == times[i].item()
    assert len(set(seen.values())) > 10


def test_index_range_of_an_expert(features):
    step = next(iter(build_loader(FeatureDataset(features), global_batch=8, micro_batch=8, num_workers=0)))
    flow = FlowMatching(range=(0.0, 0.1))
    given = MicroBatches(step, objective(range=(0.0, 0.1)), seed=0, device=torch.device("cpu")).inputs(0)
    assert given["t"].min() >= flow.timesteps[99]


def save(directory: Path, steps: list[int], keep: int) -> Checkpointer:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = Checkpointer(directory, keep)
    for step in steps:
        saver.save(step, model, optimizer, EMA(model, 0), {"step": step}, "")
    saver.wait()
    return saver


def test_only_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    saver = save(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert saver.latest() == tmp_path / "step-00000004"


def test_what_a_killed_save_left_is_removed_and_never_loaded(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, [1], keep=0)
    (folder / ".step-00000002").mkdir()
    (folder / ".step-00000002/__0_0.distcp").write_bytes(b"half")
    assert Checkpointer(folder, 0).latest().name == "step-00000001"
    with claim_output(tmp_path):
        assert not (folder / ".step-00000002").exists()


def test_latest_that_names_nothing_is_an_error(tmp_path):
    save(tmp_path, [1], keep=0)
    (tmp_path / "latest").write_text("step-00000009")
    with pytest.raises(FileNotFoundError, match="step-00000001"):
        checkpoints.latest(tmp_path)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    saver = save(tmp_path, [1], keep=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", full)
    model = torch.nn.Linear(2, 2)
    saver.save(2, model, torch.optim.AdamW(model.parameters()), EMA(model, 0), {"step": 2}, "")
    with pytest.raises(OSError, match=r"No space left.*step-00000001"):
        saver.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_metrics_of_repeated_steps_stand_once(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    metrics = Metrics(tmp_path, leader=True, steps=3, start=1)
    metrics.step({"step": 2, "loss": 0.5, "lr": 0.1, "grad_norm": 1.0}, "fast")
    metrics.close()
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1.0, 0.5]
    assert capsys.readouterr().err == "step 2/3 | loss 0.5000 | lr 1.00e-01 | grad 1.000 | fast\n"


def test_metrics_are_json_also_where_a_number_is_none(tmp_path):
    metrics = Metrics(tmp_path, leader=True, steps=1, start=0)
    metrics.step({"step": 1, "loss": 0.5, "lr": 0.1, "grad_norm": float("inf")}, "")
    metrics.event({"step": 1, "validation_loss": float("nan")})
    metrics.close()
    refuse = {"parse_constant": lambda word: pytest.fail(word)}
    rows = [json.loads(line, **refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (rows[0]["grad_norm"], rows[1]["validation_loss"]) == (None, None)


def test_a_refused_run_leaves_no_empty_folder(tmp_path):
    def claim(path: Path, *, write: bool = False) -> None:
        with claim_output(path):
            if write:
                (path / "failures.jsonl").touch()
            raise ValueError("refused")

    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "a" / "b", tmp_path / "mine"):
        with pytest.raises(ValueError, match="refused"):
            claim(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]  # which was there before
    with pytest.raises(ValueError, match="refused"):
        claim(tmp_path / "c", write=True)
    assert (tmp_path / "c" / "failures.jsonl").exists()


def test_metrics_on_a_full_disk_name_the_file(tmp_path):
    """Here a file may not grow any more."""
    metrics = Metrics(tmp_path, leader=True, steps=3, start=0)
    metrics.board.close()
    row, before = {"step": 1, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        for write in (lambda: metrics.step(row, ""), metrics.close):
            with pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_help_and_errors_of_the_command(features, tmp_path):
    command = [sys.executable, "-m", "mm_train"]
    assert "--optim.lr" in subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    wrong = subprocess.run(
        [*command, *arguments(features, tmp_path / "r", "--weights", "nope")], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --weights nope does not exist")


TRAIN, EXTRACT, EXPORT = "mm_train.__main__", "mm_train.extract", "mm_train.export"


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (TRAIN, "--model vace-14b", "no starting weights"),
        (TRAIN, "--model vace-15b", "did you mean 'vace-14b'"),
        (TRAIN, "--model wan-tiny --weights no/where", "does not exist"),
        (TRAIN, "--model wan-tiny --weights random --data.features no/where", "is not a directory"),
        (EXTRACT, "--model vace-15b --encoders . --output x --data.manifest y", "did you mean 'vace-14b'"),
        (EXTRACT, "--model vace-14b --encoders . --output x --data.manifest y", "is not a file"),
        (EXPORT, "no/where --output x", "does not exist"),
        (
            TRAIN,
            "--model wan-tiny --weights random --data.features . --parallel.tp 5",
            "ranks cannot be laid out as tp=5",
        ),
        (TRAIN, "--model wan-tiny --recipe wan2.1-t2v-1.3b-lore", "did you mean 'wan2.1-t2v-1.3b-lora'"),
    ],
)
def test_what_needs_no_torch_is_refused_without_it(module, flags, message):
    """In a fresh process, as a user's: torch alone takes seconds to import."""
    code = f"""if True:
        import contextlib, sys
        from {module} import main
        with contextlib.suppress(SystemExit):
            main({flags.split()!r})
        sys.exit("torch was imported" if "torch" in sys.modules else 0)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert message in done.stderr
    assert done.returncode == 0, done.stderr


def test_every_check_has_a_name_of_its_own():
    names = [one.name for one in CHECKS]
    assert len(set(names)) == len(names)
    assert {one.when for one in CHECKS} == {"at once", "with torch", "when asked"}


def test_a_file_from_windows_selects_its_recipe_and_is_read(tmp_path):
    (tmp_path / "my.toml").write_text('model = "wan2.1-t2v-1.3b"\n[optim]\nlr = 2e-5\n', encoding="utf-8-sig")
    (tmp_path / "my.yaml").write_text("model: wan2.1-t2v-1.3b\noptim:\n  lr: 2e-5\n", encoding="utf-8-sig")
    for name in ("my.toml", "my.yaml"):
        read = load_config(["--config", str(tmp_path / name)])
        assert (read.memory.recompute, read.optim.lr) == (20, 2e-5)


def test_a_configuration_is_read_as_it_was_written(tmp_path):
    written = load_config(
        ["--model", "wan2.1-t2v-1.3b", "--sample.prompts", '["null", "#1", "~"]', "--trained", "[a*]"]
    )
    (tmp_path / "config.toml").write_text(dump(written), encoding="utf-8")
    assert read_config(Config, tmp_path / "config.toml") == written
    (tmp_path / "config.toml").write_text(dump(written).replace("seed = 42", 'seed = "x"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.toml: seed is 'x'; it takes a whole number"):
        read_config(Config, tmp_path / "config.toml")
