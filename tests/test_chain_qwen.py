"""MindSpeed-MM's quick start of Qwen2.5-VL on toy files, in real processes: convert, train, convert back, ask.

Its commands are as it prints them. Numbers of layers are those of the 3B; all else of the model is tiny.
"""

import json
import shlex
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mm_convert import diff, open_checkpoint
from mm_data.chat_options import ChatOptions
from mm_models.processors import load
from mm_models.qwen2_5_vl.testing import tiny_config, write_hub_folder
from mm_train.recipe import load_config
from mm_train.train import train

SIZES = {"tied": True, "num_layers": 36, "vision_layers": 32, "full_attention_layers": (7, 15, 23, 31)}
SIZES |= {"dim": 32, "num_heads": 2, "num_kv_heads": 1, "vision_dim": 32, "vision_heads": 2, "vision_ffn_dim": 48}
HUB = Path("ckpt/hf_path/Qwen2.5-VL-3B-Instruct")
HF_TO_MM = """
mm-convert  Qwen2_5_VLConverter hf_to_mm \\
  --cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.parallel_config.llm_pp_layers [[36]] \\
  --cfg.parallel_config.vit_pp_layers [[32]] \\
  --cfg.parallel_config.tp_size 1
"""
MM_TO_HF = """
mm-convert  Qwen2_5_VLConverter mm_to_hf \\
  --cfg.save_hf_dir "ckpt/mm_to_hf/Qwen2.5-VL-3B-Instruct" \\
  --cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.parallel_config.llm_pp_layers [36] \\
  --cfg.parallel_config.vit_pp_layers [32] \\
  --cfg.parallel_config.tp_size 1
"""
LOAD_PATH = "ckpt/mm_path/Qwen2.5-VL-3B-Instruct"
SAVE_PATH = "save_dir"
BACK = Path("ckpt/mm_to_hf/Qwen2.5-VL-3B-Instruct")
DATA_3B = {  # the fields that the guide prints, and beside them those of the file that it shortens to "..."
    "dataset_param": {
        "dataset_type": "huggingface",
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
            "system_tag": None,
            "observation_tag": None,
            "function_tag": None,
        },
    },
    "dataloader_param": {
        "dataloader_mode": "sampler",
        "drop_last": True,
        "sampler_type": "BaseRandomBatchSampler",
        "collate_param": {"model_name": "qwen2vl", "ignore_pad_token_for_loss": True},
        "pin_memory": True,
        "shuffle": True,
    },
}


def run(place: Path, command: str) -> str:
    """What it says; program and arguments as in a shell."""
    program, *words = shlex.split(command.replace("\\\n", " "))
    start = {"mm-convert": ["-m", "mm_convert"], "torchrun": ["-m", "torch.distributed.run"], "python": []}[program]
    done = subprocess.run([sys.executable, *start, *words], cwd=place, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of the guide, once weights and data are downloaded, and the data converted."""
    place = tmp_path_factory.mktemp("guide")
    write_hub_folder(place / HUB, tiny_config(**SIZES), texts=())
    (place / "data/COCO2017/train2017").mkdir(parents=True)
    random, items = np.random.default_rng(0), []
    for i in range(8):
        name = f"{i:012d}.jpg"
        Image.fromarray(random.integers(0, 256, (60, 80 + 8 * i, 3), np.uint8)).save(
            place / "data/COCO2017/train2017" / name
        )
        turns = [("human", "What is this?\n<image>"), ("gpt", f"Number {i}."), ("human", "Sure?"), ("gpt", "Yes.")]
        said = [{"from": role, "value": value} for role, value in turns]
        items.append({"id": str(i), "image": name, "conversations": said})
    items.append({"id": "gone", "image": "gone.jpg", "conversations": said})
    (place / "data/llava_instruct_150k.json").write_text(json.dumps(items), encoding="utf-8")
    said = run(place, "python -m mm_data.llava_to_mllm")
    assert "8 conversations written to data/mllm_format_llava_instruct_data.json, 1 left out" in said
    (place / "examples/qwen2.5vl").mkdir(parents=True)
    (place / "examples/qwen2.5vl/data_3b.json").write_text(json.dumps(DATA_3B), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def expected(place):
    """The first loss of the weights as they were downloaded, on one device, in this process."""
    return first_loss(place, place / HUB, "hub")


def first_loss(place: Path, weights: Path, name: str) -> float:
    words = train_command(str(weights), str(place / name), 1)[1]
    with chdir(place):
        train(load_config(words))
    return rows_of(place / name)[0]["loss"]


def train_command(weights: str, output: str, steps: int) -> tuple[str, list[str]]:
    """The command of docs/qwen2_5_vl.md for the guide's script, on two ranks; and its arguments."""
    command = f"""torchrun --standalone --nproc_per_node 2 -m mm_train --model qwen2.5-vl-3b --weights {weights} \\
        --data.conversations examples/qwen2.5vl/data_3b.json --data.seq_length 1024 --output {output} \\
        --parallel.llm_pp_layers [[36]] --parallel.vit_pp_layers [[32]] --checkpoint.every 5000 --log_tps"""
    toy = ["--model", "qwen2.5-vl-tiny", "--recipe", "qwen2.5-vl-3b", "--architecture", json.dumps(SIZES)]
    toy += ["--steps", str(steps), "--data.global_batch", "4", "--optim.warmup", "0", "--optim.lr", "1e-3"]
    command = f"{command} {shlex.join([*toy, '--dtype', 'float32'])}"
    words = shlex.split(command.replace("\\\n", " "))
    return command, words[words.index("mm_train") + 1 :]


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.long
def test_the_quick_start(place, expected):
    """Each step by the guide's own command, or the one that docs/qwen2_5_vl.md has in its place."""
    run(place, HF_TO_MM)
    said = run(place, train_command(LOAD_PATH, SAVE_PATH, 2)[0])
    assert "language  566,816 parameters, 566,816 trained" in said
    assert "vision    326,400 parameters, none trained" in said
    assert "Consumed Tokens per Second: " in said
    losses = [row["loss"] for row in rows_of(place / SAVE_PATH)]
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]

    run(place, MM_TO_HF)
    assert not any(diff(place / BACK, place / HUB))
    with pytest.raises(ValueError, match=r"missing: visual.*only what is trained; whole weights are in weights/ of a"):
        open_checkpoint(place / SAVE_PATH)
    run(place, f"{MM_TO_HF.replace(LOAD_PATH, f'{SAVE_PATH}/weights')} --overwrite")  # mm_dir: the tuned weights
    assert not any(diff(place / BACK, place / SAVE_PATH / "weights"))
    tuned, released = open_checkpoint(place / BACK), open_checkpoint(place / HUB)
    moved = {name for name in tuned if not torch.equal(tuned[name], released[name])}
    assert {name.split(".")[0] for name in moved} == {"model"}

    picture = next((place / "data/COCO2017/train2017").iterdir())
    ask = f"""python -m mm_infer.chat --weights {BACK} --image {picture} --prompt "What is this?" \\
        --max_new_tokens 6 --dtype float32"""
    assert run(place, ask).strip() == answer_of_transformers(place / BACK, picture, "What is this?").strip()


def answer_of_transformers(folder: Path, picture: Path, question: str) -> str:
    """By its classes alone; only tokens that no answer may have are said by us."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processing = load(folder, ChatOptions())
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)([Image.open(picture)], return_tensors="pt")
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    pads = "<|image_pad|>" * int(images["image_grid_thw"].prod() // 4)
    inputs = tokenizer(text.replace("<|image_pad|>", pads), return_tensors="pt")
    mm_types = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    options = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [*processing.banned_ids]}
    written = model.generate(**inputs, **images, mm_token_type_ids=mm_types, **options)
    return processing.read_answer(written[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.long
def test_mindspeed_mms_own_tree(place, expected):
    """What its own converter would have written, in its names."""
    run(place, f"{HF_TO_MM.replace(LOAD_PATH, 'ckpt/tree')} --cfg.target_layout mindspeed")
    assert open_checkpoint(place / "ckpt/tree").layout == "mindspeed"
    assert first_loss(place, place / "ckpt/tree", "tree") == pytest.approx(expected, rel=1e-6)
