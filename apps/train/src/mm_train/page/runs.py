"""Runs of mm_train as their folders hold them: numbers, configuration, samples, the estimate. Nothing is written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mm_convert import read_json, read_text, read_toml
from mm_data import made_with
from mm_train.page.curves import Curves
from mm_train.resume import flat, latest

SIGNS = ("metrics.jsonl", "checkpoints", "samples")
"""What a run's folder has, one of them at least."""
DEEP = 4
"""Folders in folders that are looked into."""
STEP = re.compile(r"step-(\d+)")
VIDEO = re.compile(r"\d+\.mp4")
MOST_ANSWERS = 200


class Run:
    """One run, found in a folder that was named."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.curves = Curves(folder / "metrics.jsonl")
        self._prompts: dict[Path, tuple[int, str]] = {}

    def describe(self, until: float) -> dict[str, Any]:
        """What there is of it, after reading on until then (`time.monotonic`)."""
        problems = []
        try:
            self.curves.read(until)
        except OSError as error:
            problems.append(f"metrics.jsonl: {error.strerror}")
        curves = self.curves
        if curves.unread:
            problems.append(
                f"metrics.jsonl: {curves.unread} of {curves.lines} lines cannot be read, first {curves.broken}"
            )
        if not any(self._has(sign) for sign in SIGNS):
            problems.append("no run lies here: it has no metrics.jsonl")
        elif not curves.metrics and curves.share == 1:
            problems.append("no step yet: metrics.jsonl is empty, or not there")
        return {
            "name": self.name,
            "folder": str(self.folder),
            "problems": problems,
            "read": curves.share,
            "version": [curves.lines, *(curves._file or ())],
            "last": curves.last,
            "metrics": list(curves.metrics),
            "samples": self.sample_steps(),
            "estimate": self._has("estimate.json"),
        }

    def config(self) -> tuple[dict[str, Any], str]:
        """(settings by their dotted names, "" or what is wrong with them)."""
        try:
            found = latest(self.folder / "checkpoints")
            if found is None:
                return {}, "the configuration comes with the first checkpoint: there is none yet"
            return flat(read_toml(found / "config.toml")), ""
        except (ValueError, OSError) as error:
            return {}, str(error)

    def estimate(self) -> dict[str, Any]:
        """Rows of what was estimated beside what was measured, or what is wrong with the file."""
        try:
            said = read_json(self._inside("estimate.json"))
            found, measured = said["estimate"], said["measured"]
            of_rank = found["memory"][0]
            _, seconds = self.curves.metrics.get("estimated_seconds", ([], [None]))  # only where the device is known
            wanted = {"memory": found["peak"], "seconds": seconds[0]}
            wanted |= {name: of_rank.get(name) for name in measured if name not in wanted}
            return {"rows": [[name, wanted[name], measured[name]] for name in wanted if name in measured]}
        except FileNotFoundError:
            return {"rows": [], "problem": "no estimate.json: it comes with the third step"}
        except (ValueError, OSError, KeyError, IndexError, TypeError, AttributeError) as error:
            return {"rows": [], "problem": f"estimate.json cannot be read: {type(error).__name__}: {error}"}

    def sample_steps(self) -> list[int]:
        """The steps at which samples were made."""
        if not self._has("samples"):
            return []
        found = (STEP.fullmatch(entry.name) for entry in os.scandir(self.folder / "samples"))
        return sorted(int(one[1]) for one in found if one)

    def samples(self, step: int) -> dict[str, Any]:
        """Videos with their prompts, and answers, of this step."""
        folder = self._step(step)
        if folder is None:
            return {"videos": [], "answers": []}
        files = sorted(entry.name for entry in os.scandir(folder) if VIDEO.fullmatch(entry.name))
        videos = [{"file": name, "prompt": self._prompt(file)} for name in files if (file := self.video(step, name))]
        return {"videos": videos, "answers": self._answers(folder)}

    def video(self, step: int, name: str) -> Path | None:
        """A sample's file; None for what is none of them, or lies elsewhere in truth."""
        folder = self._step(step)
        if folder is None or not VIDEO.fullmatch(name):
            return None
        return self._inside(str(folder.relative_to(self.folder) / name), must=False)

    def _step(self, step: int) -> Path | None:
        if not self._has("samples"):
            return None
        names = [entry.name for entry in os.scandir(self.folder / "samples") if STEP.fullmatch(entry.name)]
        name = next((name for name in names if int(name.removeprefix("step-")) == step), None)
        folder = None if name is None else self._inside(f"samples/{name}", must=False)
        return folder if folder is not None and folder.is_dir() else None

    def _has(self, name: str) -> bool:
        return self._inside(name, must=False) is not None

    def _inside(self, name: str, must: bool = True) -> Path | None:
        """A file of the run, unless it leads out of its folder. FileNotFoundError, or None, where it is not there."""
        path = self.folder / name
        if path.exists() and path.resolve().is_relative_to(self.folder.resolve()):
            return path
        if must:
            raise FileNotFoundError(str(path))
        return None

    def _prompt(self, file: Path) -> str:
        changed = file.stat().st_mtime_ns
        if self._prompts.get(file, (None,))[0] != changed:
            try:
                prompt = str(made_with(file).get("prompt", file.name))
            except (ValueError, OSError) as error:
                prompt = f"{file.name}: {error}"
            self._prompts[file] = changed, prompt
        return self._prompts[file][1]

    def _answers(self, folder: Path) -> list[dict[str, Any]]:
        file = self._inside(str(folder.relative_to(self.folder) / "answers.jsonl"), must=False)
        if file is None:
            return []
        try:
            return [json.loads(line) for line in read_text(file).splitlines()[:MOST_ANSWERS]]
        except (ValueError, OSError) as error:
            return [{"question": file.name, "answer": f"cannot be read: {error}", "reference": "", "exact": False}]


class Runs:
    """All runs in the folders that were named; those that begin later, too."""

    def __init__(self, named: Sequence[Path]) -> None:
        """ValueError for a folder that is not there."""
        for path in named:
            if not path.is_dir():
                near = get_close_matches(path.name, [p.name for p in path.absolute().parent.glob("*")], n=1)
                raise ValueError(f"{path} is no folder" + (f", did you mean {path.parent / near[0]}?" if near else ""))
        self.named = list(named)
        self.by_name: dict[str, Run] = {}

    def look(self) -> list[Run]:
        """The runs that are there now, each as it was known before."""
        found: dict[str, Path] = {}
        for path in self.named:
            inside = list(_find(path))
            for folder in inside or [path]:
                name = str(folder.relative_to(path)) if folder != path else folder.resolve().name
                if name in found:
                    name = str(folder)
                found[name] = folder
        self.by_name = {name: self.by_name.get(name) or Run(name, folder) for name, folder in found.items()}
        return list(self.by_name.values())


def _find(path: Path, deep: int = DEEP) -> Iterator[Path]:
    """The run in this folder, and those in the folders of it; links are not followed."""
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError:
        return
    if any(entry.name in SIGNS for entry in entries):
        yield path
    elif deep:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _find(Path(entry.path), deep - 1)


def differences(configs: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any], bool]]:
    """(name, its value in each configuration, whether they differ) of all settings."""
    rows = []
    for name in dict.fromkeys(name for config in configs for name in config):
        values = [config.get(name) for config in configs]
        there = [value for config, value in zip(configs, values, strict=True) if config]
        rows.append((name, values, any(value != there[0] for value in there)))
    return rows
