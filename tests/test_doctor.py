"""Before a launch: documented commands hold on right data, and each of 200 with one thing wrong is caught by name."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mm_convert import save_checkpoint, save_lora
from mm_convert.cli.arguments import parse
from mm_convert.cli.checks import Finding, find
from mm_data import FeatureCache, write_video
from mm_infer import chat
from mm_infer.checks import CHECKS as OF_VIDEOS
from mm_infer.checks import Asked as AskedVideos
from mm_infer.config import Config as InferConfig
from mm_models import build, opensoraplan, wan
from mm_models.families import find as find_preset
from mm_models.lora import LoRAConfig, add_lora
from mm_models.opensoraplan import testing as opensoraplan_testing
from mm_models.qwen2_5_vl.testing import write_hub_folder
from mm_models.wan import testing as wan_testing
from mm_train.checks import CHECKS, Asked
from mm_train.objective import build_objective
from mm_train.recipe import load_config
from mm_train.start import outline

sys.path.insert(0, str(Path(__file__).parent))
from test_readme import Command, commands

TINY = {
    **dict.fromkeys(("wan2.1-t2v-1.3b", "wan2.1-t2v-14b"), "wan-tiny"),
    **dict.fromkeys(("wan2.1-i2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p"), "wan-tiny-i2v"),
    "wan2.2-t2v-a14b": "wan-tiny-a14b",
    **dict.fromkeys(("vace-1.3b", "vace-14b"), "wan-tiny-vace"),
    **dict.fromkeys(("opensoraplan-1.2", "opensoraplan-1.2-29x480p"), "opensoraplan-tiny"),
    **dict.fromkeys((f"qwen2.5-vl-{size}b" for size in (3, 7, 32)), "qwen2.5-vl-tiny"),
}
CONDITIONS = {  # by what an objective stores: sizes behind the first dim
    "condition": lambda size, shape: (size, *shape),
    "control": lambda size, shape: (size, *shape),
    "control_mask": lambda size, shape: (size, *shape),
}
MUTANTS = 200


# --- the shop: everything that commands name, really written, and small


@dataclass
class Shop:
    """Folders by tiny model, and wrong copies of them, each made once."""

    root: Path
    made: dict[str, Path] = field(default_factory=dict)

    def copy(self, source: Path, name: str, spoil: Callable[[Path], None]) -> Path:
        """A copy of a file or folder with one thing wrong."""
        key = f"{source.relative_to(self.root)}-{name}".replace("/", "-")
        if key not in self.made:
            target = self.root / "wrong" / key
            target.parent.mkdir(exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
            spoil(target)
            self.made[key] = target
        return self.made[key]


def write_features(path: Path, model: str, task: str = "auto", count: int = 12, **other: int) -> Path:
    """other: sizes that are not as the model takes them."""
    random_ = torch.Generator().manual_seed(len(str(path)))
    config = load_config(["--model", model, "--objective.task", task, *(["--expert", "high"] * ("a14b" in model))])
    family, shape = find_preset(model)[0], find_preset(model)[1].config
    needed = dict(build_objective(config).stored) | other
    rows = other.get("rows", 4)
    with FeatureCache(path) as store:
        for i in range(count):
            size = (2, rows, 6) if i % 3 else (2, 6, rows)
            tensors = {"latents": torch.randn(needed["latents"], *size, generator=random_)}
            tensors["text.0"] = torch.randn(other.get("length", 3 + i % 4), needed["text"], generator=random_)
            for name in needed.keys() - {"latents", "text", "rows", "length"}:
                shaped = (needed[name], shape.image_dim) if name == "image" else (needed[name], *size)
                tensors[name] = torch.randn(shaped, generator=random_)
            store.put(f"{i:064d}", tensors, {"id": f"clip{i}.mp4"})
        store.put_empty_text(torch.randn(1, needed["text"], generator=random_))
        store.finish()
    assert family.video
    return path


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    root = tmp_path_factory.mktemp("shop")
    for name in dict.fromkeys(TINY.values()):
        folder = root / name
        family, preset = find_preset(name)
        if family.chat:
            write_hub_folder(folder / "W")
            _write_adapter(folder / "adapter", name)
            continue
        model = build(name)
        two = preset.boundary is not None
        for part in ("W/high_noise_model", "W/low_noise_model") if two else ("W/transformer",):
            save_checkpoint(folder / part, model.state_dict(), family.describe(model.config))
        testing = wan_testing if "wan" in name else opensoraplan_testing
        image = {"image_dim": 32} if "image_encoder" in family.video.encoders(preset.config) else {}
        testing.write_encoders(folder / "W", text_dim=64, **image)
        _write_adapter(folder / "adapter", name)
        write_features(folder / "features", name)
        write_features(folder / "held_out", name, count=4)
    _write_media(root)
    return Shop(root)


def _write_adapter(path: Path, name: str) -> None:
    model = add_lora(build(name), LoRAConfig(16, 32.0))
    save_lora(path, {n: p for n, p in model.state_dict().items() if ".lora_" in n}, 32.0, base=name)


def _write_media(root: Path) -> None:
    media = root / "media"
    media.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (56, 84, 3), np.uint8)).save(media / f"{i}.png")
        write_video(media / f"{i}.mp4", rng.integers(0, 255, (25, 48, 64, 3), np.uint8), fps=24)
    ask = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A shape."}]
    talks = [{"image": f"{i % 3}.png", "conversations": ask} for i in range(8)]
    (media / "talks.json").write_text(json.dumps(talks), encoding="utf-8")
    (media / "held_out.json").write_text(json.dumps(talks[:4]), encoding="utf-8")
    clips = [{"path": f"{i}.mp4", "cap": "a shape"} for i in range(3)]
    (media / "clips.json").write_text(json.dumps(clips), encoding="utf-8")
    (media / "data.txt").write_text(f"{media},{media}/clips.json\n", encoding="utf-8")
    (media / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    (media / "images.txt").write_text(f"{media}/0.png\n{media}/1.png\n", encoding="utf-8")


# --- documented commands, of tiny models and with paths into the shop


@dataclass(frozen=True)
class Asking:
    """A command: its program, flags with values in order, ranks."""

    program: str
    flags: tuple[tuple[str, str], ...]
    ranks: int

    def get(self, flag: str) -> str | None:
        return dict(self.flags).get(flag)

    def set(self, flag: str, value: str) -> Asking:
        return Asking(self.program, (*(pair for pair in self.flags if pair[0] != flag), (flag, value)), self.ranks)

    def drop(self, *flags: str) -> Asking:
        return Asking(self.program, tuple(pair for pair in self.flags if pair[0] not in flags), self.ranks)

    @property
    def argv(self) -> list[str]:
        return [f"{flag}={value}" for flag, value in self.flags]

    @property
    def model(self) -> str | None:
        return self.get("--model")


def pairs(words: list[str]) -> tuple[tuple[str, str], ...]:
    flags: list[tuple[str, str]] = []
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            following = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else "true"
            flags.append((name, value if equals else following))
    return tuple(flags)


def shrink(command: Command, shop: Shop) -> Asking | None:
    """The documented command of a tiny model of its kind; None where there is none."""
    program, words, ranks = command
    flags = dict(pairs(words))
    named = re.sub(r"-(lora|full)$", "", flags.get("--recipe", "")) or flags.get("--model", "")
    if program == "mm_infer.chat":
        named = "qwen2.5-vl-3b"
    if named not in TINY or "--config" in flags or "flf2v" in flags.get("--objective.task", ""):
        return None
    name = TINY[named]
    folder, media = shop.root / name, shop.root / "media"
    asking = Asking(program, tuple(flags.items()), ranks)
    layout = [flag for flag in flags if flag.endswith("pp_layers") or flag.startswith("--data.interleaved")]
    asking = asking.drop(*layout, "--sampler", "--data.seq_length", "--text_tokens", "--geometry.rule")
    given = {
        "--weights": folder / "W",
        "--encoders": folder / "W",
        "--data.encoders": folder / "W",
        "--data.features": folder / "features",
        "--data.manifest": media / "data.txt",
        "--data.conversations": media / "talks.json",
        "--data.media": media,
        "--data.processor": folder / "W",
        "--processor": folder / "W",
        "--validation.conversations": media / "held_out.json",
        "--lora": folder / "adapter",
        "--image": media / "0.png",
        "--last_image": media / "1.png",
        "--video": media / "0.mp4",
        "--mask": media / "1.png",
        "--references": f'["{media}/1.png","{media}/2.png"]',
        "--prompt_file": media / "prompts.txt",
        "--image_file": media / "images.txt",
        "--questions": media / "held_out.json",
        "--media": media,
        "--output": shop.root / "out" / "new",
    }
    if flags.get("--image", "").startswith("["):
        given["--image"] = f'["{media}/0.png","{media}/1.png"]'
    for flag, value in given.items():
        if flag in flags:
            asking = asking.set(flag, str(value))
    if program == "mm_infer.chat":
        return asking.drop("--model").set("--output", str(shop.root / "out" / "answers.jsonl"))
    asking = asking.set("--model", name)
    if program == "mm_infer":
        small = {"--frames": "5", "--height": "32", "--width": "48", "--steps": "3"}
        for flag, value in small.items():
            asking = asking.set(flag, value)
        return asking
    if "--recipe" in flags and "lora" not in flags["--recipe"]:
        asking = asking.drop("--recipe")
    if "--data.manifest" in flags:
        for flag, value in {"num_frames": "5", "max_height": "32", "max_width": "48", "fps": "24"}.items():
            asking = asking.set(f"--data.geometry.{flag}", value)
    if "--memory.recompute" not in flags:
        asking = asking.set("--memory.recompute", "full")
    return asking if "--data.global_batch" in flags else asking.set("--data.global_batch", "32")


@cache
def documented() -> tuple[Command, ...]:
    return tuple(
        (program, tuple(words), ranks)
        for program, words, ranks in commands()
        if program in ("mm_train", "mm_infer", "mm_infer.chat")
    )


def shrunk(shop: Shop) -> list[Asking]:
    found = [asking for program, words, ranks in documented() if (asking := shrink((program, list(words), ranks), shop))]
    return list(dict.fromkeys(found))


def examine(asking: Asking, capsys) -> list[Finding]:
    """What all checks find; a command line that cannot be read is a finding, too."""
    try:
        if asking.program == "mm_train":
            return list(find(CHECKS, Asked(load_config(asking.argv), asking.ranks)))
        if asking.program == "mm_infer":
            return list(find(OF_VIDEOS, AskedVideos(parse(InferConfig, asking.argv, prog="infer"), asking.ranks)))
        return list(find(chat.CHECKS, chat.Asked(parse(chat.Config, asking.argv, prog="chat"))))
    except SystemExit as stop:
        assert stop.code == 2
        return [Finding("command line", "fails", capsys.readouterr().err)]


def test_documented_commands_hold_on_right_data(shop, capsys):
    """In small: each of another shape, of every program and family."""
    asked = shrunk(shop)
    assert len(asked) >= 60
    assert {asking.program for asking in asked} == {"mm_train", "mm_infer", "mm_infer.chat"}
    assert {asking.model for asking in asked} >= {*TINY.values()}
    failing = {
        asking: wrong
        for asking in asked
        if (wrong := [finding for finding in examine(asking, capsys) if finding.state == "fails"])
    }
    assert not failing, "\n".join(f"{asking.argv}: {found}" for asking, found in failing.items())
