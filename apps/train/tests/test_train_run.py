"""Whole runs: resume, layouts, numbers that are not, adapters."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from mm_convert import open_checkpoint, open_lora
from mm_convert.cli import main as mm_convert
from mm_convert.lora.base import describe_content
from mm_parallel.testing import spawn
from mm_train import interrupt as interrupt_module
from mm_train.adapter import check_targets, open_adapter
from mm_train.export import export
from mm_train.interrupt import Interrupt
from mm_train.start import Start, outline
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import SMALL, arguments, as_torchrun, config, losses, rows, state, write_features


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "store")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ranks_train(rank: int, world: int, argv: list[str]) -> None:
    from mm_train.recipe import load_config

    as_torchrun(rank, world)
    train(load_config(argv))


EXTRAS = ("--optim.ema", "0.9", "--data.text_dropout", "0.2", "--checkpoint.every", "5")


def test_killed_and_continued_equals_undisturbed_bit_for_bit(features, tmp_path):
    argv = arguments(features, tmp_path / "killed", "--steps", "100000", *EXTRAS)
    process = subprocess.Popen([sys.executable, "-m", "mm_train", *argv], stderr=subprocess.PIPE, text=True)
    latest = tmp_path / "killed/checkpoints/latest"
    for _ in process.stderr:  # a line per step
        if latest.exists():
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    at = int(latest.read_text().removeprefix("step-"))
    end = at + 5
    assert rows(tmp_path / "killed")[-1]["step"] > at  # steps are lost, and will be repeated

    train(config(features, tmp_path / "killed", "--steps", str(end), *EXTRAS))
    train(config(features, tmp_path / "straight", "--steps", str(end), *EXTRAS))
    a, b = (state(tmp_path / name / f"checkpoints/step-{end:08d}") for name in ("straight", "killed"))
    assert any("exp_avg" in name for name in a)
    assert any(name.startswith("ema.") for name in a)
    assert equal(a, b)
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, end + 1))


@pytest.mark.parametrize(
    "options", [(), ("--parallel.dp_replicate", "2"), ("--dtype", "bfloat16", "--memory.recompute", "full")]
)
def test_two_ranks_give_the_same_curve_as_one(features, tmp_path, options):
    """…with FSDP, HSDP and recompute; and the second half on another number of ranks than the first."""
    one = ["--checkpoint.every", "2", "--validation.features", str(features), "--validation.every", "2", *options]
    more = list(one)
    if "--parallel.dp_replicate" in options:
        one[-1] = "1"
    train(config(features, tmp_path / "one", *one))
    first = arguments(features, tmp_path / "two", *more, "--data.micro_batch", "1")
    spawn(2, ranks_train, [*first, "--steps", "2"], timeout=120)
    train(config(features, tmp_path / "two", *one))  # continues on one rank
    tolerance = 2e-3 if "bfloat16" in options else 1e-5
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    validation = [[r["validation_loss"] for r in rows(tmp_path / n) if "validation_loss" in r] for n in ("one", "two")]
    assert validation[0] == pytest.approx(validation[1], rel=tolerance)


def test_compiled_layers_give_the_same_curve_and_a_step_that_compiled_says_so(features, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    train(config(features, tmp_path / "plain"))
    capfd.readouterr()
    train(config(features, tmp_path / "compiled", "--compile", "true"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    first, *others = [row.get("compiled_graphs", 0) for row in rows(tmp_path / "compiled")]
    assert first > 0
    assert others == [0, 0, 0]
    said = capfd.readouterr().err
    assert "compile    each layer" in said
    assert said.count(f"| {first} graphs compiled meanwhile") == 1
    for option, message in (
        (
            ("--parallel.exact", "true"),
            "--compile with --parallel.exact: compiled kernels sum in",
        ),
        (
            ("--parallel.schedule", "zero_bubble"),
            "--compile with --parallel.schedule zero_bubble: it splits",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(config(features, tmp_path / "refused", "--compile", "true", *option))


def test_micro_batches_do_not_change_the_numbers(features, tmp_path):
    for size in ("1", "4"):
        train(config(features, tmp_path / size, "--data.micro_batch", size, "--data.text_dropout", "0.3"))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-5)
    assert len(set(losses(tmp_path / "1"))) == 4


def test_shapes_too_small_for_a_step_are_said_and_repeated_or_left_out_as_asked(features, tmp_path, capfd):
    six = ("--data.global_batch", "6")  # of one shape there are 5 samples, of the other 9
    train(config(features, tmp_path / "repeat", *six))
    said = capfd.readouterr().err
    assert "1 of 2 buckets has fewer samples than a step takes (6): its 5 samples of 14 are repeated" in said
    assert "--data.small_buckets drop leaves them out; --data.global_batch 5 is small enough" in said
    train(config(features, tmp_path / "drop", *six, "--data.small_buckets", "drop"))
    assert "its 5 samples of 14 are left out" in capfd.readouterr().err
    assert losses(tmp_path / "drop") != losses(tmp_path / "repeat")
    train(config(features, tmp_path / "four"))
    assert "buckets" not in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"data\.small_buckets drop, this command says repeat"):
        train(config(features, tmp_path / "drop", *six, "--steps", "5"))
    with pytest.raises(ValueError, match=r"no bucket is left.*the largest has 9"):
        train(config(features, tmp_path / "none", "--data.global_batch", "10", "--data.small_buckets", "drop"))


def test_a_loss_that_is_not_a_number_stops_with_the_sample_named(tmp_path):
    features = write_features(tmp_path / "features", count=4, poison="clip2.mp4")
    with pytest.raises(FloatingPointError, match=r"samples: clip2\.mp4") as error:
        train(config(features, tmp_path / "run", "--data.global_batch", "2", "--data.micro_batch", "1", "--steps", "9"))
    saved = state(next((tmp_path / "run/checkpoints").glob("step-*")))
    assert all(torch.isfinite(t).all() for t in saved.values())
    assert "skip" in str(error.value)


def test_a_first_step_that_is_not_finite_leaves_a_run_that_can_be_started(tmp_path):
    features = write_features(tmp_path / "features", count=2, poison="clip1.mp4")
    argv = ("--data.global_batch", "2", "--data.micro_batch", "1", "--optim.ema", "0.5")
    for _ in range(4):
        with pytest.raises(FloatingPointError):
            train(config(features, tmp_path / "run", *argv))


def test_it_can_be_skipped_and_counted(tmp_path, capfd):
    features = write_features(tmp_path / "features", count=6, poison="clip2.mp4")
    argv = ("--data.global_batch", "2", "--data.micro_batch", "1", "--steps", "5", "--on_nonfinite", "skip")
    train(config(features, tmp_path / "run", *argv))
    assert "clip2.mp4. Skipped" in capfd.readouterr().err
    done = rows(tmp_path / "run")
    assert [row["step"] for row in done] == [1, 2, 3, 4, 5]
    assert done[-1]["samples"] > 5 * 2  # the skipped samples were consumed all the same


def test_adapters_train_and_the_base_stays(features, tmp_path):
    train(config(features, tmp_path / "base", "--steps", "1"))
    base = str(tmp_path / "base/weights")
    lora = (
        "--weights",
        base,
        "--lora.rank",
        "2",
        "--lora.alpha",
        "4",
        "--lora.dropout",
        "0.1",
        "--lora.targets",
        '["q","ffn.0"]',
    )
    found = train(config(features, tmp_path / "lora", *lora))
    saved = state(tmp_path / "lora/checkpoints/step-00000004")
    assert all(".lora_" in name for name in saved if name.startswith("model."))
    assert len([name for name in saved if name.startswith("model.")]) == 2 * 2 * 3  # layers x (A, B) x (two q, ffn.0)
    assert any(saved[name].abs().max() > 0 for name in saved if "lora_B" in name and name.startswith("model."))
    assert found.name == "adapter"
    train(config(features, tmp_path / "other", "--steps", "1", "--seed", "7"))
    with pytest.raises(ValueError, match="weights"):  # the adapter would continue on another base
        train(config(features, tmp_path / "lora", *lora[2:], "--weights", str(tmp_path / "other/weights")))
    settings = json.loads((found / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (2, 4.0, "weights")
    train(config(features, tmp_path / "lora", *lora, "--steps", "5"))  # continues, and replaces the adapter
    with pytest.raises(ValueError, match="overwrite"):
        export(tmp_path / "lora", found)


BF16 = ("--dtype", "bfloat16")


def test_a_run_goes_on_from_an_adapter(features, tmp_path):
    train(config(features, tmp_path / "base", "--steps", "1"))
    lora = ("--weights", str(tmp_path / "base/weights"), "--lora.targets", '["q","ffn.0"]')
    first = train(config(features, tmp_path / "first", *lora, "--lora.rank", "2", "--lora.alpha", "4"))
    mm_convert(["convert", str(first), str(tmp_path / "kohya.safetensors"), "--to", "comfyui"])
    lora += ("--lora.weights", str(tmp_path / "kohya.safetensors"), "--lora.rank", "2")
    still = ("--lora.alpha", "4", "--optim.lr", "1e-30", "--optim.weight_decay", "0", "--steps", "1")
    found = train(config(features, tmp_path / "still", *lora, *still))
    before, after = open_lora(first), open_lora(found)
    assert (after.rank, after.alpha) == (2, 4)
    mm_convert(["convert", str(tmp_path / "base/weights"), str(tmp_path / "bf16"), "--to", "diffusers", *BF16])
    known = describe_content(open_checkpoint(tmp_path / "bf16").tensors, before.modules)
    facts = {"family": "wan", "model": "wan-tiny", "prediction": "flow", **known}
    assert open_lora(tmp_path / "kohya.safetensors").trained_on == before.trained_on == after.trained_on == facts
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = train(config(features, tmp_path / "fresh", *lora[:4], "--lora.rank", "2", *still))
    assert all(open_lora(fresh)[name].abs().max() < 1e-20 for name in before if "lora_B" in name)
    assert rows(tmp_path / "still")[0]["loss"] != rows(tmp_path / "fresh")[0]["loss"]

    for more, message in (
        ((), r"trained with alpha 4: give --lora.rank 2 --lora.alpha 4"),
        (("--lora.alpha", "4", "--lora.rank", "4"), r"trained with rank 2: give --lora.rank 2 --lora.alpha 4"),
        (("--lora.alpha", "4", "--lora.targets", '["q"]'), r"give --lora.targets '\[\"cross_attn.q\", \"ffn.0\", "),
    ):
        with pytest.raises(ValueError, match=message):
            train(config(features, tmp_path / "refused", *lora, *more))
    shapes = {name: (8, 8) for name in open_lora(first).modules}
    with pytest.raises(ValueError, match=r"for another model: its blocks.0.* here it is \[8, 8\]"):
        check_targets(open_lora(first), shapes, shapes)
    other = train(config(features, tmp_path / "other", "--steps", "1", "--seed", "7"))
    chosen = config(features, tmp_path / "elsewhere", "--weights", str(other), *lora[2:], "--lora.alpha", "4")
    (said,) = Start(outline(chosen), chosen, open_adapter(chosen)).other_base
    assert "trained on other weights (wan-tiny)" in said
    with pytest.raises(ValueError, match=r"lora.weights"):  # it would not be taken: the run has its own by now
        train(config(features, tmp_path / "fresh", *lora, *still, "--steps", "2"))


def test_the_kernel_of_attention_is_named_and_one_that_cannot_run_is_refused(features, tmp_path, capsys):
    train(config(features, tmp_path / "named", "--attention", "math", "--steps", "1"))
    assert "attention  math\n" in capsys.readouterr().err
    train(config(features, tmp_path / "auto", "--steps", "1"))
    assert "attention  cpu\n" in capsys.readouterr().err
    named, auto = (rows(tmp_path / run)[0]["loss"] for run in ("named", "auto"))
    assert named == pytest.approx(auto, rel=1e-5)
    for name, why in (("flash", "it is for CUDA, not for cpu"), ("flash4", r"cannot be loaded \(pip install --pre")):
        with pytest.raises(ValueError, match=why):
            train(config(features, tmp_path / "refused", "--attention", name))
    with pytest.raises(ValueError, match=r"parallel\.exact has an order of its own"):
        train(config(features, tmp_path / "exact", "--attention", "math", "--parallel.exact", "true"))
    assert not (tmp_path / "refused").exists()


def test_an_adapter_with_ranks_by_module_is_not_gone_on_from(features, tmp_path):
    train(config(features, tmp_path / "base", "--steps", "1"))
    names = {"blocks.0.self_attn.q": 2, "blocks.0.self_attn.k": 1}
    width = open_checkpoint(tmp_path / "base/weights").config["dim"]
    tensors = {f"diffusion_model.{n}.lora_A.weight": torch.ones(rank, width) for n, rank in names.items()}
    tensors |= {f"diffusion_model.{n}.lora_B.weight": torch.ones(width, rank) for n, rank in names.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    lora = ("--weights", str(tmp_path / "base/weights"), "--lora.rank", "2", "--lora.weights")
    with pytest.raises(ValueError, match=r"ranks by module.*mm-convert convert .*base/weights TARGET --lora .*a.safe"):
        train(config(features, tmp_path / "run", *lora, str(tmp_path / "a.safetensors")))
    with pytest.raises(ValueError, match=r"--lora.weights .*nowhere does not exist"):
        train(config(features, tmp_path / "run", *lora, str(tmp_path / "nowhere")))


def test_a_checkpoint_continues_only_the_same_run(features, tmp_path, capfd):
    train(config(features, tmp_path / "run", "--steps", "1"))
    for change in (("--seed", "1"), ("--data.global_batch", "8"), ("--optim.ema", "0.9")):
        with pytest.raises(ValueError, match=r"new --output"):
            train(config(features, tmp_path / "run", "--steps", "2", *change))
    with pytest.raises(ValueError, match="resume is never"):
        train(config(features, tmp_path / "run", "--checkpoint.resume", "never"))
    other = write_features(tmp_path / "other", count=9)
    with pytest.raises(ValueError, match="have changed"):
        train(config(other, tmp_path / "run", "--steps", "2"))
    train(config(features, tmp_path / "run", "--steps", "2", "--optim.lr", "1e-4"))  # a choice, not part of the stream
    assert "optim.lr 0.01 -> 0.0001" in capfd.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    with pytest.raises(ValueError, match="past --steps 1"):
        train(config(features, tmp_path / "run", "--steps", "1"))
    train(config(features, tmp_path / "run", "--steps", "2"))
    assert "all 2 steps were done already" in capfd.readouterr().err
    newest = next((tmp_path / "run/checkpoints/step-00000002").glob("*.distcp"))
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read .* step-00000001; .*latest"):
        train(config(features, tmp_path / "run", "--steps", "3"))


def test_what_is_changed_on_continuing_is_used(features, tmp_path):
    train(config(features, tmp_path / "run", "--steps", "1"))
    train(config(features, tmp_path / "run", "--steps", "2", "--optim.weight_decay", "0.5", "--optim.eps", "1e-6"))
    saved = dcp.FileSystemReader(tmp_path / "run/checkpoints/step-00000002").read_metadata().state_dict_metadata
    values = {name: None for name in saved if name.endswith((".weight_decay", ".eps"))}
    dcp.load(values, checkpoint_id=tmp_path / "run/checkpoints/step-00000002", no_dist=True)
    assert {v for name, v in values.items() if name.endswith(".eps")} == {1e-6}
    assert {v for name, v in values.items() if name.endswith(".weight_decay")} == {0.0, 0.5}


def test_a_run_taken_back_to_an_earlier_step_replaces_what_came_after(features, tmp_path):
    options = ("--checkpoint.every", "1", "--checkpoint.keep", "2")
    train(config(features, tmp_path / "run", "--steps", "3", *options))
    checkpoints = tmp_path / "run/checkpoints"
    before = state(checkpoints / "step-00000003")
    (checkpoints / "latest").write_text("step-00000002")
    train(config(features, tmp_path / "run", "--steps", "3", *options))
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert equal(before, state(checkpoints / "step-00000003"))


def test_weights_that_only_look_right_are_refused(features, tmp_path):
    weights = train(config(features, tmp_path / "run", "--steps", "1"))
    heads = json.dumps(SMALL | {"num_heads": 4})
    with pytest.raises(ValueError, match=r"num_heads 2 \(asked for: 4\)"):  # the same shapes, another function
        train(config(features, tmp_path / "a", "--weights", str(weights), "--architecture", heads))
    layers = json.dumps(SMALL | {"num_layers": 3})
    with pytest.raises(ValueError, match=r"num_layers 2 \(asked for: 3\)"):
        train(config(features, tmp_path / "b", "--weights", str(weights), "--architecture", layers))
    with pytest.raises(ValueError, match="run/weights when it has finished"):
        train(config(features, tmp_path / "c", "--weights", str(tmp_path / "run")))
    file = next(weights.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["head.head.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"head\.head\.weight holds numbers that are not finite"):
        train(config(features, tmp_path / "d", "--weights", str(weights)))


def test_an_output_that_cannot_be_written_is_said_first(features, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        train(config(features, tmp_path / "file/run"))


def test_exported_weights_start_another_run(features, tmp_path):
    weights = train(config(features, tmp_path / "first", "--optim.ema", "0.5"))
    assert (tmp_path / "first/weights-ema").is_dir()
    train(config(features, tmp_path / "second", "--weights", str(weights), "--steps", "1", "--optim.lr", "0"))
    first, second = (
        state(tmp_path / p) for p in ("first/checkpoints/step-00000004", "second/checkpoints/step-00000001")
    )
    names = [name for name in first if name.startswith("model.")]
    assert names
    assert all(torch.equal(first[name], second[name]) for name in names)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(("number", "launcher"), [(signal.SIGINT, []), (signal.SIGTERM, TORCHRUN)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(features, tmp_path, number, launcher):
    """Sent to every process, as terminals and batch systems do."""
    argv = arguments(features, tmp_path / "run", "--steps", "100000")
    command = [sys.executable, *launcher, "-m", "mm_train", *argv]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stderr:
        if line.startswith("step 2/"):
            os.killpg(process.pid, number)
            break
    rest = process.stderr.read()
    assert process.wait() == (1 if launcher else 130), rest
    assert "stopping after this step" in rest
    assert "the same command continues" in rest
    last = rows(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{last:08d}"


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch, capfd):
    """A terminal's Ctrl-C reaches torchrun and its ranks, and torchrun sends it to the ranks once more."""
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        monkeypatch.setattr(interrupt_module, "SAME", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("stopping after this step") == 1
