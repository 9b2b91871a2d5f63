"""The training algorithm, on one page; each line's detail is one module away."""

from __future__ import annotations

import math
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from mm_convert.arguments import dump
from mm_data import FeatureDataset
from mm_models import build
from mm_parallel import clip_grad_norm, finish_gradients, forward_backward, make_mesh
from mm_parallel.device import device as accelerator
from mm_parallel.device import init_distributed, reset_max_memory, synchronize
from mm_parallel.guard import Watchdog, agree
from mm_parallel.mesh import data_rank, rank_in, reports_loss
from mm_train import setup
from mm_train.check import check
from mm_train.checkpoint import Checkpointer
from mm_train.command import check_shared, prepare_output
from mm_train.config import Config
from mm_train.data import check_features, training_data
from mm_train.export import export_final
from mm_train.metrics import Metrics
from mm_train.nonfinite import Watch
from mm_train.objective import Work, objective
from mm_train.optim import EMA, build_optimizer, learning_rate
from mm_train.ranks import made_once, totals
from mm_train.samples import Samples
from mm_train.speed import Speed
from mm_train.validate import Validation


def train(config: Config) -> Path:
    """Run `config` to its last step and export the weights; returns the directory of the exported weights.

    Raises ValueError for a configuration that cannot work, FloatingPointError for a non-finite loss or gradient.
    """
    check(config)
    rank, world, _ = init_distributed(timedelta(hours=6))  # the watchdog looks after hangs
    with Watchdog(deadline=config.deadline) as guard:
        checkpoint, interrupted = _train(config, rank, world, guard)
    if interrupted:
        raise KeyboardInterrupt(f"{interrupted}; the same command continues from there")
    return export_final(config, checkpoint, leader=rank == 0)


def _train(config: Config, rank: int, world: int, guard: Watchdog) -> tuple[Path | None, str]:
    """All but the export; returns the last checkpoint, and where it was interrupted, if it was."""
    guard.at("preparing", deadline=math.inf)  # weights may take long to read
    agree(dump(config), "the configuration")
    device = accelerator()
    mesh = make_mesh(config.parallel, device.type)
    data_index, data_size = data_rank(mesh)
    micro_batches = config.micro_batches(data_size)

    setup.check_output(config)
    prepare_output(config.run_dir)
    goal = objective(config, build(config.model, device="meta", **config.architecture).config)
    if config.validation.features:
        check_features(FeatureDataset(config.validation.features), config, goal)
    check_shared(config.run_dir)
    data = training_data(config, goal, mesh, device)
    agree({"the samples": data.fingerprint}, data.name)
    # Refuses a directory that this run must not continue. One rank looks, so that all go the same way.
    found, changed = made_once(lambda: setup.find_checkpoint(config))
    # Before the model: it needs the text encoder for a moment.
    samples = Samples(config, goal, mesh, device, getattr(torch, config.dtype))
    built = setup.build_model(config, mesh, device, continuing=found is not None)
    model, run = built.model, built.run
    optimizer = build_optimizer(model, config.optim)
    ema = EMA(model, config.optim.ema) if config.optim.ema else None
    checkpoints = Checkpointer(config.run_dir / "checkpoints", config.checkpoint.keep)
    progress = {"step": 0, "cursor": 0, "skipped": 0, "dataset": data.fingerprint}
    if found:
        progress = checkpoints.load(found, model, optimizer, ema)
        data.check_same(progress, config)

    metrics = Metrics(config.run_dir, leader=rank == 0, steps=config.steps, start=progress["step"])
    metrics.say(setup.summary(config, goal, built, data, mesh, data_size, micro_batches, found, changed))
    if progress["step"] == config.steps:
        metrics.say(f"all {config.steps} steps were done already; the weights are exported again")
    validation = Validation(config, goal, mesh, device)
    speed = Speed(model, device, data_size, world)
    watch = Watch(config.on_nonfinite)
    resolved = dump(config)

    def save() -> None:
        if progress["step"] == 0:
            return  # nothing is lost, and an optimizer without a step has no state to save
        checkpoints.save(progress["step"], model, optimizer, ema, dict(progress), resolved)

    def look() -> None:
        """Everything that looks at the model from outside, at the steps where it is due."""
        if validation.due(progress["step"]):
            guard.at(f"validation after step {progress['step']}", deadline=math.inf)
            metrics.event({"step": progress["step"], "validation_loss": validation(run)})
        if samples.due(progress["step"]):
            guard.at(f"samples after step {progress['step']}", deadline=math.inf)
            metrics.say(f"step {progress['step']} | samples in {samples(run, model, ema, progress['step'])}")

    steps = data.steps(progress["cursor"])
    with _Interrupt() as interrupt:
        if progress["step"] == 0:
            look()
        while progress["step"] < config.steps and not interrupt.stop:
            guard.at(f"the data of step {progress['step'] + 1}", config.deadline * data.steps_at_once)
            started = time.perf_counter()
            batch = next(steps)
            guard.at(f"step {progress['step'] + 1}")
            data_seconds = time.perf_counter() - started

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress["step"], config.steps, config.optim)
            seed = partial(setup.seed_dropout, config.seed, batch.index, data_index, rank_in(mesh, "cp"))
            work = Work(batch.micro, goal, config.seed, device, before=seed)
            own = forward_backward(run, micro_batches, work.inputs, work.losses)
            finish_gradients(model, mesh)
            norm = clip_grad_norm(model, config.optim.clip or math.inf, mesh)
            counted = torch.cat(own).cpu().double().sum() if reports_loss(mesh) else 0.0
            summed, signals = totals(counted, float(interrupt.signal), device=device)
            interrupt.heard(signals)
            mean = summed / config.data.global_batch

            progress["cursor"] = batch.cursor_after
            if watch.finite(mean, norm, own, batch):
                optimizer.step()
                if ema:
                    ema.update(model, progress["step"])
                progress["step"] += 1
            optimizer.zero_grad(set_to_none=True)  # not held while something else needs memory, and never saved
            if watch.in_a_row and watch.stop():  # on every rank alike, as both numbers are global
                progress["cursor"] -= config.data.global_batch
                save()
                checkpoints.wait()
                metrics.close()
                raise FloatingPointError(watch.explain(progress["step"], checkpoints.saved()))
            if watch.in_a_row:
                progress["skipped"] += 1
                metrics.say(f"{watch.explain(progress['step'], checkpoints.saved())}. Skipped")
                continue

            synchronize(device)
            seconds = time.perf_counter() - started
            row = {
                "step": progress["step"],
                "loss": mean,
                "grad_norm": float(norm),
                "lr": optimizer.param_groups[0]["lr"],
                "samples": progress["cursor"],
                "seconds": seconds,
                "data_seconds": data_seconds,
            }
            measured, text = speed(batch.micro, seconds, data_seconds)
            metrics.step(row | measured, text)
            checkpoints.check()
            if progress["step"] % config.checkpoint.every == 0:
                save()
            look()
            reset_max_memory(device)

        guard.at("the last checkpoint", deadline=math.inf)
        save()
        checkpoints.wait()
    metrics.close()
    return checkpoints.saved(), f"stopped after step {progress['step']}" if interrupt.stop else ""


class _Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a clean end after the step; the second acts at once."""

    def __enter__(self) -> _Interrupt:
        self.signal, self.stop = 0, False
        self.before = {s: signal.signal(s, self._on) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on(self, number: int, _frame: object) -> None:
        self.signal = number
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def heard(self, signals: float) -> None:
        """What all ranks together have got: if any was interrupted, all stop after the same step."""
        self.stop = self.stop or signals > 0
