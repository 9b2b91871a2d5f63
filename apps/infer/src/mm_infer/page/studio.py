"""What the page makes and has made: videos in one folder, each with its settings. This file knows no page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from hashlib import file_digest
from pathlib import Path
from tempfile import mkdtemp
from threading import Lock
from typing import Any

from mm_data import made_with, write_video
from mm_infer.config import Config, Options
from mm_infer.generate import enough_memory, open_sampler, settle_video
from mm_infer.identity import identify
from mm_infer.lists import Request, read_requests
from mm_infer.ranks import Share, claim_output
from mm_infer.settle import calls_of, own_options
from mm_infer.weights import Weights
from mm_models.diffusion.samplers import FLOW_OPTIONS, fill_template
from mm_models.family import Task

INPUTS = "inputs"
"""Folder of the output for what was uploaded, so that the settings can be repeated."""
_NAME = re.compile(r"video_(\d+)\.mp4")


class Stopped(Exception):
    """The person has asked for it."""


@dataclass(frozen=True)
class Made:
    """A video, and the settings that it holds."""

    file: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.file.name


class Studio:
    """Makes the videos of a page, one at a time, and knows those that lie in its folder."""

    def __init__(self, config: Config, weights: Weights, lent: Path, held: ExitStack) -> None:
        """config: of a command, whose prompt does not matter. lent: a folder for copies of what videos are made from.
        The output is claimed until `held` is left.

        ValueError or OSError for what cannot work; no tensor is read yet.
        """
        self.config, self.facts, self.lent = config, weights.facts, lent
        self.sampler = open_sampler(config, weights, Share())
        self.contents = identify(config, weights.facts)
        claim_output(config.output, held)
        self._one = Lock()
        self._known: dict[Path, tuple[tuple[int, int], Made | None]] = {}

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The usual first; those that must be named stand behind."""
        facts = self.facts
        usual = facts.family.video.tasks_unasked(facts.config, facts.repository)
        return (*usual, *(task for task in facts.family.tasks(facts.config) if task not in usual))

    @property
    def options(self) -> list[str]:
        """Names of the options that such a model has, of any of its tasks."""
        facts = self.facts
        of_tasks = {name for task in self.tasks for name in task.options}
        of_all = {field.name for field in fields(Options)} - own_options().keys() | of_tasks
        if facts.prediction != "flow":
            of_all -= FLOW_OPTIONS.keys()
        if "image_encoder" not in facts.family.video.encoders(facts.config):
            of_all -= {"clip_crop"}
        if facts.published.trained_frames is None:
            of_all -= {"other_frames"}
        return [field.name for field in fields(Options) if field.name in of_all]

    def usual(self, name: str) -> Any:
        """What an option of this name is without being asked for; None: it depends on the others."""
        published = self.facts.published
        asked = getattr(self.config, name)
        if asked is not None:
            return asked
        if name in ("height", "width"):
            return published.size[name == "width"]
        return getattr(published, name, None)

    def make(
        self,
        values: Mapping[str, Any],
        tell: Callable[[float | tuple[int, int], str], None],
        stopped: Callable[[], bool],
    ) -> Made:
        """One video.

        values: fields of `Config`, what is None or empty being left out. tell: called with how much is done, as a part
        of 1 or (steps done, steps), and with what is done now. stopped: whether to end before the next step.
        Raises ValueError, OSError, FloatingPointError and MemoryError as the command does, and Stopped.
        """
        config = replace(self.config, **values)
        [request] = read_requests(config)
        with self._one:
            if stopped():
                raise Stopped
            request = Request(request.prompt, {name: self._keep(value) for name, value in request.given.items()})
            video = settle_video(config, self.sampler, request, self.contents)
            options, sampler, last = video.options, self.sampler, calls_of(video.options)
            tell(0.0, "reading the prompt")
            negative = [options.negative_prompt] if max(options.scales) > 1 else []
            sampler.encode([fill_template(options.prompt_template, video.prompt), *negative])
            tell(0.0, "reading what is given")
            sampler.encoders.see_all([(video.given, options)])
            tell(0.0, "loading the model")

            def progress(done: int, latents: Any) -> None:
                if stopped():
                    raise Stopped
                tell((done, last), f"step {done} of {last}" if done < last else "decoding")

            with enough_memory(options):
                result = sampler.run(video.prompt, options, video.given, progress=progress)
            file = self._next()
            write_video(file, result.frames.numpy(), options.fps, video.made_with)
            return Made(file, made_with(file))

    def made(self) -> list[Made]:
        """All videos of the folder that say how they were made, the newest first."""
        there = [(file.stat(), file) for file in self.config.output.glob("*.mp4") if self.find(file.name)]
        there.sort(key=lambda one: (one[0].st_mtime_ns, one[1]), reverse=True)
        return [made for status, file in there if (made := self._read(file, (status.st_mtime_ns, status.st_size)))]

    def find(self, name: str) -> Path | None:
        """The video of this name, unless it is none, or lies elsewhere in truth."""
        file = self.config.output / name
        inside = (
            re.fullmatch(r"[^/\\\0.][^/\\\0]*\.mp4", name) and file.resolve().parent == self.config.output.resolve()
        )
        return file if inside and file.is_file() else None

    def command(self, made: Made) -> str:
        """What makes the same video again, bit for bit. ValueError for one that no command makes, with the reason."""
        record = dict(made.record)
        if record.get("weights") == str(self.config.weights):
            for name in ("negative_prompt", "prompt_template"):  # long, and taken by themselves
                if record.get(name) == getattr(self.facts.published, name):
                    del record[name]
        return command(record, self.config.output / "again" / made.file.stem)

    def lend(self, named: Mapping[str, str] | None) -> str | None:
        """A copy, to be shown, of a file that a video was made from; None unless the page has kept it."""
        path = Path((named or {}).get("path", ""))
        if not path.is_file() or path.resolve().parent != (self.config.output / INPUTS).resolve():
            return None
        return shutil.copy(path, mkdtemp(dir=self.lent))

    def _read(self, file: Path, state: tuple[int, int]) -> Made | None:
        if self._known.get(file, (None,))[0] != state:
            try:
                self._known[file] = state, Made(file, made_with(file))
            except (ValueError, OSError):  # somebody else's video
                self._known[file] = state, None
        return self._known[file][1]

    def _next(self) -> Path:
        """No video lies there yet."""
        numbers = [int(found[1]) for file in self.config.output.iterdir() if (found := _NAME.fullmatch(file.name))]
        return self.config.output / f"video_{max(numbers, default=-1) + 1}.mp4"

    def _keep(self, value: Any) -> Any:
        """The same file in the folder of the output, where it stays: its name says what it holds."""
        if isinstance(value, tuple):
            return tuple(map(self._keep, value))
        folder = self.config.output / INPUTS
        with open(value, "rb") as file:
            says = file_digest(file, "sha256").hexdigest()[:12]
        stem = re.sub(r"[^\w-]+", "_", Path(value).stem.removesuffix(f"-{says}"))[:40]
        kept = folder / f"{stem}-{says}{Path(value).suffix.lower()}"
        if not kept.exists():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(value, kept)
        return kept


def command(record: Mapping[str, Any], output: Path) -> str:
    """The command line that makes a video with this record. ValueError where there is none."""
    if "mm_infer" not in record:
        raise ValueError("mm_infer has not made this one: it has no command")
    usual = {field.name: field.default for field in fields(Config)}
    flags: list[list[str]] = []
    said = dict(record)
    if said.get("vae_tiling") == "none":  # the flag is a truth, or which tiles
        said["vae_tiling"] = False
    for name, value in said.items():
        if name not in usual or value is None or value == usual[name]:
            continue
        flags += [_flag(name, [_path(one) for one in value] if name == "references" else _path(value))]
    return _in_lines(["python -m mm_infer", *map(shlex.join, [*flags, _flag("output", str(output))])])


def _in_lines(parts: list[str], width: int = 76) -> str:
    """The parts of a command in lines that a shell puts together."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < width:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return " \\\n".join(lines)


def _path(value: Any) -> Any:
    """Of a file that a video is made from; anything else as it is."""
    if not isinstance(value, dict):
        return value
    if "path" not in value:
        raise ValueError("this one was made in Python, from pixels that lie in no file: it has no command")
    return value["path"]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, list | tuple | dict):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, of the one, of the other) of all settings that are not alike, by the order of the first."""
    names = dict.fromkeys((*one, *other))
    return [(name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)]
