"""The same numbers, samples and configuration in Weights & Biases: an extra, and never a reason for a run to end."""

from __future__ import annotations

import json
import os
import threading
import tomllib
from collections.abc import Callable
from typing import Any

from mm_convert import read_json, replace_file
from mm_convert.cli.arguments import dump
from mm_convert.cli.terminal import one_line
from mm_train.config import Config

PATIENCE = 60
"""Seconds to begin, and to send the rest in the end."""


class Tracker:
    """Of one run, on its first rank. What goes wrong is said in one line, and from then on nothing is sent.

    A run that goes on writes into the same run there: its id is kept in `wandb.json`. A step that is repeated after a
    kill is there twice, with the same numbers.
    """

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.say, self.samples, self.sent = say, config.run_dir / "samples", set()
        self.run: Any = None
        self.works, self.then = True, "the run goes on without it"
        self._try(lambda: self._begin(config))

    def _begin(self, config: Config) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode  # of `wandb offline`
        if mode == "online" and not wandb.api.api_key:
            raise ValueError("there is no key: `wandb login`, or WANDB_MODE=offline")
        kept = config.run_dir / "wandb.json"
        before = read_json(kept)["id"] if kept.exists() else None
        entity, _, project = config.log.wandb.rpartition("/")
        self.run = _within(
            lambda: wandb.init(
                project=project,
                entity=entity or None,
                name=config.log.wandb_name or config.run_dir.name,
                id=before,
                resume="allow",
                dir=config.run_dir,
                config=tomllib.loads(dump(config)),
                settings=wandb.Settings(console="off", quiet=True, show_errors=False, init_timeout=PATIENCE),
            )
        )
        replace_file(kept, json.dumps({"id": self.run.id, "project": config.log.wandb}))
        self.run.define_metric("*", step_metric="step")
        where = self.run.url or f"{one_line(config.run_dir / 'wandb')} (offline: `wandb sync` sends it)"
        self.say(f"wandb      {where}")
        self.video = wandb.Video

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        self._try(lambda: self.run.log(row))

    def send_samples(self, step: int) -> None:
        """The videos that are there and were not sent: those of other ranks may come later."""
        self._try(lambda: self._send(step))

    def _send(self, step: int) -> None:
        files = [file for file in sorted(self.samples.glob("step-*/[!.]*.mp4")) if file not in self.sent]
        if files:
            videos = {f"samples/{file.stem}": self.video(str(file), format="mp4") for file in files}
            self.run.log({"step": step, **videos})
            self.sent.update(files)

    def close(self) -> None:
        """Sends what is left."""
        self.then = f"`wandb sync` of {self.samples.parent / 'wandb'} sends the rest"
        self._try(lambda: _within(self.run.finish))
        self.works = False

    def _try(self, work: Callable[[], Any]) -> None:
        if not self.works:
            return
        try:
            work()
        except Exception as error:
            self.works = False
            self.say(one_line(f"wandb      {type(error).__name__}: {error}; {self.then}"))


def _within(work: Callable[[], Any]) -> Any:
    """What it returns. TimeoutError where that takes too long: it is left alone then."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if failed:
        raise RuntimeError(str(failed[0]) or type(failed[0]).__name__)
    if not found:
        raise TimeoutError(f"no answer in {PATIENCE} s")
    return found[0]
