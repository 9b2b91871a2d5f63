"""A model that was trained says in mm_infer.chat what it said while it was trained."""

import json

import numpy as np
import pytest
from PIL import Image

from mm_infer import chat
from mm_models.qwen2_5_vl.testing import write_hub_folder
from mm_train.recipe import load_config
from mm_train.train import train


@pytest.mark.parametrize("lora", [False, True])
def test_answers_are_the_same_while_training_and_afterwards(tmp_path, lora):
    """Half trained, so that answers are neither noise nor all right; the first turns of a conversation are part of
    its question.
    """
    hub, items = write_hub_folder(tmp_path / "hub", texts=()), []
    random = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(random.integers(0, 256, (56 + 28 * i, 84, 3), np.uint8)).save(tmp_path / f"{i}.png")
        turns = [("user", f"<image>What is number {i}?"), ("assistant", f"It is {'abcdef'[i] * 3}.")]
        turns += [("user", "And the next?"), ("assistant", f"{i + 1}.")] if i % 2 else []
        said = [{"role": role, "content": content} for role, content in turns]
        items.append({"messages": said, "images": [f"{i}.png"]})
    (tmp_path / "all.json").write_text(json.dumps(items), encoding="utf-8")
    options = ["--data.chat.image_max_pixels", "6272", "--data.workers", "0", "--dtype", "float32"]
    asked = ["--sample.from_validation", "6", "--sample.max_new_tokens", "16"]
    rate = ["--lora.rank", "8", "--optim.lr", "2e-2"] if lora else ["--optim.lr", "3e-3"]
    made = train(
        load_config(
            [
                *("--model", "qwen2.5-vl-tiny", "--weights", str(hub), "--output", str(tmp_path / "run")),
                *("--data.conversations", str(tmp_path / "all.json"), "--data.global_batch", "6", "--steps", "12"),
                *("--validation.conversations", str(tmp_path / "all.json"), *options, *asked, *rate),
            ]
        )
    )
    weights = ["--weights", str(hub), "--lora", str(made)] if lora else ["--weights", str(made)]
    chat.main(
        [
            *("--questions", str(tmp_path / "all.json"), "--output", str(tmp_path / "chat.jsonl"), *weights),
            *("--max_new_tokens", "16", "--dtype", "float32"),  # images as small as in training, unasked
        ]
    )
    first, second = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (tmp_path / "run/samples/step-00000012/answers.jsonl", tmp_path / "chat.jsonl")
    )
    assert first == second
    assert len({one["answer"] for one in first}) > 1
    assert {one["reference"] for one in first} == {"It is aaa.", "2.", "It is ccc.", "4.", "It is eee.", "6."}
