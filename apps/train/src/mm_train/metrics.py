"""What a person sees of a run, and what stays: a line or a bar per step, metrics.jsonl, TensorBoard files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm_convert import read_bytes, replace_file
from mm_train.tracker import Tracker


class Metrics:
    """Writes on the first rank only; on the others every method does nothing.

    A resumed run first drops the lines of steps that are about to be repeated, so that every step stands in
    metrics.jsonl once.
    """

    def __init__(self, output: Path, *, leader: bool, steps: int, start: int):
        self.leader, self.steps = leader, steps
        self.tracker: Tracker | None = None
        """Is told all that is kept."""
        if not leader:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = output / "metrics.jsonl"
        _keep_steps(self.path, start)
        self.file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self.board = SummaryWriter(output / "tensorboard", purge_step=start + 1 if start else None)
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def say(self, text: str) -> None:
        """A line for the reader, above the bar."""
        if self.leader:
            tqdm.write(text, file=sys.stderr) if sys.stderr.isatty() else print(text, file=sys.stderr, flush=True)

    def step(self, row: dict[str, Any], details: str) -> None:
        """One optimizer step: `row` is kept, `details` is the part of the line that is not kept."""
        if not self.leader:
            return
        self._keep(row)
        line = f"loss {row['loss']:.4f} | lr {row['lr']:.2e} | grad {row['grad_norm']:.3f} | {details}"
        if self.bar.disable:
            print(f"step {row['step']}/{self.steps} | {line}", file=sys.stderr, flush=True)
        else:
            self.bar.set_postfix_str(line, refresh=False)
            self.bar.update(1)

    def event(self, row: dict[str, Any]) -> None:
        """Something measured beside the steps, e.g. validation."""
        if self.leader:
            self._keep(row)
            numbers = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
            self.say(f"step {row['step']}/{self.steps} | {numbers}")

    def _keep(self, row: dict[str, Any]) -> None:
        said = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        with _naming(self.path):
            self.file.write(json.dumps(said, allow_nan=False) + "\n")  # null: JSON has no NaN and no infinity
        with _naming(self.path.parent / "tensorboard"):
            for key, value in row.items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(key, value, row["step"])
        if self.tracker:
            self.tracker.log(said)

    def close(self) -> None:
        if self.leader:
            self.bar.close()
            if self.tracker:
                self.tracker.close()
            with _naming(self.path):
                self.file.close()
            with _naming(self.path.parent / "tensorboard"):
                self.board.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError of writing, as of a full disk, says of itself neither where nor which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _keep_steps(path: Path, last: int) -> None:
    """Drop what a killed run wrote after its last checkpoint, a torn last line too."""
    if not path.exists():
        return
    kept = []
    for line in read_bytes(path, limit=2**32).decode("utf-8", "replace").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if isinstance(step, int) and step <= last:
            kept.append(line)
    replace_file(path, "".join(line + "\n" for line in kept))
