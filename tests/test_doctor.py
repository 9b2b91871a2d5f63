"""Before a launch: documented commands hold on right data, and each of 200 with one thing wrong is caught by name."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from math import prod
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
from mm_infer.__main__ import main as infer_main
from mm_infer.checks import CHECKS as OF_VIDEOS
from mm_infer.checks import Asked as AskedVideos
from mm_infer.config import Config as InferConfig
from mm_models import build
from mm_models.families import find as find_preset
from mm_models.libraries import NEEDED, check_libraries
from mm_models.lora import LoRAConfig, add_lora
from mm_models.opensoraplan import testing as opensoraplan_testing
from mm_models.qwen2_5_vl.testing import write_hub_folder
from mm_models.wan import testing as wan_testing
from mm_parallel.testing import spawn
from mm_train import doctor
from mm_train.checks import CHECKS, Asked
from mm_train.objective import build_objective
from mm_train.recipe import load_config

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
ENCODERS = (("--data.encoders", "data"), ("--encoders", "encoders"))  # flags, and which check looks at them first
ASK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A shape."}]


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
            target = self.root / "wrong" / key / source.name
            target.parent.mkdir(parents=True)
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
    talks = [{"image": f"{i % 3}.png", "conversations": ASK} for i in range(8)]
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
    named = re.sub(r"-(lora(-24gb)?|full)$", "", flags.get("--recipe", "")) or flags.get("--model", "")
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
        "--sample.encoders": folder / "W",
        "--sample.lora": folder / "adapter",
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
    found = [
        asking for program, words, ranks in documented() if (asking := shrink((program, list(words), ranks), shop))
    ]
    return list(dict.fromkeys(found))


def examine(asking: Asking, capsys) -> list[Finding]:
    """What all checks find; a command line that cannot be read is a finding, too."""
    try:
        if asking.program == "mm_train":
            return list(find(CHECKS, Asked(load_config(asking.argv), asking.ranks)))
        if asking.program == "mm_infer":
            return list(find(OF_VIDEOS, AskedVideos(parse(InferConfig, asking.argv, prog="infer"), asking.ranks)))
        return list(find(chat.CHECKS, chat.Asked(parse(chat.Config, asking.argv, prog="chat"))))
    except SystemExit:
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


# --- one thing wrong


@dataclass(frozen=True)
class Mutation:
    """`make(asking, shop)` gives the command with one thing wrong, or None where it has no such thing."""

    name: str
    checks: tuple[str, ...]
    """One of these fails."""
    told: str
    """A pattern of what it must say: the flag, the file, the number."""
    make: Callable[[Asking, Shop], Asking | None]


def edit_json(name: str, **changes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return edit


def file_of(folder: Path) -> Path:
    """Of the transformer (of two, that for high noise), or of an adapter."""
    places = (folder / "transformer", folder / "high_noise_model", folder)
    return next(file for place in places for file in sorted(place.glob("*.safetensors")))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = file_of(folder)
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        file.with_name("model.safetensors.index.json").unlink(missing_ok=True)  # which would know it already

    return edit


def truncate(pattern: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = sorted(folder.rglob(pattern))[-1]
        os.truncate(file, file.stat().st_size * 2 // 3)

    return cut


def truncate_weights(folder: Path) -> None:
    file = file_of(folder)
    os.truncate(file, file.stat().st_size * 2 // 3)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.one"] = tensors.pop(sorted(tensors)[0])


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    tensors[name] = tensors[name][:, :-1].contiguous()


def make_whole(tensors: dict[str, torch.Tensor]) -> None:
    """Integers, as of quantised weights."""
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    tensors[name] = tensors[name].to(torch.int8)


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[-1]]


def remove(*names: str) -> Callable[[Path], None]:
    def unlink(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    return unlink


def typo(flag: str, *checks: str) -> Mutation:
    def make(asking: Asking, shop: Shop) -> Asking | None:
        value = asking.get(flag)
        return asking.set(flag, f"{value}x") if value and "/" in value and "," not in value else None

    return Mutation(f"typo of {flag}", checks, r"x\b", make)


def setting(flag: str, value: str, *checks: str, told: str = "", when: str = "", ranks: int = 0) -> Mutation:
    """Another value of a flag, of commands that have the flag `when`."""

    def make(asking: Asking, shop: Shop) -> Asking | None:
        if asking.program != "mm_train" or (when and not asking.get(when)) or (ranks and asking.ranks != ranks):
            return None
        return asking.set(flag, value)

    return Mutation(f"{flag} {value}", checks, told or re.escape(flag), make)


def spoilt(flag: str, name: str, spoil: Callable[[Path], None], *checks: str, told: str, only: str = "") -> Mutation:
    """A copy of what a flag names, with one thing wrong. only: a pattern of the model."""

    def make(asking: Asking, shop: Shop) -> Asking | None:
        value = asking.get(flag)
        model = asking.model or "qwen2.5-vl-tiny"
        if not value or "," in value or not re.search(only, model):
            return None
        if flag == "--weights" and "a14b" in model and asking.get("--expert") == "low":
            return None  # the first file is that of the other expert
        return asking.set(flag, str(shop.copy(Path(value), name, spoil)))

    return Mutation(f"{flag} {name}", checks, told, make)


def other_features(name: str, *checks: str, told: str, only: str = "", **other: int) -> Mutation:
    def make(asking: Asking, shop: Shop) -> Asking | None:
        flag = "--data.features"
        if not asking.get(flag) or not re.search(only, asking.model):
            return None
        key = f"{asking.model}-{name}"
        if key not in shop.made:
            shop.made[key] = write_features(shop.root / "wrong" / key, asking.model, **other)
        return asking.set(flag, str(shop.made[key]))

    return Mutation(f"features {name}", checks, told, make)


def swap(flag: str, value: Callable[[Asking, Shop], Path | str | None], name: str, *checks: str, told: str) -> Mutation:
    """What lies elsewhere in the shop, in place of what a flag names."""

    def make(asking: Asking, shop: Shop) -> Asking | None:
        other = value(asking, shop) if asking.get(flag) else None
        return None if other is None else asking.set(flag, str(other))

    return Mutation(f"{flag}: {name}", checks, told, make)


def go_on(**changes: str) -> Callable[[Asking, Shop], Asking | None]:
    """A LoRA run that goes on from the adapter in the shop, with other numbers."""

    def make(asking: Asking, shop: Shop) -> Asking | None:
        if asking.program != "mm_train" or "lora" not in (asking.get("--recipe") or ""):
            return None
        asking = asking.set("--lora.rank", "16").set("--lora.alpha", "32")
        asking = asking.set("--lora.weights", str(shop.root / asking.model / "adapter"))
        for name, value in changes.items():
            asking = asking.set(f"--lora.{name}", value)
        return asking

    return make


def of_lora(spoil: Callable[[Path], None], name: str) -> Callable[[Asking, Shop], Asking | None]:
    def make(asking: Asking, shop: Shop) -> Asking | None:
        asking = go_on()(asking, shop)
        return asking and asking.set("--lora.weights", str(shop.copy(Path(asking.get("--lora.weights")), name, spoil)))

    return make


def write_file(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        target = folder if folder.is_file() else folder / name
        target.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def in_videos(flag: str, value: str, *checks: str, told: str, ranks: int = 0) -> Mutation:
    def make(asking: Asking, shop: Shop) -> Asking | None:
        fits = asking.program == "mm_infer" and (not ranks or asking.ranks == ranks)
        return asking.set(flag, value) if fits else None

    return Mutation(f"mm_infer {flag} {value}", checks, told, make)


def wrong_flag(asking: Asking, shop: Shop) -> Asking | None:
    name = next((flag for flag, _ in asking.flags if "." in flag), "--output")
    return asking.drop(name).set(f"{name[:-1]}q", asking.get(name))


PARSED = "command line"
OTHERS = "(wan-tiny-vace|opensoraplan|wan-tiny-i2v)"
MUTATIONS = [
    # paths
    *(typo(flag, "weights", "data", "encoders", "processor", "resume") for flag in ("--weights",)),
    *(typo(flag, "data") for flag in ("--data.features", "--data.manifest", "--data.encoders")),
    *(typo(flag, "data") for flag in ("--data.conversations", "--data.media", "--validation.conversations")),
    *(typo(flag, "data", "weights") for flag in ("--data.processor", "--processor")),
    *(typo(flag, "adapter", "weights") for flag in ("--lora",)),
    *(typo(flag, "encoders") for flag in ("--encoders",)),
    *(typo(flag, "task", "question") for flag in ("--image", "--video", "--mask")),
    *(typo(flag, "requests") for flag in ("--prompt_file", "--image_file")),
    typo("--questions", "question"),
    Mutation("a flag that is none", (PARSED,), r"option --\S*q, did you mean", wrong_flag),
    # numbers
    setting("--model", "wan-tinny", PARSED, "model", told="wan-tinny"),
    setting("--recipe", "wan-big", PARSED, told="wan-big"),
    setting("--steps", "many", PARSED),
    setting("--optim.lr", "2", PARSED),
    setting("--data.global_batch", "7", "layout", told="global[ _]batch (of )?7", ranks=8),
    setting("--data.micro_batch", "5", "layout", told="micro-batches of 5"),
    setting("--optim.warmup", "900000", "learning rate"),
    setting("--optim.min_lr", "0.5", "learning rate"),
    setting("--objective.range", "[0.9,0.1]", "objective", "model"),
    Mutation(
        "a boundary of one model",
        ("objective",),
        "--objective.boundary 0.5",
        lambda a, s: (
            a.set("--objective.boundary", "0.5") if a.get("--data.features") and not a.get("--expert") else None
        ),
    ),
    setting("--objective.task", "t3v", "model"),
    setting("--architecture", '{"num_layer": 4}', "model", told="num_layer"),
    setting("--architecture", '{"num_layers": 3}', "tensors", "model in layout", told="num_layers|layers"),
    setting("--trained", '["block.*"]', "what is trained", "model in layout", told="trained"),
    setting("--lora.targets", '["qq"]', "model in layout", "what is trained", told="qq", when="--recipe"),
    setting("--sample.prompts", '["a cat"]', "samples", told="--sample", when="--data.features"),
    setting("--sample.from_validation", "3", "samples", told="--sample", when="--data.features"),
    setting("--validation.answers", "100", "data", "options"),
    setting("--data.boxes", "original", "options", when="--data.features"),
    setting("--data.text_dropout", "0.1", "options", when="--data.conversations"),
    setting("--log_tps", "true", "options", when="--data.features"),
    setting("--data.max_tokens", "16", "sample", told="conversations", when="--data.conversations"),
    # layouts
    setting("--parallel.tp", "3", "layout", "model in layout", told="tp", ranks=8),
    setting("--parallel.cp", "3", "layout", told="3", ranks=8),
    setting("--parallel.dp_shard", "5", "layout", told="dp_shard=5"),
    setting("--parallel.pp_layers", "[9,9]", "model in layout", told=r"\[9, 9\]", ranks=8),
    setting("--parallel.pp_layers", "[1,1,1]", "layout", "model in layout", told="stages|pp_layers", ranks=8),
    setting("--memory.recompute", "77", "model in layout", told="recompute=77"),
    setting("--memory.offload", "attention", "model in layout", told="offload"),
    # weights
    spoilt("--weights", "renamed", edit_tensors(rename), "tensors", "weights", told="blocks.one"),
    spoilt("--weights", "reshaped", edit_tensors(reshape), "tensors", "weights", told=r"\[|\("),
    spoilt("--weights", "of integers", edit_tensors(make_whole), "tensors", "weights", told="int8|I8|quantis"),
    spoilt("--weights", "without one", edit_tensors(drop_one), "tensors", "weights", told="missing"),
    spoilt("--weights", "cut off", truncate_weights, "tensors", "weights", told="is truncated"),
    swap(
        "--weights",
        lambda a, s: s.root / ("opensoraplan-tiny" if "wan" in (a.model or "") else "wan-tiny") / "W",
        "another family",
        "tensors",
        "weights",
        "data",
        told="of wan|opensoraplan|question|tokenizer|holds",
    ),
    swap(
        "--weights",
        lambda a, s: s.root / (a.model or "qwen2.5-vl-tiny") / "adapter",
        "an adapter",
        "tensors",
        "weights",
        "data",
        told="adapter|tokenizer",
    ),
    swap(
        "--weights",
        lambda a, s: s.root / a.model / "W/low_noise_model" if a.get("--expert") == "high" else None,
        "the other expert",
        "tensors",
        told="low noise",
    ),
    # features
    other_features("of another width", "features", told="width 63", text=63),
    other_features("of other channels", "features", told="latents of 12 channels", latents=12),
    other_features("of an odd size", "sample", told="5 rows|5 columns", rows=5),
    Mutation(
        "too few samples",
        ("batches",),
        "no bucket is left",
        lambda a, s: (
            a.set("--data.small_buckets", "drop").set("--data.global_batch", "64")
            if a.get("--data.features") and a.ranks == 8
            else None
        ),
    ),
    other_features("of long texts", "features", told="rows", length=600),
    swap(
        "--data.features",
        lambda a, s: s.root / "wan-tiny" / "features" if re.search("i2v|vace", a.model) else None,
        "of another task",
        "features",
        told="conditioned|does not hold",
    ),
    spoilt(
        "--data.features", "cut off", truncate("shards/*.safetensors"), "features", "sample", told="damaged or cut off"
    ),
    spoilt("--data.features", "unfinished", remove("dataset.jsonl"), "features", told="has not finished"),
    spoilt("--data.features", "without shards", remove("shards"), "features", told="is gone"),
    # encoders
    *(
        spoilt(
            flag,
            f"without {part}",
            remove(part),
            check,
            "encoders",
            told=re.escape(part.split("/")[0]),
            only="wan|open",
        )
        for flag, check in ENCODERS
        for part in ("vae", "tokenizer", "text_encoder/config.json")
    ),
    *(
        spoilt(
            flag,
            "with no words",
            remove("tokenizer/tokenizer.json"),
            check,
            "encoders",
            told="tokenizer",
            only="wan|open",
        )
        for flag, check in ENCODERS
    ),
    *(
        spoilt(
            flag,
            "with cut text",
            truncate("text_encoder/*.safetensors"),
            check,
            "encoders",
            told="text_encoder",
            only="wan|open",
        )
        for flag, check in ENCODERS
    ),
    *(
        spoilt(
            flag,
            "of other widths",
            edit_json("text_encoder/config.json", d_model=48),
            check,
            "encoders",
            told="48|width",
            only="wan|open",
        )
        for flag, check in ENCODERS
    ),
    *(
        spoilt(
            flag,
            "with few words",
            edit_json("text_encoder/config.json", vocab_size=100),
            check,
            "encoders",
            told="token",
            only="wan|open",
        )
        for flag, check in ENCODERS
    ),
    # conversations
    spoilt(
        "--data.conversations",
        "without pictures",
        write_file("", json.dumps([{"image": "gone.png", "conversations": ASK}])),
        "sample",
        told="gone.png",
    ),
    spoilt("--data.conversations", "broken", write_file("", "[{"), "sample", told="talks.json"),
    spoilt("--data.conversations", "empty", write_file("", "[]"), "sample", told="conversations"),
    spoilt(
        "--weights",
        "without words",
        remove("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"),
        "encoders",
        "processor",
        told="tokenizer|loaded",
        only="qwen",
    ),
    spoilt(
        "--weights",
        "without sizes",
        remove("preprocessor_config.json"),
        "encoders",
        "processor",
        told="preprocessor",
        only="qwen",
    ),
    spoilt(
        "--weights",
        "of broken words",
        write_file("tokenizer.json", "{"),
        "encoders",
        "processor",
        told="tokenizer|loaded",
        only="qwen",
    ),
    spoilt(
        "--weights",
        "of another eps",
        edit_json("config.json", rms_norm_eps=0.5),
        "tensors",
        "weights",
        told="eps",
        only="qwen",
    ),
    # clips
    spoilt(
        "--data.manifest",
        "without files",
        write_file("", "/nowhere,/nowhere/clips.json\n"),
        "sample",
        "data",
        told="nowhere",
    ),
    spoilt("--data.manifest", "of no list", write_file("", "a,b,c,d\n"), "sample", "data", told="data.txt|a,b"),
    Mutation(
        "a length that is none",
        ("sample", PARSED),
        "num_frames|6",
        lambda a, s: a.set("--data.geometry.num_frames", "6") if a.get("--data.manifest") else None,
    ),
    Mutation(
        "clips that are too long",
        ("sample",),
        "data.txt",
        lambda a, s: (
            a.set("--data.geometry.num_frames", "81").set("--data.geometry.min_frames", "81")
            if a.get("--data.manifest")
            else None
        ),
    ),
    # adapters
    Mutation("another rank", ("adapter",), "--lora.rank 16", go_on(rank="8")),
    Mutation("another alpha", ("adapter",), "--lora.alpha 32", go_on(alpha="8")),
    Mutation(
        "other targets",
        ("adapter in model", "model in layout"),
        "targets",
        of_lora(edit_tensors(lambda t: [t.pop(name) for name in sorted(t)[:2]]), "fewer"),
    ),
    Mutation(
        "an adapter of another base",
        ("adapter in model", "adapter"),
        "another model|does not fit|fit",
        of_lora(edit_tensors(lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]][:, :-1].contiguous()})), "narrower"),
    ),
    Mutation("half an adapter", ("adapter",), "lora", of_lora(edit_tensors(lambda t: t.pop(sorted(t)[0])), "half")),
    Mutation("a cut adapter", ("adapter",), "truncated", of_lora(truncate_weights, "cut")),
    spoilt(
        "--lora",
        "narrower",
        edit_tensors(lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]][:, :-1].contiguous()})),
        "adapter",
        "weights",
        told="lora|adapter",
    ),
    spoilt("--lora", "half", edit_tensors(lambda t: t.pop(sorted(t)[0])), "adapter", "weights", told="adapter|lora"),
    swap(
        "--lora",
        lambda a, s: s.root / "opensoraplan-tiny" / "adapter" if a.model and "wan" in a.model else None,
        "of another family",
        "adapter",
        told="lora",
    ),
    # videos
    in_videos("--frames", "6", "task", "settings", told="frames 6"),
    in_videos("--height", "100", "task", "settings", told="height 100"),
    in_videos("--task", "t3v", "task", told="t3v"),
    in_videos("--sampler", "pndn", PARSED, told="sampler"),
    in_videos("--guidance", "[3.0,4.0,5.0]", PARSED, told="guidance"),
    Mutation(
        "a boundary of one model that is sampled",
        ("weights",),
        "boundary 0.5",
        lambda a, s: a.set("--boundary", "0.5") if a.program == "mm_infer" and "a14b" not in a.model else None,
    ),
    in_videos("--model", "wan2.1-t2v-1.3b", "weights", "tensors", told="wan2.1-t2v-1.3b"),
    in_videos("--lora_alpha", "0", PARSED, told="lora_alpha"),
    in_videos("--parallel.cp", "3", "layout", told="3", ranks=8),
    in_videos("--output", "/dev/null/x", "output", told="/dev/null"),
    spoilt("--image", "no picture", write_file("", b"no picture"), "settings", "question", told="png"),
    spoilt("--video", "no video", write_file("", b"no video"), "settings", "question", told="mp4"),
    spoilt("--prompt_file", "empty", write_file("", "\n"), "requests", told="prompts"),
    spoilt("--questions", "broken", write_file("", "[{"), "question", told="held_out"),
]


def draw(asked: list[Asking], shop: Shop) -> list[tuple[Mutation, Asking]]:
    """Each mutation at least once, then at random; of commands of every kind."""
    possible = [(mutation, asking) for mutation in MUTATIONS for asking in asked]
    drawn: list[tuple[Mutation, Asking]] = []
    chance = random.Random(0)
    chance.shuffle(possible)
    again: list[tuple[Mutation, Asking]] = []
    for mutation, asking in possible:
        if mutation in {one for one, _ in drawn}:
            again.append((mutation, asking))
        elif made := mutation.make(asking, shop):
            drawn.append((mutation, made))
    assert {one.name for one, _ in drawn} == {one.name for one in MUTATIONS}, "a mutation that no command can have"
    for mutation, asking in again:
        if len(drawn) == MUTANTS:
            break
        if (made := mutation.make(asking, shop)) and (mutation, made) not in drawn:
            drawn.append((mutation, made))
    return drawn


def test_each_wrong_thing_is_caught_and_named(shop, capsys):
    drawn = draw(shrunk(shop), shop)
    assert len(drawn) == MUTANTS
    missed = []
    for mutation, asking in drawn:
        failing = [finding for finding in examine(asking, capsys) if finding.state == "fails"]
        right = [f for f in failing if f.name in mutation.checks and re.search(mutation.told, f.text)]
        if not right:
            missed.append(f"{mutation.name}: {' '.join(asking.argv)}\n    {failing}")
    assert not missed, f"{len(missed)} of {len(drawn)}:\n" + "\n".join(missed)


# --- the real commands


def start(arguments: list[str], *launcher: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=300, **options
    )


def start_here(main: Callable[[list[str]], None], arguments: list[str], capsys) -> tuple[object, str]:
    """Exit code and standard output of a program in this process, where torch is imported."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code, capsys.readouterr().out


def test_a_command_prints_each_check_once_and_makes_nothing(shop, tmp_path, capsys, monkeypatch):
    asking = next(one for one in shrunk(shop) if one.program == "mm_train" and one.get("--data.features"))
    asking = asking.set("--output", "new")
    right = start(["-m", "mm_train.doctor", *asking.argv, f"--world={asking.ranks}"], cwd=tmp_path)
    assert right.returncode == 0, right.stdout + right.stderr
    assert right.stderr == ""
    assert "\x1b" not in right.stdout  # no colours in a file
    lines = right.stdout.splitlines()
    names = [check.name for check in CHECKS] + ["ranks"]
    assert [line[2:].split("  ")[0].strip() for line in lines[:-1] if line[0] in "✓✗-"] == names
    assert re.fullmatch(r"\d+ of \d+ checks hold, \d+ not here", lines[-1])
    assert max(map(len, lines)) <= 120
    assert list(tmp_path.iterdir()) == []
    wrong = asking.set("--data.features", "gone").set("--optim.warmup", "900000")
    monkeypatch.chdir(tmp_path)
    code, said = start_here(doctor.main, [*wrong.argv, f"--world={asking.ranks}"], capsys)
    assert code == 2, said
    assert "✗ data " in said
    assert "✗ learning rate" in said
    assert "not here: data must hold first" in said
    assert "2 fail" in said.splitlines()[-1]


def test_inference_is_looked_at_alike(shop, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program, main in (("mm_infer", infer_main), ("mm_infer.chat", chat.main)):
        asking = next(one for one in shrunk(shop) if one.program == program).set("--output", "new")
        done = start(["-m", program, *asking.argv, "--check"], cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert " checks hold" in done.stdout
        code, said = start_here(main, [*asking.set("--weights", "gone").argv, "--check"], capsys)
        assert code == 2, said
        assert re.search("✗ weights .*gone does not exist", said)
        assert list(tmp_path.iterdir()) == []


def look_on_a_rank(rank: int, world: int, place: Path, argv: list[str]) -> tuple[object, str]:
    """Exit code and standard output of one of the ranks that torchrun would start."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.chdir(place / str(rank))
    with redirect_stdout(StringIO()) as said:
        try:
            doctor.main(argv)
        except SystemExit as end:
            return end.code, said.getvalue()
    raise AssertionError("it has not ended")


def test_ranks_that_see_other_files_are_named(shop, tmp_path):
    """Of the same name and size, as on two hosts; a check that fails on one rank alone is told with it."""
    asking = next(
        one for one in shrunk(shop) if one.model == "wan-tiny" and one.get("--data.features") and one.ranks == 8
    )
    argv = asking.set("--data.features", "features").set("--data.global_batch", "8").drop("--parallel.cp").argv
    for rank in range(2):
        shutil.copytree(shop.root / "wan-tiny" / "features", tmp_path / str(rank) / "features")
    script = tmp_path / "run.py"
    script.write_text(
        f"import os\nos.chdir(os.environ['RANK'])\nfrom mm_train.doctor import main\nmain({argv!r})\n", encoding="utf-8"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    right = start([str(script)], *launcher, cwd=tmp_path)
    assert right.returncode == 0, right.stdout + right.stderr
    assert "✓ ranks " in right.stdout
    assert right.stdout.count("✓ layout") == 1
    (shard,) = (tmp_path / "1" / "features" / "shards").iterdir()
    bytes_ = bytearray(shard.read_bytes())
    bytes_[-8:] = bytes(8)
    shard.write_bytes(bytes_)
    (code, said), (other, _) = spawn(2, look_on_a_rank, tmp_path, argv)
    assert (code, other) == (2, 2), said
    assert re.search(r"✗ ranks .*--data.features shards/\S+ is .* on rank 0.* on rank 1", " ".join(said.split())), said
    shutil.rmtree(tmp_path / "1" / "features")
    (_, gone), _ = spawn(2, look_on_a_rank, tmp_path, argv)
    assert re.search(r"✗ data on rank 1 \(\S+\): --data.features", " ".join(gone.split())), gone


def write_sparse(path: Path, model: str) -> None:
    """Weights of which the header is true, and the data a hole."""
    write_hole(path, {name: list(tensor.shape) for name, tensor in build(model, device="meta").state_dict().items()})


def write_hole(path: Path, shapes: dict[str, list[int]]) -> None:
    """Weights in bfloat16 by a header alone, but that no two begin alike: equal ones would be taken to be tied."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    path.mkdir(parents=True)
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
        for i, one in enumerate(header.values()):
            file.seek(8 + len(raw) + one["data_offsets"][0])
            file.write(bytes([1 + i % 255]))


AND_ITS_PEAK = """
import torch
from mm_parallel.device import max_memory
from mm_train.doctor import main
try:
    main()
finally:
    print(max_memory(torch.device("cpu")))
"""


def test_the_headers_of_two_experts_of_14b_take_seconds(tmp_path, capsys, monkeypatch):
    """Under 30 s and 1 GB; 57 GB of weights are looked at by their headers."""
    model = "wan2.2-t2v-a14b"
    for expert in ("high", "low"):
        write_sparse(tmp_path / "W" / f"{expert}_noise_model", model)
    write_features(tmp_path / "features", model)
    flags = ["--model", model, "--weights", "W", "--data.features", "features", "--output", "run", "--world", "8"]
    began = time.monotonic()
    done = start(["-c", AND_ITS_PEAK, *flags, "--expert", "high"], cwd=tmp_path)
    seconds = time.monotonic() - began
    assert "✓ tensors           1,095 tensors" in done.stdout, done.stdout + done.stderr
    assert seconds < 30
    assert int(done.stdout.split()[-1]) < 2**30
    monkeypatch.chdir(tmp_path)
    _, wrong = start_here(doctor.main, [*flags, "--expert", "high", "--weights", "W/low_noise_model"], capsys)
    assert "✗ tensors" in wrong
    assert "is the expert for low noise" in " ".join(wrong.split())


def misname(shapes: dict[str, list[int]], name: str) -> None:
    shapes[f"{name}x"] = shapes.pop(name)


def turn(shapes: dict[str, list[int]], name: str) -> None:
    shapes[name] = shapes[name][::-1]


BIG = {
    # preset: a matrix of its last layer, that is not square
    "vace-14b": "vace_blocks.7.ffn.0.weight",
    "wan2.2-ti2v-5b": "blocks.29.ffn.2.weight",
    "opensoraplan-1.2": "transformer_blocks.31.ff.net.2.weight",
    "qwen2.5-vl-7b": "model.layers.27.mlp.down_proj.weight",
}


@pytest.mark.parametrize("model", BIG)
def test_a_wrong_header_of_big_weights_is_caught_and_named(tmp_path, model):
    """Of billions of parameters only the header is there."""
    looks = [check for check in CHECKS if check.name in ("model", "weights", "tensors")]
    whole = {name: list(tensor.shape) for name, tensor in build(model, device="meta").state_dict().items()}
    flags = ["--model", model, "--output", str(tmp_path / "run")]

    def look(folder: Path) -> dict[str, Finding]:
        asked = Asked(load_config([*flags, "--weights", str(folder)]), 8)
        return {one.name: one for one in find(looks, asked)}

    write_hole(tmp_path / "whole", whole)
    right = look(tmp_path / "whole")
    assert {one.state for one in right.values()} == {"holds"}, right
    assert f"{len(whole):,} tensors" in right["tensors"].text
    for change in (misname, turn, None):
        folder, shapes = tmp_path / (change.__name__ if change else "cut"), dict(whole)
        if change:
            change(shapes, BIG[model])
        write_hole(folder, shapes)
        if change is None:
            file = folder / "model.safetensors"
            os.truncate(file, file.stat().st_size - 2)
        wrong = look(folder)["tensors"]
        assert wrong.state == "fails", (folder.name, wrong)
        named = BIG[model] if change else "is truncated"
        assert named in wrong.text, (folder.name, wrong.text)
        assert str(folder) in wrong.text, (folder.name, wrong.text)


# --- the libraries


def test_bounds_are_those_of_the_packages():
    declared = {}
    for file in Path(__file__).parent.parent.glob("*/*/pyproject.toml"):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {}).values()
        for said in (*project["dependencies"], *(one for those in extras for one in those)):
            name, _, lowest = said.partition(">=")
            declared.setdefault(name, set()).add(lowest.partition(",")[0])
    for name, lowest in NEEDED.items():
        assert lowest in declared[name], name
        assert max(declared[name] - {""}, key=lambda text: [*map(int, text.split("."))]) == lowest, name


def test_libraries_that_are_old_missing_or_of_another_torch_are_named():
    right = {**NEEDED, "torch": "2.13.0a0+git1234"}
    assert "torch 2.13.0a0" in check_libraries(right)
    old = right | {"transformers": "4.9.1"}
    with pytest.raises(ValueError, match=r"transformers 4.9.1 is older than 4.57: pip install 'transformers>=4.57'"):
        check_libraries(old)
    with pytest.raises(ValueError, match="peft is not installed"):
        check_libraries({name: release for name, release in right.items() if name != "peft"})
    assert check_libraries(right | {"torch-npu": "2.13.0rc1"})
    with pytest.raises(ValueError, match=r"torch-npu 2\.9\.0 is for another release of torch"):
        check_libraries(right | {"torch-npu": "2.9.0"})
