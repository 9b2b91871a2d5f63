"""Training checkpoints: torch DCP directories that appear whole or not at all.

::

    run/checkpoints/step-00000500/   .metadata  *.distcp  progress.json  config.toml
    run/checkpoints/latest           the name of the newest complete one

A checkpoint is copied to host memory, written by a thread into a dot-directory while training goes on, renamed, and
only then named in `latest`. DCP knows global tensors, not ranks, so any number of ranks may read what any other
number wrote.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mm_convert import load_dcp, replace_file
from mm_train.optim import EMA, AnyOptimizer, evaluated, parts_of
from mm_train.resume import latest, read_progress
from mm_train.turns import Averages

# DCP remarks on every save and load of a single process that it is one.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# Frozen weights (the base below an adapter) are not ours to save: they are read again from where the run started.
OPTIONS = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)

ASKED = ("weight_decay", "betas", "eps", "momentum")
"""Of a group of parameters, what a command says anew; all else in it is the run's."""


class Checkpointer:
    """Saves in the background and keeps the newest `keep`. One per rank; all ranks call the same methods in the
    same order.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory, self.keep = directory, keep
        self.leader = not dist.is_initialized() or dist.get_rank() == 0
        # A group of its own: the writing thread's collectives must not meet those of the training thread.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None
        self.newest: int | None = (
            None  # step of the last save or load; not looked up on disk, where ranks may see different things
        )
        if self.leader:
            directory.mkdir(parents=True, exist_ok=True)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return latest(self.directory)

    def saved(self) -> Path | None:
        """Where the last save or load of this run lies; known without looking at the disk, and so on every rank."""
        return None if self.newest is None else self.directory / f"step-{self.newest:08d}"

    def save(
        self, step: int, model: nn.Module, optimizer: AnyOptimizer, average: EMA | Averages, progress: dict, config: str
    ) -> None:
        """Start saving; returns as soon as the state has been copied. Raises what went wrong in the save before."""
        self.wait()
        unfinished, final = self.directory / f".step-{step:08d}", self.directory / f"step-{step:08d}"
        if step == self.newest:
            return
        self.newest = step
        alone = self.group is None
        with evaluated(model, optimizer) as elsewhere:  # what is saved as the model is what is to be used
            state = _state(model, optimizer, average, elsewhere)
            upload = dcp.async_save(state, checkpoint_id=unfinished, process_group=self.group, no_dist=alone)
        self.pending = self.thread.submit(self._finish, upload, unfinished, final, progress, config)

    def _finish(self, upload: Future, unfinished: Path, final: Path, progress: dict, config: str) -> None:
        try:
            upload.result()
            if self.leader:
                replace_file(unfinished / "progress.json", json.dumps(progress))
                replace_file(unfinished / "config.toml", config)
                # A later one is left of a run that was taken back to an earlier step, or was never named in `latest`.
                for abandoned in [p for p in self.directory.glob("step-*") if p.name >= final.name]:
                    _remove(abandoned)
                os.rename(unfinished, final)
                replace_file(self.directory / "latest", final.name)
                self._prune(final)
        except BaseException as error:  # DCP raises CheckpointException, which is not an Exception
            if self.leader:
                shutil.rmtree(unfinished, ignore_errors=True)
            free = shutil.disk_usage(self.directory).free
            what = "free some space" if is_full(error) else "see to the reason"
            raise OSError(
                f"could not write checkpoint {final} ({free / 2**20:,.0f} MiB free there): {_reason(error)}. "
                f"The newest complete one is {self.latest() or 'none'}; {what} and start again to continue from it"
            ) from error

    def _prune(self, newest: Path) -> None:
        older = sorted(p for p in self.directory.glob("step-*") if p.name < newest.name)
        for old in older[: max(0, len(older) + 1 - self.keep)] if self.keep else []:
            _remove(old)

    def check(self) -> None:
        """Raise if the save under way has failed already."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Block until the save under way is complete, and raise if it failed."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def load(self, path: Path, model: nn.Module, optimizer: AnyOptimizer, average: EMA | Averages) -> dict[str, Any]:
        """Fill model, optimizer and average in place, and return the progress that was saved with them."""
        with evaluated(model, optimizer) as elsewhere:
            state = _state(model, optimizer, average, elsewhere)
        try:
            load_dcp(state, path, self.group)
        except BaseException as error:  # DCP raises CheckpointException, which is not an Exception
            others = ", ".join(p.name for p in sorted(self.directory.glob("step-*")) if p != path) or "none"
            raise ValueError(
                f"{path} cannot be read ({_reason(error)}). Other checkpoints there: {others}; "
                f"to continue from one of them, write its name into {self.directory / 'latest'}"
            ) from error
        asked = [{key: group[key] for key in ASKED if key in group} for group in optimizer.param_groups]
        set_optimizer_state_dict(model, parts_of(optimizer), state["optimizer"], options=OPTIONS)
        live = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in elsewhere.items():
                live[name].copy_(value)
        for group, chosen in zip(optimizer.param_groups, asked, strict=True):
            group.update(chosen)  # the moments are the run's, these are the command's
        progress = read_progress(path)
        self.newest = progress["step"]
        if self.leader:
            self._prune(path)  # a run that was killed after its last save has not
        return progress


def _state(
    model: nn.Module, optimizer: AnyOptimizer, average: EMA | Averages, elsewhere: Mapping[str, Tensor]
) -> dict[str, Any]:
    """elsewhere: by name, weights at which the run goes on, where they are not those of the model."""
    state = {
        "model": get_model_state_dict(model, options=OPTIONS),
        "optimizer": get_optimizer_state_dict(model, parts_of(optimizer), options=OPTIONS),
    }
    state |= {"ema": average.average} if average.average else {}
    return state | ({"trained_at": dict(elsewhere)} if elsewhere else {})


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota was full, on any rank."""
    causes = [cause[0] for cause in getattr(error, "failures", {}).values()] or [error]
    return any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes)


def _reason(error: BaseException) -> str:
    """Without the tracebacks of every rank that DCP puts into its message."""
    failures = getattr(error, "failures", None)
    if not failures:
        return f"{type(error).__name__}: {error}"
    reasons = {rank: f"{type(cause[0]).__name__}: {cause[0]}" for rank, cause in failures.items()}
    if len(reasons) > 1 and len({*reasons.values()}) == 1:
        return f"all {len(reasons)} ranks: {next(iter(reasons.values()))}"
    return "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons.items())


def _remove(checkpoint: Path) -> None:
    """Under a name that nobody reads first: killed on the way, it would be half a checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)
