"""The commands that look at conversations and write them anew."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from mm_data import llava_to_mllm, show
from mm_data.chat_options import ChatOptions
from mm_data.conversations import Conversation, Media, Source, read_conversations
from mm_data.conversations.mindspeed import is_data_json, read_data_json
from mm_data.processing import Encoded, Size

TURNS = [{"from": "human", "value": "<image>\nWhat is \x1b[31mit?"}, {"from": "gpt", "value": "A cat.\n\u202eYes."}]
GOOD = [
    {"id": "1", "image": "a.jpg", "conversations": TURNS},
    {"id": "2", "conversations": [{"from": "human", "value": "\u4f60\u597d"}, {"from": "gpt", "value": ' "Hi" '}]},
    {"id": "3", "image": "", "conversations": []},
]


@pytest.fixture
def guide(tmp_path, monkeypatch) -> Path:
    """The folders of the guide."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/COCO2017/train2017"
    folder.mkdir(parents=True)
    Image.new("RGB", (6, 4), "red").save(folder / "a.jpg")
    return tmp_path / "data"


# --- MindSpeed-MM's conversion of LLaVA-Instruct


def test_converts_as_the_guide(guide, capsys):
    items = [*GOOD, GOOD[0] | {"image": "b.jpg"}, {"conversations": [{"from": "tool", "value": "x"}]}, GOOD[1]]
    (guide / "llava_instruct_150k.json").write_text(json.dumps(items), encoding="utf-8")
    llava_to_mllm.main([])
    output = guide / "mllm_format_llava_instruct_data.json"
    # what the guide's script does
    expected = []
    for item in [*GOOD, GOOD[1]]:
        path = item.get("image") and f"./data/COCO2017/train2017/{item['image']}"
        roles = {"human": "user", "gpt": "assistant"}
        said = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in item["conversations"]]
        expected.append({"images": [path] if path else [], "messages": said})
    assert output.read_bytes() == json.dumps(expected, ensure_ascii=False).encode()
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    lines = (guide / "mllm_format_llava_instruct_data.failures.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(one["id"], one["reason"]) for one in map(json.loads, lines)] == [
        ("llava_instruct_150k.json[3]", "missing_media"),
        ("llava_instruct_150k.json[4]", "roles"),
    ]
    said = capsys.readouterr().out
    assert "4 conversations written" in said
    assert "2 left out" in said
    assert sorted(path.name for path in guide.iterdir() if path.is_file()) == [
        "llava_instruct_150k.json",
        "mllm_format_llava_instruct_data.failures.jsonl",
        "mllm_format_llava_instruct_data.json",
    ]
    # the same conversations as from what was downloaded
    sources = [guide / "llava_instruct_150k.json", output]
    one, other = (read_conversations([Source(path)], guide / "COCO2017/train2017") for path in sources)
    assert other[1].turns == one[1].turns
    assert [os.path.realpath(c[0].media[0].path) for c in (one, other)] == [str(guide / "COCO2017/train2017/a.jpg")] * 2
    with pytest.raises(SystemExit) as stop:
        llava_to_mllm.main([])
    assert stop.value.code == 2
    assert "already exists" in capsys.readouterr().err


# --- MindSpeed-MM's data JSON


def data_json(**changes) -> dict:
    """As it is in the guide; a change is named table__key."""
    tables = {
        "preprocess_parameters": {
            "model_name_or_path": "./ckpt/hf_path/Qwen2.5-VL-3B-Instruct",
            "use_fast_tokenizer": True,
            "split_special_tokens": False,
            "image_max_pixels": 262144,
            "image_min_pixels": 0,
            "video_max_pixels": 16384,
            "video_min_pixels": 0,
            "video_fps": 2.0,
            "video_maxlen": 64,
        },
        "basic_parameters": {
            "template": "qwen2vl",
            "dataset_dir": "./data",
            "dataset": "./data/mllm_format_llava_instruct_data.json",
            "cache_dir": "./data/cache_dir",
            "train_on_prompt": False,
            "mask_history": False,
            "preprocessing_batch_size": 1000,
            "preprocessing_num_workers": 16,
            "max_samples": None,
            "tool_format": None,
        },
        "attr": {
            "system": None,
            "images": "images",
            "videos": None,
            "messages": "messages",
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "observation_tag": None,
            "function_tag": None,
            "system_tag": None,
        },
    }
    for name, value in changes.items():
        table, _, key = name.partition("__")
        tables[{"process": "preprocess_parameters", "basic": "basic_parameters"}.get(table, table)][key] = value
    param = {"dataset_type": "huggingface", **tables}
    return {"dataset_param": param, "dataloader_param": {"dataloader_mode": "sampler"}}


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_the_data_json_of_the_guide(guide):
    (guide / "llava_instruct_150k.json").write_text(json.dumps(GOOD), encoding="utf-8")
    llava_to_mllm.main([])
    path = write(guide / "data_3b.json", data_json())
    assert is_data_json(path)
    assert not is_data_json(guide / "llava_instruct_150k.json")
    read = read_data_json(path)
    assert read.processor == "./ckpt/hf_path/Qwen2.5-VL-3B-Instruct"
    options = ChatOptions(**read.options)
    assert options == ChatOptions(
        image_max_pixels=262144,
        image_min_pixels=0,
        video_max_pixels=16384,
        video_min_pixels=0,
        video_fps=2.0,
        video_max_frames=64,
        resize="nearest",
    )
    assert read.validation == ()
    found = read_conversations(read.sources)
    assert len(found) == 3
    assert found[0].media == (Media("image", "./data/COCO2017/train2017/a.jpg"),)
    with pytest.raises(ValueError, match="is MindSpeed-MM's data JSON"):
        read_conversations([Source(path)])


def test_what_is_left_out_of_a_data_json_has_its_default_there(guide):
    content = data_json(basic__mask_history=True)
    param = content["dataset_param"]
    param["preprocess_parameters"] = {}
    read = read_data_json(write(guide / "d.json", content))
    assert read.processor is None
    assert dict(read.options) == {
        "image_max_pixels": 768 * 768,
        "image_min_pixels": 32 * 32,
        "video_max_pixels": 256 * 256,
        "video_min_pixels": 16 * 16,
        "video_fps": 2.0,
        "video_max_frames": 128,
        "mask_history": True,
        "train_on_prompt": False,
        "resize": "nearest",
    }


def test_several_files_and_names_of_ones_own(guide):
    turns = [{"who": "Q", "what": "<image>a"}, {"who": "A", "what": "b"}]
    record = {"talk": turns, "pics": ["a.jpg"], "before": "Be brief."}
    for name in ("x.json", "y.json"):
        write(guide / name, [record, record | {"talk": turns[:1]}, record])
    content = data_json(
        basic__dataset="data/x.json,data/y.json",
        basic__dataset_dir="data/COCO2017/train2017",
        basic__max_samples=5,
        basic__val_dataset="data/y.json",
        basic__val_max_samples=1,
        attr__messages="talk",
        attr__images="pics",
        attr__system="before",
        attr__role_tag="who",
        attr__content_tag="what",
        attr__user_tag="Q",
        attr__assistant_tag="A",
    )
    read = read_data_json(write(guide / "d.json", content))
    found = read_conversations(read.sources)
    assert [len(span) for span in found.spans] == [3, 2]
    assert [(turn.role, turn.parts) for turn in found[3].turns] == [
        ("system", ("Be brief.",)),
        ("user", (Media("image", "data/COCO2017/train2017/a.jpg"), "a")),
        ("assistant", ("b",)),
    ]
    with pytest.raises(ValueError, match="roles"):
        found[1]
    assert len(read_conversations(read.validation)) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"process__image_max_pixel": 5}, "image_max_pixel.* did you mean image_max_pixels"),
        ({"basic__datset": "x"}, "unknown key 'datset' in basic_parameters"),
        ({"attr__tag": "x"}, "unknown key 'tag' in attr"),
        ({"basic__cutoff_len": 512}, "cutoff_len .* --data.max_tokens"),
        ({"basic__tool_format": "qwen"}, "tool_format .* calls of tools"),
        ({"process__use_audio_in_video": True}, "use_audio_in_video .* sound"),
        ({"attr__ranking": True}, "ranking .* pairs of answers"),
        ({"attr__formatting": "alpaca"}, "only sharegpt is read"),
        ({"basic__template": "llama3"}, "template is 'llama3'"),
        ({"basic__val_rate": 0.1}, "val_rate is 0.1: name a file"),
        ({"basic__dataset": None}, "no dataset"),
        ({"basic__max_samples": -1}, "max_samples is -1"),
        ({"basic__dataset_dir": 5}, "dataset_dir is 5"),
    ],
)
def test_a_data_json_that_asks_for_what_is_not_done(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_data_json(write(tmp_path / "d.json", data_json(**changes)))


def test_a_data_json_of_another_kind(tmp_path):
    content = data_json()
    content["dataset_param"]["dataset_type"] = "t2v"
    with pytest.raises(ValueError, match="dataset_type is 't2v'"):
        read_data_json(write(tmp_path / "d.json", content))
    with pytest.raises(ValueError, match="no dataset_param"):
        read_data_json(write(tmp_path / "e.json", {"a": 1}))


# --- show


class Piece(NamedTuple):
    text: str
    trained: bool
    times: int


@dataclass
class Letters:
    """A processing in which a letter is a token, and a picture a square of four by its size."""

    options: ChatOptions
    identity: str = "letters"

    def measure(self, conversation: Conversation) -> Size:
        return Size(len(self.encode(conversation).input_ids), 16 * len(conversation.media))

    def show(self, conversation: Conversation) -> list[Piece]:
        pieces = []
        for turn in conversation.turns:
            for part in turn.parts:
                trained = turn.role == "assistant"
                pieces += [Piece("#", False, 4)] if isinstance(part, Media) else [Piece(c, trained, 1) for c in part]
        return pieces

    def encode(self, conversation: Conversation) -> Encoded:
        ids, labels, rows = [], [], []
        for piece in self.show(conversation):
            begin = max(rows[-1]) + 1 if rows else 0
            ids += [ord(piece.text)] * piece.times
            labels += [ord(piece.text) if piece.trained else -100] * piece.times
            square = [(begin, begin + n // 2, begin + n % 2) for n in range(4)]
            rows += square if piece.times == 4 else [(begin,) * 3]
        many = len(conversation.media)
        return Encoded(
            torch.tensor(ids),
            torch.tensor(labels),
            torch.tensor(rows).T,
            torch.zeros(16 * many, 3),
            torch.tensor([[1, 4, 4]] * many).reshape(-1, 3),
        )


def load(folder: Path, options: ChatOptions) -> Letters:
    return Letters(options)


def test_show(guide, capsys):
    path = write(guide / "d.json", [*GOOD[:2], GOOD[0] | {"image": "b.jpg"}, GOOD[2]])
    show.main([str(path), "--media", str(guide / "COCO2017/train2017"), "--failures", str(guide / "f.jsonl")])
    said = capsys.readouterr().out
    assert "d.json: 4 conversations" in said
    assert "2 can be used, 2 cannot; 1 different images" in said
    assert "1 with images; 1 with only text\n" in said
    assert "missing_media: 1, e.g. d.json[2]" in said
    assert "b.jpg is not there, did you mean a.jpg?" in said
    assert "d.json[0]: 2 turns, 1 image\n" in said
    assert "  user      | <image 0: " in said
    assert (
        "a.jpg, 4 x 6>\n            | What is \\x1b[31mit?\n  assistant | A cat.\n            | \\u202eYes.\n" in said
    )
    assert "\x1b" not in said
    assert len((guide / "f.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_show_tokens(guide, capsys):
    path = write(guide / "d.json", GOOD[:2])
    media = ["--media", str(guide / "COCO2017/train2017")]
    own = ["--processor", str(guide), "--load", f"{__name__}:load"]
    show.main([str(path), *media, *own, "--sample", "0", "--sample", "d.json[1]"])
    first, second = capsys.readouterr().out.split("d.json[0]:")[1].split("d.json[1]:")
    assert "33 tokens, 12 of them trained; 16 patches" in first
    assert "#(4 times)\nWhat is \\x1b[31mit?[[A cat.\n\\u202eYes.]]" in first
    assert "image 0: grid 1 x 4 x 4, 16 patches" in first
    assert "tokens 0 to 3: time 0 to 0, height 0 to 1, width 0 to 1\n  tokens 4 to 32: positions 2 to 30\n" in first
    assert '\u4f60\u597d[[ "Hi" ]]' in second
    assert "tokens 0 to 7: positions 0 to 7" in second


def test_show_reads_a_data_json_with_its_options(guide, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(show, "_load", lambda name, folder, options: seen.append(options) or Letters(options))
    write(guide / "mllm_format_llava_instruct_data.json", GOOD[:1])
    path = write(guide / "data_3b.json", data_json())
    show.main([str(path), "--processor", "x", "--chat", "video_fps=4", "--chat", "newline=false", "--sample", "0"])
    assert "not needed here: use_fast_tokenizer" in capsys.readouterr().out
    (options,) = seen
    assert (options.image_max_pixels, options.video_fps, options.newline) == (262144, 4.0, False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.json"], "nowhere.json is not there"),
        (["d.json", "--sample", "9"], "there are 2 conversations, 0 to 1: not 9"),
        (["d.json", "--sample", "x"], "no conversation is x"),
        (["d.json", "--chat", "fps=2"], "the keys are image_min_pixels"),
        (["d.json", "--chat", "video_fps=fast"], "video_fps=fast: it must be "),
        (["d.json", "--processor", ".", "--load", "mm_data.nothing:load"], "cannot be imported"),
    ],
)
def test_show_refuses_in_one_line(arguments, said, guide, capsys, monkeypatch):
    monkeypatch.chdir(guide)
    write(guide / "d.json", GOOD[:2])
    with pytest.raises(SystemExit) as stop:
        show.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in error
    assert error.count("\n") == 1


def test_a_reader_that_ends_is_no_error(guide):
    write(guide / "d.json", [GOOD[1] | {"id": "x" * 100}] * 5)
    samples = " ".join(["--sample 1"] * 3000)
    command = f"{sys.executable} -m mm_data.show {guide / 'd.json'} {samples} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 conversations" in done.stdout
