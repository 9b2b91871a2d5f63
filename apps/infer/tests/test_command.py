"""The command as it is typed: what it writes, what it says, and how it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file, save_file

import mm_infer
from mm_convert import convert, save_lora
from mm_convert.cli.arguments import parse
from mm_data import made_with
from mm_infer.__main__ import main
from mm_infer.checks import CHECKS, Asked
from mm_infer.config import Config
from mm_infer.lists import read_requests
from mm_infer.weights import Weights
from mm_models import build
from mm_models.lora import LoRAConfig, add_lora
from mm_models.wan.presets import NEGATIVE_PROMPT

SMALL = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "2"]
PROMPTS = ["a cat", "a dog", "a much longer prompt about a fox"]


@pytest.fixture
def asked(pipeline, tmp_path) -> list[str]:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff" + "\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return ["--weights", str(pipeline), "--prompt_file", str(file), *SMALL]


def test_the_videos_of_one_process(asked, pipeline, tmp_path, capsys):
    main([*asked, "--output", str(tmp_path / "out"), "--fps", "8"])
    assert len({file.read_bytes() for file in (tmp_path / "out").iterdir()}) == len(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        with av.open(str(tmp_path / "out" / f"video_{i}.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 8
        assert len(frames) == 9
        assert frames[0].shape == (32, 48, 3)
        expected = {
            "prompt": prompt,
            "negative_prompt": NEGATIVE_PROMPT,
            "height": 32,
            "width": 48,
            "frames": 9,
            "steps": 2,
            "guidance": 5.0,
            "flow_shift": 3.0,
            "sampler": "unipc",
            "grid": "guides",
            "prompt_template": "{}",
            "seed": 0,
            "fps": 8,
            "weights": str(pipeline),
            "dtype": "float32",
            "mm_infer": mm_infer.__version__,
        }
        assert expected.items() <= made_with(tmp_path / "out" / f"video_{i}.mp4").items()
    said = capsys.readouterr().out
    assert "out/video_2.mp4" in said
    assert "video_0.mp4 (1/3): step 2 of 2" in said
    assert "denoise" in said.splitlines()[-1]
    assert said.splitlines()[0] == "attention: cpu"


def test_from_a_shell_neither_ranks_nor_order_change_a_video(asked, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "mm_infer", *asked, "--output", "two"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # two threads add up in another order
    done = subprocess.run(command, cwd=tmp_path, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 video(s)" in done.stdout
    assert "1 video(s)" in done.stdout

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (tmp_path / "reversed.txt").write_text("\n".join(reversed(PROMPTS)))
        main([*asked, "--prompt_file", str(tmp_path / "reversed.txt"), "--output", str(tmp_path / "one")])
    finally:
        torch.set_num_threads(threads)
    for i, prompt in enumerate(PROMPTS):
        video = tmp_path / "two" / f"video_{i}.mp4"
        assert made_with(video)["prompt"] == prompt
        assert video.read_bytes() == (tmp_path / "one" / f"video_{2 - i}.mp4").read_bytes()


def test_videos_are_not_replaced_unasked(asked, pipeline, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "video_1.mp4").write_text("precious")
    refused([*asked, "--output", str(tmp_path / "out")], capsys, "video_1.mp4 is already there", "--overwrite true")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["video_1.mp4"]
    main([*asked, "--output", str(tmp_path / "out"), "--overwrite", "true"])
    assert made_with(tmp_path / "out" / "video_1.mp4")["prompt"] == PROMPTS[1]
    (tmp_path / "full" / "video_2.mp4").mkdir(parents=True)
    refused([*asked, "--output", str(tmp_path / "full"), "--overwrite", "true"], capsys, "video_2.mp4 is a folder")


def test_the_same_command_goes_on_where_it_was_stopped(asked, pipeline, tmp_path, capsys):
    weights = copy_of(pipeline, tmp_path / "W")
    asked += ["--weights", str(weights), "--output", str(tmp_path / "out")]
    videos = [tmp_path / "out" / f"video_{i}.mp4" for i in range(3)]
    main(asked)
    videos[1].unlink()
    before = [video.stat().st_mtime_ns for video in (videos[0], videos[2])]
    main(asked)
    said = capsys.readouterr().out
    assert f"{videos[0]}: kept, made by the same command" in said
    assert "1 video(s) in" in said
    assert made_with(videos[1])["prompt"] == PROMPTS[1]
    main(asked)
    assert [video.stat().st_mtime_ns for video in (videos[0], videos[2])] == before
    refused([*asked, "--steps", "3"], capsys, "video_0.mp4 is already there, and 2 more, made otherwise")
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:2], "a cow"]))
    refused(asked, capsys, "video_2.mp4 is already there, made otherwise")
    file = weights / "transformer" / "diffusion_pytorch_model.safetensors"
    change(file, time=videos[0].stat().st_mtime - 60)  # as `cp -p` of an old export over the new one
    refused(asked, capsys, "video_0.mp4 is already there, and 2 more")


def change(file: Path, time: float) -> None:
    """Other tensors in the place of a file's."""
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    os.utime(file, (time, time))


@pytest.mark.parametrize("kind", ["mindspeed", "dcp", "text_encoder", "lora"])
def test_a_video_of_other_contents_is_not_kept(asked, pipeline, tmp_path, capsys, kind):
    """Of the same names, sizes and times: what was made from other bytes is another video."""
    weights = copy_of(pipeline, tmp_path / "W")
    command = [*asked, "--output", str(tmp_path / "out"), "--steps", "1", "--weights", str(weights)]
    source = {"text_encoder": weights / "text_encoder", "lora": tmp_path / "lora"}.get(kind, weights / "transformer")
    if kind in ("mindspeed", "dcp"):
        command += ["--weights", str(tmp_path / "C"), "--encoders", str(weights)]
    if kind == "lora":
        model = add_lora(Weights(pipeline).load(torch.device("cpu"), torch.float32), LoRAConfig(rank=2))
        save_lora(source, model.state_dict(), 2.0)
        command += ["--lora", str(source)]

    def make() -> str:
        if kind in ("mindspeed", "dcp"):
            shutil.rmtree(tmp_path / "C", ignore_errors=True)
            convert(source, tmp_path / "C", kind)
            for file in (tmp_path / "C").rglob("*"):
                os.utime(file, (1.5e9, 1.5e9))
        main(command)
        return capsys.readouterr().out

    assert "kept" not in make()
    assert make().count("kept, made by the same command") == 3
    change(next(source.glob("*.safetensors")), time=1.5e9)
    with pytest.raises(SystemExit):
        make()
    assert "video_0.mp4 is already there, and 2 more, made otherwise" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_latents_that_are_not_finite_are_no_video(asked, pipeline, tmp_path, capsys, part):
    weights = copy_of(pipeline, tmp_path / "W")
    (file,) = (weights / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "ffn.net.2.weight" in name or "final_layer_norm" in name)
    tensors[name].fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    cause = "first blocks.0.ffn.2.weight" if part == "transformer" else "the text encoder"
    asked += ["--weights", str(weights), "--output", str(tmp_path / "out")]
    refused(asked, capsys, f"latents for {PROMPTS[0]!r} came out as NaN", cause, code=1)
    assert not list((tmp_path / "out").iterdir())


def test_a_video_too_large_for_the_memory_is_refused_by_its_size(asked, tmp_path, capsys):
    asked += ["--output", str(tmp_path / "out"), "--height", "16384", "--width", "16384", "--frames", "99997"]
    refused(asked, capsys, "not enough memory for 99997 frames of 16384x16384", code=1)


def test_prompt_files_are_cut_at_line_ends_only(asked, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a\u2028cat\r\na\x85dog\n".encode())
    config = Config(weights=Path("w"), output=Path("o"), prompt_file=file)
    assert [one.prompt for one in read_requests(config)] == ["a\u2028cat", "a\x85dog"]
    file.write_bytes(b"caf\xe9\n")
    refused([*asked, "--output", str(tmp_path / "out")], capsys, "prompts.txt is not UTF-8 text")


def test_a_prompt_file_without_a_line_is_named(asked, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    asked += ["--prompt_file", str(tmp_path / "empty.txt"), "--output", str(tmp_path / "out")]
    refused(asked, capsys, "empty.txt holds no lines")


def test_output_that_is_a_file_is_named(asked, tmp_path, capsys):
    (tmp_path / "afile").touch()
    for output in (tmp_path / "afile", tmp_path / "afile" / "out"):
        refused([*asked, "--output", str(output)], capsys, f"{tmp_path / 'afile'} is a file, not a folder")


def refused(argv: list[str], capsys, *messages: str, code: int = 2) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == code
    error = capsys.readouterr().err
    for message in messages:
        assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--promt", "x"], ["--promt", "did you mean --prompt?"]),
        (["--frames", "80"], ["frames 80", "77 or 81"]),
        (["--height", "100"], ["height 100", "96 or 112"]),
        (["--steps", "0"], ["--steps is 0", "at least 1"]),
        (["--guidance", "0.5"], ["--guidance is 0.5", "at least 1"]),
        (["--sampler", "dpm"], ["unipc", "euler"]),
        (["--sampler", "pndm"], ["'pndm' does not fit a model that predicts flow", "unipc, euler"]),
        (["--prompt_template", "best"], ["prompt_template 'best'", "exactly once"]),
        (["--seed", "-1"], ["--seed is -1", "at least 0"]),
        (["--prompt", "x"], ["either --prompt or --prompt_file"]),
        (["--prompt_file", "nowhere.txt"], ["nowhere.txt"]),
        (["--prompt_file", "/dev/null"], ["/dev/null is a device", "only regular files are read"]),
        (["--weights", "nowhere"], ["nowhere does not exist"]),
        (["--encoders", "nowhere"], ["nowhere does not exist"]),
        (["--text_tokens", "0"], ["text_tokens is 0", "at least 1"]),
        (["--lora", "nowhere"], ["nowhere does not exist"]),
        (["--model", "wan2.1-t2v-1.3b"], ["is no wan2.1-t2v-1.3b", "dim 40 instead of 1536"]),
        (["--model", "wan2.1-t2v-1.4b"], ["there is no preset", "wan2.1-t2v-1.3b"]),
        (["--output", "/dev/null/out"], ["/dev/null/out"]),
    ],
)
def test_what_cannot_work_is_refused_at_once(asked, tmp_path, monkeypatch, capsys, flags, messages):
    monkeypatch.chdir(tmp_path)
    refused([*asked, "--output", str(tmp_path / "out"), *flags], capsys, *messages)
    assert not (tmp_path / "out").exists()


def test_an_empty_list_of_prompts_is_refused(asked, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    lists = ["--prompt_file", str(tmp_path / "empty.txt"), "--output", str(tmp_path / "out")]
    refused([*asked, *lists], capsys, "empty.txt holds no lines")


def copy_of(pipeline: Path, target: Path) -> Path:
    return Path(shutil.copytree(pipeline, target))


def test_a_near_miss_in_a_path_is_recognised(asked, pipeline, tmp_path, capsys):
    asked[1] = str(pipeline.with_name("tinny-t2v"))
    refused([*asked, "--output", str(tmp_path / "out")], capsys, f"did you mean {pipeline}?")


def test_parts_that_are_missing_are_named(asked, pipeline, tmp_path, capsys):
    asked += ["--output", str(tmp_path / "out")]
    weights = copy_of(pipeline, tmp_path / "W")
    shutil.rmtree(weights / "vae")
    refused([*asked, "--weights", str(weights)], capsys, "W has no vae/")
    refused([*asked, "--weights", str(weights / "transformer")], capsys, "transformer alone", "encoders")


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_weights_that_do_not_fit_are_refused(asked, pipeline, tmp_path, capsys, fault):
    weights = copy_of(pipeline, tmp_path / "W")
    file = weights / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors, name = load_file(file), "blocks.1.ffn.net.2.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["blocks.1.ffn.net.3.weight"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(40, 40)
    save_file(tensors, file)
    named = "blocks.1.ffn.net.3.weight" if fault == "extra" else name
    refused([*asked, "--weights", str(weights), "--output", str(tmp_path / "out")], capsys, named)


def test_a_lora_of_another_model_is_refused(asked, tmp_path, capsys):
    model = add_lora(build("wan-tiny", num_layers=1), LoRAConfig(rank=2))
    asked += ["--lora", str(save_lora(tmp_path / "lora", model.state_dict(), 16.0)), "--output", str(tmp_path / "out")]
    refused(asked, capsys, "lora")


def test_an_adapter_for_low_noise_is_not_taken_for_both_experts(tiny, tmp_path):
    a, b = torch.ones(2, 40), torch.ones(40, 2)
    names = (f"transformer_2.blocks.0.attn1.to_q.lora_{part}.weight" for part in "AB")
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "low.safetensors")
    with pytest.raises(ValueError, match="is for the expert for low noise, as its names say"):
        Weights(tiny("a14b"), lora=tmp_path / "low.safetensors")


def test_the_alpha_of_a_lora_that_says_none(asked, tmp_path, capsys):
    sizes = {"dim": 40, "num_heads": 2, "ffn_dim": 48, "num_layers": 3, "text_dim": 32}
    model = add_lora(build("wan-tiny", **sizes), LoRAConfig(rank=2))
    lora = save_lora(tmp_path / "lora", model.state_dict(), 16.0)
    file = lora / "adapter_model.safetensors"
    save_file(load_file(file), file)  # without its header
    (lora / "adapter_config.json").unlink()
    asked += ["--output", str(tmp_path / "out")]
    refused([*asked, "--lora", str(lora)], capsys, "does not say its alpha", "--lora_alpha", "the rank is 2")
    refused([*asked, "--lora_alpha", "8"], capsys, "lora_alpha 8", "name it")
    main([*asked, "--lora", str(lora), "--lora_alpha", "8"])
    assert made_with(tmp_path / "out/video_0.mp4")["lora_alpha"] == 8


def without_torch(argv: list[str]) -> subprocess.CompletedProcess:
    """The command, which must end before torch is imported."""
    code = "import sys, mm_infer.__main__ as m\ntry: m.main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules\n"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)


def test_help_needs_no_torch():
    done = without_torch(["--help"])
    assert done.returncode == 0, done.stderr
    assert "--flow_shift" in done.stdout


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--weights", "nowhere"], ["weights: nowhere does not exist"]),
        (["--model", "wan2.1-t2v-1.3"], ["did you mean 'wan2.1-t2v-1.3b'?"]),
        (["--task", "t2w"], ["task t2w: these weights can do t2v (a prompt alone), ", "did you mean t2v?"]),
        (["--task", "vace"], ["task vace: these weights can do t2v"]),
        (["--height", "100"], ["height 100", "96 or 112"]),
        (["--video", "nowhere.mp4"], ["video: nowhere.mp4 does not exist"]),
        (["--control_scale", "0.5"], ["control_scale 0.5 is for task vace, but this is t2v"]),
    ],
)
def test_what_can_be_known_without_torch_is_said_without_it(asked, flags, messages):
    done = without_torch([*asked, "--output", "out", *flags])
    assert done.returncode == 2, done.stderr
    for message in messages:
        assert message in done.stderr


@pytest.mark.parametrize(("name", "said"), [("auto", "cpu"), ("math", "math"), ("cudnn", "no accelerator here")])
def test_check_tells_the_kernel_of_attention(asked, tmp_path, name, said):
    wanted = parse(Config, [*asked, "--output", str(tmp_path / "out"), "--attention", name], prog="mm_infer")
    (check,) = (check for check in CHECKS if check.name == "attention")
    assert said in check.run(Asked(wanted))
