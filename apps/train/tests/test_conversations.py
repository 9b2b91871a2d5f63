"""Runs on conversations, from a folder like the hub's: whole, resumed, on other ranks, validated, asked."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mm_models.qwen2_5_vl.testing import write_hub_folder
from mm_parallel.testing import spawn
from mm_train import extract
from mm_train.checks import check
from mm_train.recipe import load_config
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import as_torchrun, losses, rows, state

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    return write_hub_folder(tmp_path_factory.mktemp("hub"), texts=())  # tokens are bytes, as in the preset


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight conversations: six with an image of another size each, two of text alone."""
    folder = tmp_path_factory.mktemp("data")
    items = []
    for i in range(8):
        colour = list(COLOURS)[i % 3]
        asked = f"Which colour is it? {'Say more. ' * (i % 3)}"
        if i % 4 == 3:
            items.append(conversation(f"What is {i} and 1?", f"It is {i + 1}."))
            continue
        pixels = np.zeros((56 + 28 * (i % 3), 56 + 28 * (i % 2), 3), np.uint8) + np.uint8(COLOURS[colour])
        Image.fromarray(pixels).save(folder / f"{i}.png")
        items.append(conversation(f"<image>{asked}", f"The colour is {colour}.", f"{i}.png"))
    (folder / "train.json").write_text(json.dumps(items), encoding="utf-8")
    return folder


def conversation(question: str, answer: str, *images: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images)}


def arguments(hub: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model", "qwen2.5-vl-tiny", "--weights", str(hub), "--dtype", "float32", "--output", str(output)),
        *("--data.conversations", str(data if data.is_file() else data / "train.json"), "--data.workers", "0"),
        *("--data.global_batch", "4", "--data.max_tokens", "256", "--optim.lr", "3e-3", "--steps", "6"),
        *more,
    ]


def run(*given) -> Path:
    return train(load_config(arguments(*given)))


def ranks_train(rank: int, world: int, argv: list[str]) -> None:
    as_torchrun(rank, world)
    train(load_config(argv))


def test_a_run_learns_measures_and_answers(hub, data, tmp_path, capfd):
    """Loss falls; what the model says after memorising is what its validation and its samples say."""
    held_out = ("--validation.conversations", str(data / "train.json"), "--validation.every", "30")
    asked = ("--validation.answers", "3", "--sample.from_validation", "4", "--sample.max_new_tokens", "24")
    run(hub, data, tmp_path / "run", "--steps", "60", *held_out, *asked, "--sample.every", "60", "--log_tps", "true")
    made = rows(tmp_path / "run")
    steps = [row for row in made if "loss" in row]
    assert steps[-1]["loss"] < 0.1 * steps[0]["loss"]
    assert all(0 < row["label_tokens"] < row["tokens"] for row in steps)
    assert all(row["padding"] == 0 and row["patches"] > 0 and row["tokens_per_second"] > 0 for row in steps)
    assert sum(row["tokens"] for row in steps[:2]) == sum(row["tokens"] for row in steps[2:4])  # an epoch is two steps
    measured = {row["step"]: row for row in made if "validation_loss" in row}
    assert sorted(measured) == [0, 30, 60]
    assert measured[60]["validation_loss"] < 0.1 < measured[0]["validation_loss"]
    assert (measured[0]["validation_exact"], measured[60]["validation_exact"]) == (0.0, 1.0)
    file = tmp_path / "run/samples/step-00000060/answers.jsonl"
    answers = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [one["answer"] for one in answers] == [one["reference"] for one in answers]
    assert answers[0]["question"] == "<image>Which colour is it? "
    assert answers[0]["reference"] == "The colour is red."
    assert all(one["exact"] for one in answers)
    said = capfd.readouterr().err
    assert "8 conversations, --data.conversations" in said
    assert "4 of 4 answers are as expected" in said
    assert "label tokens/s" in said
    assert "in MindSpeed-MM's way of counting (--log-tps), steps 51 to 60" in said
    assert (tmp_path / "run/failures.jsonl").read_text(encoding="utf-8") == ""


def test_three_steps_and_three_more_are_six_bit_for_bit(hub, data, tmp_path):
    """…also onto another number of ranks, with the same samples: then but for the order of sums."""
    run(hub, data, tmp_path / "six")
    run(hub, data, tmp_path / "three", "--steps", "3")
    spawn(2, ranks_train, arguments(hub, data, tmp_path / "two", "--steps", "3"), timeout=120)
    run(hub, data, tmp_path / "three")
    run(hub, data, tmp_path / "two")
    six, three, two = (state(tmp_path / name / "checkpoints/step-00000006") for name in ("six", "three", "two"))
    assert six.keys() == three.keys() == two.keys()
    assert all(torch.equal(six[name], three[name]) for name in six)
    assert losses(tmp_path / "six") == losses(tmp_path / "three")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "six"), rel=1e-4)
    counted = [
        [(row["tokens"], row["label_tokens"], row["samples"]) for row in rows(tmp_path / n)] for n in ("six", "two")
    ]
    assert counted[0] == counted[1]


def test_packs_and_single_conversations_give_the_same_numbers(hub, data, tmp_path):
    run(hub, data, tmp_path / "packed", "--steps", "3")
    run(hub, data, tmp_path / "single", "--steps", "3", "--data.packing", "false")
    assert losses(tmp_path / "single") == pytest.approx(losses(tmp_path / "packed"), rel=1e-4)


@pytest.mark.parametrize("trained", ['["*"]', '["language"]'])
def test_a_rank_without_any_image_trains_beside_one_with(hub, data, tmp_path, trained):
    """FSDP, the vision tower trained and frozen: the numbers of one rank."""
    items = json.loads((data / "train.json").read_text(encoding="utf-8"))
    (data / "mixed.json").write_text(json.dumps([items[0], items[3]]), encoding="utf-8")
    more = ("--data.global_batch", "2", "--steps", "3", "--trained", trained)
    run(hub, data / "mixed.json", tmp_path / "one", *more)
    spawn(2, ranks_train, arguments(hub, data / "mixed.json", tmp_path / "two", *more), timeout=120)
    norms = [[row["grad_norm"] for row in rows(tmp_path / name)] for name in ("one", "two")]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_what_cannot_be_used_is_named_and_the_rest_is_trained(hub, data, tmp_path, capfd):
    """A missing image before the first step, a broken one when it comes; steps of nothing are skipped."""
    items = [conversation(f"<image>Which is {i}?", f"{i}", f"{i}.jpg") for i in range(3)] + [conversation("3?", "3")]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)).save(tmp_path / "0.jpg")
    whole = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])  # its header says a size
    file = tmp_path / "bad.json"  # 2.jpg is missing, 3 has none
    file.write_text(json.dumps(items), encoding="utf-8")
    options = ("--data.global_batch", "1", "--steps", "4")
    run(hub, file, tmp_path / "run", *options, "--validation.conversations", str(file))
    said = capfd.readouterr().err
    assert f"{file} is trained and is --validation.conversations as well" in said
    assert "left out: 1 missing_media" in said
    assert "3 conversations, --data.conversations" in said
    assert "there is nothing to train on in the samples up to" in said
    for name in ("failures.jsonl", "validation-failures.jsonl"):  # also what broke while its loss was measured
        lines = (tmp_path / "run" / name).read_text(encoding="utf-8").splitlines()
        assert [(one["id"], one["reason"]) for one in map(json.loads, lines)] == [
            ("bad.json[1]", "unreadable_media"),
            ("bad.json[2]", "missing_media"),
        ]
    done = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in done] == [1, 2, 3, 4]
    assert done[-1]["samples"] > 4  # the broken one took its turn

    file.write_text(json.dumps([items[1], items[2]]), encoding="utf-8")
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(
        ValueError,
        match=r"not one of 2 conversations can be used.*2 missing_media, e\.g\. bad.*is not there.*failures\.jsonl",
    ):
        run(hub, file, tmp_path / "none", *options)
    lazy = ("--data.survey", "false", "--validation.conversations", str(file))
    with pytest.raises(ValueError, match=r"not one of the first 2 can be used, 2 missing_media"):
        run(hub, data, tmp_path / "held out", *lazy)
    with pytest.raises(ValueError, match=r"10 steps in a row had nothing to train on"):
        run(hub, file, tmp_path / "lazy", *options, "--data.survey", "false")


def test_the_data_json_of_mindspeed_is_taken_as_it_is(hub, data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(data.parent)
    process = {"model_name_or_path": str(hub), "image_max_pixels": 3136, "video_maxlen": 64, "use_fast_tokenizer": True}
    basic = {"template": "qwen2vl", "dataset_dir": str(data), "dataset": str(data / "train.json"), "max_samples": 6}
    attr = {"images": "images", "messages": "messages", "role_tag": "role", "content_tag": "content"}
    attr |= {"user_tag": "user", "assistant_tag": "assistant"}
    param = {"dataset_type": "huggingface", "preprocess_parameters": process, "basic_parameters": basic, "attr": attr}
    (tmp_path / "data_3b.json").write_text(json.dumps({"dataset_param": param}), encoding="utf-8")
    given = arguments(hub, tmp_path / "data_3b.json", tmp_path / "run", "--steps", "2", "--data.global_batch", "3")
    read = load_config(given)
    assert (read.data.processor, read.data.chat.image_max_pixels, read.data.chat.resize) == (hub, 3136, "nearest")
    assert load_config([*given, "--data.chat.image_max_pixels", "6272"]).data.chat.image_max_pixels == 6272
    train(read)
    said = capfd.readouterr().err
    assert "data_3b.json: not needed here: use_fast_tokenizer" in said
    assert "6 conversations" in said


def test_boxes_of_answers_are_scaled_with_their_image_where_this_is_asked_for(hub, tmp_path):
    """The hub's tokenizer has bytes alone: 400 pixels become 56, so four numbers have a digit less each."""
    Image.fromarray(np.zeros((400, 400, 3), np.uint8)).save(tmp_path / "a.png")
    items = [conversation("<image>Where?", '{"bbox_2d": [100, 200, 300, 350]}', "a.png")]
    (tmp_path / "a.json").write_text(json.dumps(items), encoding="utf-8")
    options = ("--data.global_batch", "1", "--steps", "1", "--data.chat.image_max_pixels", "3136")
    for boxes in ("text", "original"):
        run(hub, tmp_path / "a.json", tmp_path / boxes, *options, "--data.boxes", boxes)
    assert rows(tmp_path / "text")[0]["label_tokens"] - rows(tmp_path / "original")[0]["label_tokens"] == 4


def test_a_weight_says_how_often_a_file_is_shown(hub, data, tmp_path, capfd):
    items = json.loads((data / "train.json").read_text(encoding="utf-8"))
    for name, some in (("a", items[:4]), ("b", items[4:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some), encoding="utf-8")
    listed = f"{data / 'a.jsonl'}=2,{data / 'b.jsonl'}=0.5"
    run(hub, data, tmp_path / "run", "--steps", "5", "--data.conversations", listed, "--data.global_batch", "2")
    (tmp_path / "mine.toml").write_text(f"[data]\nconversations = {json.dumps(listed.split(','))}\n", encoding="utf-8")
    given = [word for word in arguments(hub, data, tmp_path / "toml", "--steps", "5", "--data.global_batch", "2")]
    at = given.index("--data.conversations")
    del given[at : at + 2]
    train(load_config([*given, "--config", str(tmp_path / "mine.toml")]))
    assert losses(tmp_path / "toml") == losses(tmp_path / "run")
    assert "a.jsonl=2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data.conversations", "nowhere.json"), r"--data\.conversations nowhere\.json is not a file"),
        (("--data.conversations", "DATA=0"), "the weight is 0; it is more than 0"),
        (("--data.conversations", "DATA,DATA"), r"names .*train\.json twice"),
        (("--data.media", "nowhere"), "--data.media nowhere is not a folder"),
        (("--data.processor", "nowhere"), "--data.processor nowhere is no folder: give --data.processor with the"),
        (("--weights", "random"), "--weights random is no folder: give --data.processor"),
        (("--data.features", "f"), "--data.features is for videos, and qwen2.5-vl-tiny reads conversations"),
        (("--data.geometry.num_frames", "9"), "--data.geometry is for videos"),
        (("--data.micro_batch", "2"), "--data.micro_batch is for videos"),
        (("--validation.timesteps", "[500]"), "--validation.timesteps is for videos"),
        (("--sample.prompts", '["a cat"]'), "--sample.prompts is for videos"),
        (("--sample.from_validation", "2"), "--sample.from_validation 2: give --validation.conversations"),
        (("--validation.answers", "2"), "--validation.answers 2: give --validation.conversations"),
        (
            ("--validation.conversations", "DATA", "--validation.answers", "9", "--validation.max_samples", "8"),
            "--validation.answers 9 are of the 8 conversations",
        ),
        (("--objective.shift", "5"), "--objective.shift 5.0: qwen2.5-vl-tiny is trained otherwise"),
        (("--expert", "high"), "qwen2.5-vl-tiny is one model"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(hub, data, tmp_path, flags, message):
    flags = [flag.replace("DATA", str(data / "train.json")) for flag in flags]
    with pytest.raises(ValueError, match=message):
        check(load_config(arguments(hub, data, tmp_path / "run", *flags)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data.conversations", "a.json"), "--data.conversations is for conversations, and wan-tiny makes videos"),
        (("--data.chat.newline", "false"), "--data.chat is for conversations"),
        (("--sample.max_new_tokens", "5"), "--sample.max_new_tokens is for conversations"),
        (("--objective.average", "sample"), "--objective.average sample: wan-tiny is trained otherwise"),
        (("--log_tps", "true"), "--log_tps is for conversations"),
    ],
)
def test_options_of_conversations_are_refused_for_videos(tmp_path, flags, message):
    given = ["--model", "wan-tiny", "--weights", "random", "--data.features", str(tmp_path), *flags]
    with pytest.raises(ValueError, match=message):
        check(load_config(given))


def test_a_program_for_videos_names_the_one_for_conversations(tmp_path, capsys):
    (tmp_path / "data.json").write_text("[]", encoding="utf-8")
    for name in ("encoders", "features"):
        (tmp_path / name).mkdir()
    given = ["--model", "qwen2.5-vl-tiny", "--data.manifest", str(tmp_path / "data.json")]
    given += ["--encoders", str(tmp_path / "encoders"), "--output", str(tmp_path / "features")]
    with pytest.raises(SystemExit) as stop:
        extract.main(given)
    assert stop.value.code == 2
    assert "give `python -m mm_train --model qwen2.5-vl-tiny --data.conversations" in capsys.readouterr().err


def test_packs_of_two_micro_batches_in_any_layout_are_those_of_one_device(hub, data, tmp_path):
    """Packs of a step differ in patches, grids and conversations; a pipeline pads them to one length."""
    packs = ("--steps", "3", "--data.global_batch", "8", "--data.max_tokens", "160")
    run(hub, data, tmp_path / "one", *packs)
    for name, flag, value in (("stages", "pp_layers", "[1,3]"), ("ring", "ring", "2"), ("tensor", "tp", "2")):
        layout = (f"--parallel.{flag}", value)
        spawn(2, ranks_train, arguments(hub, data, tmp_path / name, *packs, *layout), timeout=120)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
        assert any(row["padding"] for row in rows(tmp_path / name)) == (name == "stages")
        work = [[row["tflops"] * row["seconds"] for row in rows(tmp_path / run)] for run in ("one", name)]
        assert work[1] == pytest.approx(work[0])


def host_trains(rank: int, world: int, argv: list[str], hosts: list[Path]) -> None:
    """A rank on a host with a copy of the images of its own."""
    os.chdir(hosts[rank])
    with pytest.raises(ValueError, match=r"ranks could read other samples for step \d: .* is not the same on all"):
        ranks_train(rank, world, argv)


def test_an_image_that_opens_on_one_host_alone_ends_the_run(hub, tmp_path):
    """Ranks that share a sample would wait for each other for ever, or compute on different tokens."""
    items = [conversation(f"<image>Which is {i}?", f"{i}", f"{i}.jpg") for i in range(2)]
    (tmp_path / "train.json").write_text(json.dumps(items), encoding="utf-8")
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    for number, host in enumerate(hosts):
        (host / "images").mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, (56, 56, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
            whole = (tmp_path / f"{i}.jpg").read_bytes()
            (host / f"images/{i}.jpg").write_bytes(whole[: len(whole) // 2] if number == i == 1 else whole)
    options = ("--data.media", "images", "--data.global_batch", "2", "--parallel.ulysses", "2")
    spawn(2, host_trains, arguments(hub, tmp_path / "train.json", tmp_path / "run", *options), hosts, timeout=120)
