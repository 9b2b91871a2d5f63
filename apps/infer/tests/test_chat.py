"""Answers of a tiny Qwen2.5-VL from the command line: the same as those of our own model, token by token."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from mm_convert import convert, open_checkpoint, open_lora, save_lora
from mm_convert.lora.base import describe_content
from mm_data.chat_options import ChatOptions
from mm_data.conversations import Conversation, Media, Turn
from mm_data.video_write import write_video
from mm_infer.answer import Answerer, Model
from mm_infer.chat import Config, main, make_question
from mm_models import build
from mm_models.lora import LoRAConfig, add_lora
from mm_models.qwen2_5_vl.generation import Qwen25VLGenerator
from mm_models.qwen2_5_vl.testing import tiny_config, write_hub_folder
from mm_models.tokens import greedy


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    return write_hub_folder(tmp_path_factory.mktemp("hub"), tiny_config(merges=110), seed=3)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """a.png, b.png, v.mp4."""
    folder = tmp_path_factory.mktemp("media")
    random = np.random.default_rng(0)
    for name, size in {"a": (90, 210), "b": (120, 64)}.items():
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    frames = (np.arange(25)[:, None, None, None] * 10 + np.zeros((25, 56, 84, 3))).astype(np.uint8)
    write_video(folder / "v.mp4", frames, fps=10)
    return folder


OPTIONS = ChatOptions(image_max_pixels=9000, video_min_pixels=784, video_max_pixels=5000)
FLAGS = ["--chat.image_max_pixels=9000", "--chat.video_min_pixels=784", "--chat.video_max_pixels=5000"]


def ask(folder: Path, *parts: str) -> Conversation:
    media = {"a.png": "image", "b.png": "image", "v.mp4": "video"}
    return Conversation(
        "c", (Turn("user", tuple(Media(media[p], str(folder / p)) if p in media else p for p in parts)),)
    )


QUESTIONS = [
    ("hello",),
    ("a.png", "what?"),
    ("v.mp4", "where?"),
    ("a.png", "and", "v.mp4", "compare ", "b.png", "v.mp4"),
]


@pytest.fixture(scope="session")
def answerer(hub) -> Answerer:
    return Answerer(Model(hub), OPTIONS, "cpu")


@pytest.fixture(scope="session")
def answers(hub, answerer, folder) -> list[str]:
    """Of our own model, under its own attention and positions, all questions at once."""
    model = build("qwen2.5-vl-tiny", **vars(tiny_config(merges=110)))
    model.load_state_dict(dict(open_checkpoint(hub)))
    processing = answerer.processing
    prompts = [processing.prompt(ask(folder, *question)) for question in QUESTIONS]
    return [
        processing.read_answer(ids)
        for ids in greedy(model.eval(), prompts, 24, processing.stop_ids, banned_ids=processing.banned_ids)
    ]


def test_it_answers_as_the_model_that_is_trained(answerer, answers, folder):
    assert len(set(answers)) == len(QUESTIONS)
    for question, expected in zip(QUESTIONS, answers, strict=True):
        answer = answerer(ask(folder, *question), max_new_tokens=24)
        assert answer == (expected, None, False)


def test_positions_are_ours_also_while_it_generates(answerer, folder):
    """Logits of every new token, against the class called with all tokens and our positions; transformers' differ."""
    processing, model = answerer.processing, answerer.generator.model
    prompt = processing.prompt(ask(folder, *QUESTIONS[3]))
    seen: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["position_ids"]), with_kwargs=True
    )
    ids = answerer.generator(prompt, max_new_tokens=4, stop_ids=processing.stop_ids)
    assert len(ids) == 4
    hook.remove()
    places = torch.cat(seen, -1)[:, 0]
    first = prompt.position_ids.max() + 1
    assert torch.equal(places[:, : len(prompt.input_ids)], prompt.position_ids)
    assert places[:, len(prompt.input_ids) :].tolist() == [list(range(first, first + len(ids) - 1))] * 3
    inputs = answerer.generator._inputs(prompt)
    kinds = (inputs["input_ids"] == tiny_config(110).image_token) + 2 * (
        inputs["input_ids"] == tiny_config(110).video_token
    )
    theirs, _ = model.model.get_rope_index(
        inputs["input_ids"],
        kinds.int(),
        inputs["image_grid_thw"],
        inputs["video_grid_thw"],
        torch.full((2,), 2 / (5 / 2.5)),
    )
    assert theirs.max() < prompt.position_ids.max()  # or this test would show nothing


def run(capsys, *flags: str) -> str:
    main([*flags, *FLAGS, "--max_new_tokens", "24", "--device", "cpu"])
    return capsys.readouterr().out.strip()


def shown(text: str) -> str:
    from mm_convert.cli.terminal import escape

    return escape(text).strip()


def test_command(hub, folder, answers, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    weights = ["--weights", str(hub)]
    assert run(capsys, *weights, "--prompt", "hello") == shown(answers[0])
    assert run(capsys, *weights, "--prompt", "what?", "--image", "a.png") == shown(answers[1])
    assert run(capsys, *weights, "--prompt", "where?", "--video", "v.mp4") == shown(answers[2])
    marked = "<image>and<video>compare <image><video>"
    media = ["--image", '["a.png", "b.png"]', "--video", '["v.mp4", "v.mp4"]']
    assert run(capsys, *weights, "--prompt", marked, *media) == shown(answers[3])
    assert run(capsys, *weights, "--prompt", "hello", "--system", "Other.") != shown(answers[0])
    drawn = [run(capsys, *weights, "--prompt", "hello", "--temperature", "1", f"--seed={s}") for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_places_of_images_in_a_question(folder):
    def parts(prompt, images=(), videos=()) -> list:
        config = Config(
            Path(),
            prompt=prompt,
            image=[folder / one for one in images] or None,
            video=[folder / one for one in videos] or None,
        )
        return [p if isinstance(p, str) else Path(p.path).name for p in make_question(config).turns[0].parts]

    assert parts("x", ["a.png", "b.png"], ["v.mp4"]) == ["a.png", "b.png", "v.mp4", "x"]
    assert parts("x<image>y<video>", ["a.png"], ["v.mp4"]) == ["x", "a.png", "y", "v.mp4"]
    assert parts("x<image>y", ["a.png"], ["v.mp4"]) == ["v.mp4", "x", "a.png", "y"]
    assert parts("an <image> is a <video>") == ["an <image> is a <video>"]
    with pytest.raises(ValueError, match=r"1 marks <image>, but 2 are given"):
        parts("<image>", ["a.png", "b.png"])
    with pytest.raises(ValueError, match=r"none.png is not there"):
        parts("x", ["none.png"])


def test_forms_of_weights(hub, folder, answers, tmp_path, capsys):
    convert(hub, tmp_path / "ours", to="mm")
    question = ["--prompt", "what?", "--image", str(folder / "a.png")]
    ours = ["--weights", str(tmp_path / "ours")]
    assert run(capsys, *ours, "--processor", str(hub), *question) == shown(answers[1])

    model = build("qwen2.5-vl-tiny", **vars(tiny_config(merges=110)))
    model.load_state_dict(dict(open_checkpoint(hub)))
    add_lora(model, LoRAConfig(rank=2, alpha=4.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=generator).mul_(0.3)
    save_lora(tmp_path / "adapter", {n: t for n, t in model.state_dict().items() if "lora_" in n}, 4.0)
    processing = Model(hub).family.chat.processing(hub, OPTIONS, tiny_config(merges=110))
    prompt = processing.prompt(ask(folder, *QUESTIONS[1]))
    (expected,) = greedy(model.eval(), [prompt], 24, processing.stop_ids, banned_ids=processing.banned_ids)
    said = run(capsys, "--weights", str(hub), "--lora", str(tmp_path / "adapter"), *question)
    assert said == shown(processing.read_answer(expected)) != shown(answers[1])


def test_boxes_of_the_picture_as_it_is(hub, folder, capsys, monkeypatch):
    """No tiny model says boxes, so its tokens are put into its mouth."""
    one = ask(folder, "b.png", "where?")
    rows, columns = Model(hub).family.chat.processing(hub, OPTIONS)._look(one.media[0]).resized
    said = Tokenizer.from_file(str(hub / "tokenizer.json")).encode("at [10, 20, 30, 40]").ids
    monkeypatch.setattr(Qwen25VLGenerator, "__call__", lambda *args, **named: said)
    flags = ["--weights", str(hub), "--prompt", "where?"]
    image = ["--image", str(folder / "b.png")]
    assert run(capsys, *flags, *image) == "at [10, 20, 30, 40]"
    by = (64 / columns, 120 / rows) * 2
    scaled = [round(number * factor) for number, factor in zip((10, 20, 30, 40), by, strict=True)]
    assert run(capsys, *flags, *image, "--boxes", "original") == f"at {scaled}" != "at [10, 20, 30, 40]"
    main([*flags, *FLAGS, "--boxes", "original", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert out.strip() == "at [10, 20, 30, 40]"
    assert "cannot be scaled back: the conversation has 0 images and videos" in err


def test_a_conversation_on_the_terminal(hub, folder, answers, capsys, monkeypatch):
    latin = b"caf\xe9".decode(errors="surrogateescape")  # as a terminal of another encoding gives it
    commands = ["/nonsense", "/image none.png", latin, "hello", "/new", f"/image {folder / 'a.png'}", "what?", "more?"]
    typed = iter([*commands, "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda mark: next(typed))
    lines = run(capsys, "--weights", str(hub))
    assert "/nonsense is no command" in lines
    assert "missing_media" in lines
    assert "this is not UTF-8 text" in lines
    assert shown(answers[0]) in lines
    assert shown(answers[1]) in lines
    assert next(typed) == "never"
    # with all before it
    history = Conversation(
        "c", (*ask(folder, *QUESTIONS[1]).turns, Turn("assistant", (answers[1],)), Turn("user", ("more?",)))
    )
    answerer = Answerer(Model(hub), OPTIONS, "cpu")
    assert lines.endswith(shown(answerer(history, max_new_tokens=24).text))


def test_questions_from_a_file(hub, folder, answers, answerer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answers[0]}]}
    wrong = {
        "messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a cat"}],
        "images": ["a.png"],
    }
    unanswered = {"messages": [{"role": "user", "content": "<video>where?"}], "videos": ["v.mp4"]}
    missing = {**wrong, "images": ["none.png"]}
    Path("q.json").write_text(json.dumps([right, wrong, missing, unanswered]), encoding="utf-8")
    flags = ["--weights", str(hub), "--questions", "q.json", "--media", str(folder)]
    said = run(capsys, *flags)
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in rows] == answers[:3]
    assert [row.get("exact") for row in rows] == [True, False, None]
    assert rows[1]["question"] == "<image>what?"
    assert rows[1]["reference"] == "a cat"
    assert "3 answers" in said
    assert "1 of 2 (50.0%) are exactly the reference" in said
    (failure,) = [json.loads(line) for line in Path("answers-failures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert failure["reason"] == "missing_media"
    assert failure["id"] == "q.json[2]"
    with pytest.raises(SystemExit):
        run(capsys, *flags)
    assert "answers.jsonl is there already: give --overwrite true" in capsys.readouterr().err
    run(capsys, *flags, "--overwrite", "true")


def refused(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.count("\n") == 1, error
    return error


def test_errors_say_what_to_do(hub, folder, tmp_path, capsys):
    weights, image = ["--weights", str(hub)], str(folder / "a.png")
    assert "did you mean" in refused(capsys, "--weights", f"{hub}x", "--prompt", "a")
    assert "leave one out" in refused(capsys, *weights, "--prompt", "a", "--questions", image)
    assert "are of a --prompt" in refused(capsys, *weights, "--image", image)
    assert "--prompt is empty: write what is asked" in refused(capsys, *weights, "--prompt", " ")
    said = refused(capsys, *weights, "--questions", image, "--output", str(folder), "--overwrite", "true")
    assert f"output {folder} is a folder: give a file, as {folder / 'answers.jsonl'}" in said
    assert "none.png is not there" in refused(capsys, *weights, "--prompt", "a", "--image", "none.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    said = refused(capsys, *weights, "--prompt", "a", "--image", str(broken), "--device", "cpu")
    assert "broken.png is not a picture" in said
    assert "attention by cudnn cannot run here" in refused(capsys, *weights, "--prompt", "a", "--attention", "cudnn")
    for device in ("tpux", "cuda:99"):
        assert f"--device {device}: " in refused(capsys, *weights, "--prompt", "a", "--device", device)
    convert(hub, tmp_path / "ours", to="mm")
    said = refused(capsys, "--weights", str(tmp_path / "ours"), "--prompt", "a")
    assert "holds no tokenizer and no image processor: name the folder of the hub (processor)" in said
    other = tmp_path / "other"
    convert(hub, other, to="mm")
    write_hub_folder(tmp_path / "fewer", weights=False)
    said = refused(capsys, "--weights", str(other), "--processor", str(tmp_path / "fewer"), "--prompt", "a")
    assert "they do not belong together" in said
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "x.safetensors" in refused(capsys, "--weights", str(tmp_path / "x.safetensors"), "--prompt", "a")
    tensors = load_file(hub / "model.safetensors")
    short = tmp_path / "short"
    short.mkdir()
    (short / "config.json").write_bytes((hub / "config.json").read_bytes())
    save_file({n: t for n, t in tensors.items() if "layers.1." not in n}, short / "model.safetensors")
    assert "layers" in refused(capsys, "--weights", str(short), "--prompt", "a")


def test_what_an_adapter_was_trained_on_is_compared(hub, tmp_path, capsys):
    model = add_lora(build("qwen2.5-vl-tiny", device="cpu", **vars(tiny_config(merges=110))), LoRAConfig(rank=2))
    tensors = {n: torch.zeros(t.shape) for n, t in model.state_dict().items() if "lora_" in n}
    modules = open_lora(save_lora(tmp_path / "plain", tensors, 16.0)).modules
    same = describe_content(open_checkpoint(hub).tensors, modules)
    assert same
    for name, said, note in (("same", same, ""), ("other", {"content": "0" * 16}, "was trained on other weights")):
        save_lora(tmp_path / name, tensors, 16.0, trained_on=said)
        Model(hub, lora=tmp_path / name)
        error = capsys.readouterr().err
        assert note in error if note else "trained on" not in error
    save_lora(tmp_path / "wan", tensors, 16.0, trained_on={"family": "wan", "model": "wan2.1-t2v-1.3b"})
    names = {f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight": torch.zeros(2, 2) for side in ("down", "up")}
    save_file(names, tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match=r"wan.safetensors is for wan, and these weights are qwen2_5_vl: give an adap"):
        Model(hub, lora=tmp_path / "wan.safetensors")
    asked = ["--weights", str(hub), "--prompt", "a", "--lora", str(tmp_path / "wan")]
    assert "was trained on weights of family wan (wan2.1-t2v-1.3b)" in refused(capsys, *asked)
    with pytest.raises(SystemExit, match="2"):
        main([*asked, "--check"])
    assert re.search(r"✗ weights .*of family wan", " ".join(capsys.readouterr().out.split()))


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")


def test_what_the_readme_says_can_be_typed(hub, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Qwen2.5-VL-3B-Instruct").symlink_to(hub)
    for name, source in {"cat.png": "a.png", "dog.png": "b.png", "clip.mp4": "v.mp4"}.items():
        Path(name).symlink_to(folder / source)
    convert(hub, Path("run/weights"), to="mm")
    model = add_lora(build("qwen2.5-vl-tiny", device="cpu", **vars(tiny_config(merges=110))), LoRAConfig(rank=2))
    save_lora(Path("adapter"), {n: torch.zeros(t.shape) for n, t in model.state_dict().items() if "lora_" in n}, 16.0)
    Path("data").symlink_to(folder)
    Path("questions.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a"}]}]),
        encoding="utf-8",
    )
    monkeypatch.setattr("builtins.input", lambda mark: "/quit")
    (commands,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for line in commands.splitlines() if not line.startswith("#")]
    for line in lines:
        _, _, flags = line.partition("-m mm_infer.chat ")
        assert run(capsys, *shlex.split(flags))
    assert len(lines) == 6
    assert Path("answers.jsonl").exists()
    (code,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    exec(code.replace("max_new_tokens=100", "max_new_tokens=4"), {})
