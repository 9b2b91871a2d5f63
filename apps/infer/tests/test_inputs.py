"""What videos are made from: which task is meant, the usual numbers, sizes and rates, files and their errors."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import mm_infer
from mm_convert.cli.arguments import parse
from mm_data import made_with, write_video
from mm_infer.__main__ import main
from mm_infer.config import Config, Options
from mm_infer.inputs import Given, footage, mask_pixels
from mm_infer.lists import read_requests
from mm_infer.settle import calls_of, check, choose_task, settle
from mm_infer.weights import Facts
from mm_models.diffusion.samplers import fill_template
from mm_models.families import find
from mm_models.wan.presets import CHINESE_NEGATIVE_PROMPT, NEGATIVE_PROMPT

IMAGE = np.zeros((300, 200, 3), np.uint8)
CLIP = np.zeros((30, 100, 200, 3), np.uint8)


@pytest.fixture(scope="module")
def facts(tiny):
    """facts(preset): of the released weights; only their VAE is a tiny one, with the sizes of theirs."""

    def know(model: str) -> Facts:
        family, preset = find(model)
        repository = tiny("5b" if preset.config.out_channels == 48 else "t2v")
        return Facts(family, preset.config, preset.boundary is not None, preset.published, repository)

    return know


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [  # the table of numerics: task, height, width, frames, fps, steps, guidance, shift
        ("wan2.1-t2v-1.3b", {}, ("t2v", 480, 832, 81, 16, 50, 5.0, 3.0)),
        ("wan2.1-t2v-14b", {}, ("t2v", 720, 1280, 81, 16, 50, 5.0, 5.0)),
        ("wan2.1-t2v-1.3b", {"video": CLIP}, ("v2v", 432, 880, 29, 16, 50, 5.0, 3.0)),
        ("wan2.1-i2v-14b-480p", {"image": IMAGE}, ("i2v", 768, 512, 81, 16, 40, 5.0, 3.0)),
        ("wan2.1-i2v-14b-720p", {"image": IMAGE}, ("i2v", 1168, 768, 81, 16, 40, 5.0, 5.0)),
        ("wan2.1-flf2v-14b", {"image": IMAGE, "last_image": IMAGE}, ("flf2v", 1168, 768, 81, 16, 50, 5.5, 16)),
        ("wan2.2-ti2v-5b", {}, ("t2v", 704, 1280, 121, 24, 50, 5.0, 5)),
        ("wan2.2-ti2v-5b", {"image": IMAGE}, ("ti2v", 1152, 768, 121, 24, 50, 5.0, 5)),
        ("wan2.2-t2v-a14b", {}, ("t2v", 720, 1280, 81, 16, 40, (4.0, 3.0), 12)),
        ("wan2.2-i2v-a14b", {"image": IMAGE}, ("i2v", 1168, 768, 81, 16, 40, 3.5, 5)),
        ("vace-1.3b", {"references": (IMAGE,)}, ("vace", 480, 832, 81, 16, 50, 5.0, 16)),
        ("vace-a14b", {"video": CLIP, "mask": CLIP}, ("vace", 672, 1344, 29, 16, 50, 5.0, 12)),
    ],
)
def test_usual_numbers(facts, model, given, expected):
    o = settle(Options(), Given(**given), facts(model))
    assert (o.task, o.height, o.width, o.frames, o.fps, o.steps, o.guidance, o.flow_shift) == expected
    assert o.negative_prompt == (
        CHINESE_NEGATIVE_PROMPT if model.startswith("wan2.2") or "a14b" in model else NEGATIVE_PROMPT
    )
    assert (o.sampler, o.grid, o.prompt_template) == ("unipc", "guides", "{}")
    assert o.strength == (0.7 if o.task == "v2v" else None)
    assert o.control_scale == (1.0 if o.task == "vace" else None)


@pytest.mark.parametrize(
    ("model", "task", "given", "message"),
    [
        (
            "wan2.1-t2v-1.3b",
            None,
            {"image"},
            r"cannot make a video from image, but do t2v .*v2v \(video\); .*task ti2v",
        ),
        ("wan2.1-t2v-1.3b", "vace", set(), r"task vace: these weights can do t2v"),
        ("wan2.1-t2v-1.3b", "v2v", set(), r"task v2v makes a video from video, not from a prompt alone"),
        ("wan2.1-i2v-14b-480p", None, set(), r"from a prompt alone, but do i2v \(image\)"),
        ("wan2.1-i2v-14b-480p", None, {"image", "last_image"}, r"from image, last_image, but do i2v"),
        ("vace-1.3b", None, {"image"}, r"vace \(any of video, mask, references, or none\)"),
        ("vace-1.3b", None, {"mask"}, r"give video as well"),
    ],
)
def test_what_a_model_cannot_do_is_refused(facts, model, task, given, message):
    with pytest.raises(ValueError, match=message):
        choose_task(facts(model), task, given)


def test_a_model_trained_for_a_clean_first_frame_is_asked_by_name(facts):
    assert choose_task(facts("wan2.1-t2v-1.3b"), "ti2v", {"image"}).name == "ti2v"


@pytest.mark.parametrize(
    ("model", "options", "given", "message"),
    [
        ("wan2.1-t2v-1.3b", {"strength": 0.5}, {}, "strength 0.5 is for task v2v, but this is t2v"),
        ("wan2.1-t2v-1.3b", {"control_scale": 0.0}, {}, "control_scale 0.0 is for task vace"),
        ("wan2.2-i2v-a14b", {"clip_crop": True}, {"image": IMAGE}, "clip_crop is for models with CLIP"),
        ("wan2.1-t2v-1.3b", {"guidance": (4.0, 3.0)}, {}, "two numbers are for two experts"),
        ("wan2.1-t2v-1.3b", {"frames": 33}, {"video": CLIP}, "30 frames at 16 per second, but 33 are needed"),
        ("wan2.1-t2v-1.3b", {"steps": 2, "strength": 0.4}, {"video": CLIP}, "less than one step"),
        ("wan2.1-i2v-14b-480p", {"height": 480}, {"image": IMAGE}, "give both, or neither"),
        ("wan2.1-flf2v-14b", {"frames": 1}, {"image": IMAGE, "last_image": IMAGE}, "at least 5 are needed"),
        ("wan2.2-ti2v-5b", {"height": 720, "width": 1280}, {}, "height 720: .* multiple of 32, as 704 or 736"),
        ("vace-1.3b", {"frames": 29}, {"video": CLIP, "mask": CLIP[:5]}, "the mask .the video given. has 5 frames"),
        ("wan2.1-t2v-1.3b", {"sampler": "ddim"}, {}, "'ddim' does not fit a model that predicts flow; .* unipc, euler"),
        ("wan2.1-t2v-1.3b", {"prompt_template": "best"}, {}, r"prompt_template 'best': .* '\{\}' alone leaves"),
        ("wan2.1-i2v-14b-480p", {}, {"image": IMAGE / 255}, r"H W 3 uint8, .* not \(300, 200, 3\) float64"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(facts, model, options, given, message):
    with pytest.raises(ValueError, match=message):
        settle(Options(**options), Given(**given), facts(model))


@pytest.fixture
def noisy(facts) -> Facts:
    """Facts of a model that predicts noise, of weights that make 93 frames only."""
    known = facts("wan2.1-t2v-1.3b")
    video = replace(known.family.video, prediction=lambda config: "epsilon")
    family = replace(known.family, video=video)
    sampling = {"flow_shift": None, "sampler": "euler_ancestral", "prompt_template": "(best) {}.", "trained_frames": 93}
    return replace(known, family=family, published=replace(known.published, frames=93, **sampling))


def test_a_model_that_predicts_noise_has_its_own_samplers_and_no_flow(noisy):
    o = settle(Options(), Given(), noisy)
    assert (o.sampler, o.flow_shift, o.grid, o.frames, o.steps) == ("euler_ancestral", None, None, 93, 50)
    assert fill_template(o.prompt_template, "a {} cat") == "(best) a {} cat."
    assert calls_of(o) == 50
    pndm = settle(Options(sampler="pndm", prompt_template="{}"), Given(), noisy)
    assert calls_of(pndm) == 59
    assert fill_template(pndm.prompt_template, "a cat") == "a cat"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow_shift": 3.0}, "flow_shift 3.0: it moves the steps of flow matching .*predicts epsilon: leave it out"),
        ({"grid": "guides"}, "grid guides: it chooses the noise levels of flow matching"),
        ({"sampler": "euler"}, r"'euler' does not fit .*predicts epsilon; there are .* did you mean euler_ancestral\?"),
        ({"sampler": "pndm", "steps": 3}, "steps is 3, but must be at least 4 for pndm"),
        ({"frames": 29}, r"frames 29: .* trained on videos of 93 frame\(s\) only, .* noise: .*other_frames true"),
    ],
)
def test_what_such_a_model_has_not_is_refused_before_a_file_is_opened(noisy, options, message):
    with pytest.raises(ValueError, match=message):
        check(Options(**options), Given(), noisy)


def test_another_length_is_made_when_asked_twice(noisy):
    assert settle(Options(frames=29, other_frames=True), Given(), noisy).frames == 29
    with pytest.raises(ValueError, match=r"frames 29: .* trained on videos of 93 frame"):  # of a video that is shorter
        settle(Options(), Given(video=CLIP), noisy)


def test_a_video_is_read_at_the_rate_that_is_written(facts, tmp_path):
    frames = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3) * 4
    write_video(tmp_path / "fast.mp4", frames, fps=32)
    write_video(tmp_path / "slow.mp4", frames, fps=8)
    write_video(tmp_path / "slower.mp4", frames[:5], fps=0.5)
    fast = settle(Options(), Given(video=tmp_path / "fast.mp4"), facts("wan2.1-t2v-1.3b"))
    assert (fast.frames, fast.fps) == (29, 16)  # 30 of them
    slow = settle(Options(), Given(video=tmp_path / "slow.mp4"), facts("wan2.1-t2v-1.3b"))
    assert (slow.frames, slow.fps) == (57, 8)
    assert settle(Options(), Given(video=tmp_path / "slower.mp4"), facts("wan2.1-t2v-1.3b")).fps == 0.5
    read = footage(tmp_path / "fast.mp4", 16).cut(29).pixels((32, 32))
    shown = ((read.mean((0, 2, 3)) + 1) * 127.5 / 4).round()
    assert abs(shown.numpy() - np.arange(0, 58, 2)).max() <= 1


CHANGES = np.zeros((16, 32), bool)  # H W
CHANGES[:8, :16] = True


def test_masks_of_every_form_say_the_same(tmp_path):
    bytes_ = CHANGES * np.uint8(255)
    moving = np.stack([CHANGES] * 5)
    colour = np.stack([bytes_] * 3, axis=-1)
    clear = np.dstack([colour, np.zeros_like(bytes_)])  # all of it is transparent
    Image.fromarray(bytes_).save(tmp_path / "grey.png")
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(bytes_).save(tmp_path / "grey.jfif", format="png")
    few = Image.fromarray(CHANGES.astype(np.uint8) * 5).convert("P")  # numbers in a palette of black and white
    few.putpalette([0, 0, 0] * 5 + [255, 255, 255])
    write_video(tmp_path / "mask.mp4", np.stack([colour] * 5), fps=8, crf=0)
    expected = torch.from_numpy(moving)[None].float()
    for mask in (
        *(tmp_path / "grey.png", tmp_path / "clear.png", tmp_path / "grey.jfif", tmp_path / "mask.mp4"),
        *(Image.fromarray(bytes_), Image.fromarray(CHANGES), Image.fromarray(clear), few),
        *(CHANGES, bytes_, bytes_ / 255, CHANGES[..., None], colour, clear, colour[..., 1:]),
        *(moving, moving[..., None], np.stack([bytes_] * 5), np.stack([colour] * 5), np.stack([clear] * 5)),
        *(torch.from_numpy(moving), torch.from_numpy(moving).bfloat16(), torch.from_numpy(bytes_)),
    ):
        assert torch.equal(mask_pixels(Given(mask=mask), 8, 5, (16, 32)), expected)
    half = mask_pixels(Given(mask=np.full((16, 32), 0.25, np.float32)), 8, 1, (16, 32))
    assert half.unique().tolist() == pytest.approx([0.25], abs=2e-3)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros(9, np.uint8), r"not of the shape \(9,\)"),
        (np.zeros((1, 5, 16, 32), np.uint8), r"not of the shape \(1, 5, 16, 32\)"),
        (np.zeros((5, 16, 32, 3, 1), np.uint8), r"not of the shape \(5, 16, 32, 3, 1\)"),
        (np.zeros((0, 16, 32), np.uint8), r"not of the shape \(0, 16, 32\)"),
        (CHANGES.astype(np.int64), "not int64 of 0 to 1"),
        (CHANGES.astype(np.uint8), "not uint8 of 0 to 1"),
        (CHANGES * 255.0, r"not float64 of 0.0 to 255.0"),
        (np.full((16, 32), np.nan), "not float64 of nan to nan"),
        (np.full((16, 32), "x"), "not <U1"),
    ],
)
def test_masks_that_could_be_misread_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        mask_pixels(Given(mask=mask), 8, 5, (16, 32))


def test_one_reference_needs_no_list():
    assert Given(references="a.png") == Given(references=["a.png"]) == Given(references=("a.png",))
    assert len(Given(references=IMAGE).references) == 1


def config(tmp_path, **fields) -> Config:
    return Config(weights=Path("w"), output=Path("o"), **fields)


def test_lists_go_line_by_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "images.txt").write_text("cat.png\ndog 1.png\n")
    (tmp_path / "both.txt").write_text("a.png, b.png\nc.png,d.png\n")
    prompts = tmp_path / "prompts.txt"
    first, second = read_requests(config(tmp_path, prompt_file=prompts, image_file=tmp_path / "images.txt"))
    assert (first.prompt, first.given) == ("a cat", {"image": Path("cat.png")})
    assert (second.prompt, second.given) == ("a dog", {"image": Path("dog 1.png")})
    _, second = read_requests(config(tmp_path, prompt="a cat", image_file=tmp_path / "both.txt"))
    assert (second.prompt, second.given) == ("a cat", {"image": Path("c.png"), "last_image": Path("d.png")})
    one, other = read_requests(config(tmp_path, prompt_file=prompts, references=[Path("a.png"), Path("b.png")]))
    assert one.given == other.given == {"references": (Path("a.png"), Path("b.png"))}
    (several,) = read_requests(config(tmp_path, prompt="a cat", references=Path("a.png, b.png")))
    assert several.given == one.given
    (tmp_path / "images.txt").write_text("cat.png\n")
    with pytest.raises(ValueError, match=r"all as many: .*prompts.txt has 2, .*images.txt has 1"):
        read_requests(config(tmp_path, prompt_file=prompts, image_file=tmp_path / "images.txt"))
    with pytest.raises(ValueError, match="either --image or --image_file"):
        config(tmp_path, prompt="a cat", image=Path("a.png"), image_file=tmp_path / "images.txt")
    (tmp_path / "both.txt").write_text(" , \n")
    for name in ("image_file", "references_file"):
        with pytest.raises(ValueError, match="',' names no file"):
            read_requests(config(tmp_path, prompt="a cat", **{name: tmp_path / "both.txt"}))
    (tmp_path / "both.txt").write_text("a.png, b.png, c.png\n")
    with pytest.raises(ValueError, match="one image, or the first and the last"):
        read_requests(config(tmp_path, prompt="a cat", image_file=tmp_path / "both.txt"))


def test_images_from_the_command_line(tiny, tmp_path, capsys):
    """A file that changes is not the same command any more, one that moves is not either."""
    for name, value in (("a", 60), ("b", 200)):
        Image.fromarray(np.full((90, 60, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "images.txt").write_text(f"{tmp_path}/a.png\n{tmp_path}/b.png\n")
    command = ["--weights", str(tiny("i2v")), "--prompt", "a cat", "--image_file", str(tmp_path / "images.txt")]
    command += ["--frames", "5", "--steps", "1", "--height", "48", "--width", "32", "--output", str(tmp_path / "out")]
    main(command)
    record = made_with(tmp_path / "out" / "video_1.mp4")
    assert record["image"]["path"] == f"{tmp_path}/b.png"
    assert (record["task"], record["steps"], record["guidance"]) == ("i2v", 1, 5.0)
    with av.open(str(tmp_path / "out" / "video_1.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.average_rate, stream.frames) == (48, 32, Fraction(16), 5)
    capsys.readouterr()
    main(command)
    assert capsys.readouterr().out.count("kept, made by the same command") == 2
    Image.fromarray(np.full((90, 60, 3), 61, np.uint8)).save(tmp_path / "a.png")
    refused(command, capsys, "video_0.mp4 is already there, made otherwise")


def test_control_from_the_command_line(tiny, tmp_path, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    write_video(tmp_path / "depth.mp4", frames, fps=16)
    Image.fromarray(frames[0]).save(tmp_path / "mask.png")
    Image.fromarray(frames[1]).save(tmp_path / "cat.jpg")
    command = ["--weights", str(tiny("vace")), "--prompt", "a cat", "--video", str(tmp_path / "depth.mp4")]
    command += ["--mask", str(tmp_path / "mask.png"), "--references", f"{tmp_path}/cat.jpg", "--steps", "1"]
    command += ["--height", "32", "--width", "48", "--output", str(tmp_path / "out")]
    main(command)
    record = made_with(tmp_path / "out" / "video_0.mp4")
    assert record["frames"] == 9
    assert {"video", "mask", "references"} <= record.keys()
    assert [one["path"] for one in record["references"]] == [f"{tmp_path}/cat.jpg"]


def refused(command: list[str], capsys, *messages: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    for message in messages:
        assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("i2v", ["--image", "nowhere.png"], "nowhere.png does not exist"),
        ("i2v", ["--image", "/dev/null"], "/dev/null"),
        ("t2v", ["--video", "nowhere.mp4"], "nowhere.mp4"),
        ("vace", ["--references", '["nowhere.png"]'], "nowhere.png does not exist"),
        ("t2v", ["--image", "nowhere.png"], "cannot make a video from image"),
        ("t2v", ["--boundary", "0.8"], "boundary 0.8 is for two experts"),
        (
            "t2v",
            ["--height", "1000000000"],
            "--height is 1000000000; it takes a whole number (at least 1, at most 1",
        ),
        ("t2v", ["--text_tokens", "1000000000"], "at most 65536"),
        ("a14b", ["--guidance", "[1, 2, 3]"], "guidance"),
        ("t2v", ["--guidance", "1", "--parallel.guidance", "2"], "leave either out"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(tiny, tmp_path, capsys, kind, flags, message):
    command = ["--weights", str(tiny(kind)), "--prompt", "a cat", "--output", str(tmp_path / "out"), *flags]
    refused(command, capsys, message)
    assert not (tmp_path / "out").exists()


def test_encoders_of_another_model_are_refused(tiny):
    with pytest.raises(
        ValueError, match=r"encoders of another model \(video channels 16 instead of 48\): give the dir"
    ):
        mm_infer.load(tiny("5b") / "transformer", encoders=tiny("t2v"))
    with pytest.raises(ValueError, match=r"has no image_encoder/"):
        mm_infer.load(tiny("i2v") / "transformer", encoders=tiny("t2v"))


def test_of_two_experts_somebody_must_say_where_they_meet(tiny, tmp_path):
    """Nobody has published two with a CLIP branch, so no preset says it either."""
    for folder in ("high_noise_model", "low_noise_model"):
        (tmp_path / "pair").mkdir(exist_ok=True)
        (tmp_path / "pair" / folder).symlink_to(tiny("i2v") / "transformer")
    with pytest.raises(ValueError, match="from which noise level on the first one works: give it, as boundary"):
        mm_infer.load(tmp_path / "pair", encoders=tiny("i2v"))
    assert mm_infer.load(tmp_path / "pair", encoders=tiny("i2v"), boundary=0.9).weights.boundary == 0.9


@pytest.mark.parametrize("name", ["#1.png", "~", "---", "&a", "null.png", "yes", "[1].png", "a: b.png", "1e5"])
def test_an_image_of_any_name_is_taken(tiny, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 64), "red").save(name, format="png")
    Path("images.txt").write_text(f"{name}\n")
    Path("my.toml").write_text(f'image = "{name}"\n')
    size = ["--height", "64", "--width", "32", "--frames", "5", "--steps", "1"]
    asked = ["--weights", str(tiny("5b")), "--prompt", "# a", "--negative_prompt", "---", *size, "--output"]
    for way in (["--image", name], ["--config", "my.toml"]):
        config = parse(Config, [*asked, "o", *way], prog="mm_infer")
        assert (config.image, config.prompt, config.negative_prompt) == (Path(name), "# a", "---")
        (request,) = read_requests(config)
        assert request.given["image"] == Path(name)
    listed = parse(
        Config, ["--weights", "w", "--output", "o", "--prompt_file", "p.txt", "--image_file", "images.txt"], prog="i"
    )
    Path("p.txt").write_text("~\n")
    (request,) = read_requests(listed)
    assert (request.prompt, request.given["image"]) == ("~", Path(name))
    references = parse(Config, [*asked, "o", "--references", f'["{name}", "b.png"]'], prog="mm_infer").references
    assert references == [Path(name), Path("b.png")]
    if name == "#1.png":
        main([*asked, "out", "--image", name])
        assert made_with(Path("out/video_0.mp4"))["task"] == "ti2v"


@pytest.mark.parametrize("flag", ["--lora", "--image", "--encoders", "--video", "--prompt_file"])
@pytest.mark.parametrize("name", ["#2", "~", "&a", "!x"])
def test_a_file_of_any_name_that_is_missing_is_missed(tiny, tmp_path, monkeypatch, capsys, flag, name):
    monkeypatch.chdir(tmp_path)
    asked = ["--weights", str(tiny("5b")), "--output", "out", flag, name]
    with pytest.raises(SystemExit) as stop:
        main([*asked] if flag == "--prompt_file" else [*asked, "--prompt", "a"])
    assert stop.value.code == 2
    assert name in capsys.readouterr().err
