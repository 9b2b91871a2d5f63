"""What the loop drives: all that a run has, made in `prepare`, and what happens around its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_convert.cli.arguments import dump, flags_of
from mm_convert.cli.terminal import one_line
from mm_data import Step
from mm_models.objective import Objective
from mm_parallel import Pipeline
from mm_parallel.device import device as accelerator
from mm_parallel.device import reset_max_memory, synchronize
from mm_parallel.guard import Watchdog, agree, join
from mm_parallel.guard.agree import ALIKE
from mm_parallel.mesh import data_rank, describe, make_mesh, rank_in, reports_loss
from mm_train.answers import Answers, share_exact
from mm_train.checkpoint import Checkpointer
from mm_train.checks import check
from mm_train.checks.flags import describe_frozen
from mm_train.command import claim_output
from mm_train.config import Config
from mm_train.contents import Contents, check_again, check_ranks, identify
from mm_train.data import TrainingData, training_data
from mm_train.estimate.comparison import Comparison
from mm_train.held_out import HeldOut, open_held_out
from mm_train.interrupt import Interrupt
from mm_train.log_tps import LogTps
from mm_train.metrics import Metrics
from mm_train.mixture import write_sets
from mm_train.nonfinite import MOST_IN_A_ROW, Watch
from mm_train.objective import architecture, build_objective, expert_boundary
from mm_train.optim import EMA, AnyOptimizer, build_optimizer, evaluated, found_rate, learning_rate, step_if
from mm_train.optimizers import describe as describe_optimizer
from mm_train.ranks import all_sum, broadcast, precise, start_sum
from mm_train.resume import find_checkpoint, read_progress
from mm_train.samples import Samples
from mm_train.settle import describe_known_samples
from mm_train.speed import Speed
from mm_train.start import Built, build_model, choose_attention, outline
from mm_train.step import MicroBatches, seed_dropout
from mm_train.tracker import Tracker
from mm_train.turns import Trainee, Turns
from mm_train.validate import Validation

LOG_TPS = "tokens of --log-tps"


@dataclass
class Progress:
    """Where a run is; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps that were taken."""
    cursor: int = 0
    """Samples that all ranks together have been given."""
    skipped: int = 0
    """Steps that were not taken, as they were not finite."""
    dataset: str = ""
    """Fingerprint of the samples."""
    contents: Contents = field(default_factory=dict)
    """What the files hold that were read."""


@dataclass(frozen=True)
class Outcome:
    """One step in global numbers, alike on every rank."""

    index: int  # from 0
    loss: float
    norm: float
    finite: bool
    tokens: float
    operations: float  # floating-point, that training needs
    counts: dict[str, float]  # see `mm_models.objective.Objective.count`


@contextmanager
def prepare(config: Config, held: ExitStack) -> Iterator[Run]:
    """A run that is ready for its next step. What cannot work is refused here, what costs least to find out first.

    Leaving the block saves what was trained. The output is claimed until `held` is left.
    """
    with join(deadline=config.deadline) as guard:
        guard.at("preparing", config.patience)
        check(config)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        agree(flags_of(config), "the configuration", way_out=ALIKE)
        run = Run(config, rank, world, guard, held)
        with run.interrupt:  # only from here on is there something to end cleanly
            yield run
            run.finish()


class Run:
    """One training run on this rank. `model` is called, `parameters` is the module that holds this rank's weights."""

    def __init__(self, config: Config, rank: int, world: int, guard: Watchdog, held: ExitStack):
        self.config, self.rank, self.world, self.guard = config, rank, world, guard
        self.interrupt = Interrupt()
        self.device = accelerator()
        self.mesh = make_mesh(config.parallel, self.device.type)
        self.data_index, self.data_ranks = data_rank(self.mesh)
        micro_batches = describe_micro_batches(config, self.data_ranks)
        notes = check(config, "with torch")
        attention = choose_attention(config, self.mesh, self.device)
        held.enter_context(claim_output(config.run_dir))
        self.objective = build_objective(config)
        guard.at("looking at the data", config.patience)
        self.data = training_data(config, self.objective, self.mesh, self.device)
        agree({"the samples": self.data.identity}, self.data.name)
        # Refuses a directory that this run must not continue. One rank looks, so that all go the same way.
        found, changed = broadcast(lambda: find_checkpoint(config))
        contents = identify(config, self.data, continuing=found is not None)
        check_ranks(contents)
        if found:
            saved = read_progress(found)
            self.data.check_same(saved, config)
            changed = changed + check_again(contents, saved, found, config)
        guard.at("building the model", config.patience)
        held_out = open_held_out(config)
        if architecture(config)[0].chat is not None:
            self.samples: Samples | Answers = Answers(config, held_out, self.device, leader=rank == 0)
        else:  # before the model: it needs the text encoder for a moment
            self.samples = Samples(config, self.objective, self.mesh, self.device, getattr(torch, config.dtype))
        trainees: list[Trainee] = []
        for one in config.trainees:
            if trainees:
                trainees[-1].move(torch.device("cpu"))
            built = build_model(one, self.mesh, self.device, continuing=found is not None)
            trainees.append(self._train(one, built, held_out))
        self.turns = Turns(trainees, config, self.device)
        self.checkpoints = Checkpointer(config.run_dir / "checkpoints", config.checkpoint.keep)
        self.progress = Progress(dataset=self.data.identity)
        if found:
            self.progress = Progress(**self.checkpoints.load(found, *self.turns.whole))
        self.progress.contents |= contents

        self.metrics = Metrics(config.run_dir, leader=rank == 0, steps=config.steps, start=self.progress.step)
        if rank == 0 and config.log.wandb:
            self.metrics.tracker = Tracker(config, self.metrics.say)
        layout = (describe(self.mesh), f"{self.data_ranks} x {micro_batches}")
        said = (found, changed, notes, attention)
        self.metrics.say(summarize(config, self.objective, built, self.data, *said, *layout))
        if rank == 0 and self.data.sets:
            write_sets(config.run_dir, self.data.sets)
        if self.progress.step == config.steps:
            self.metrics.say(f"all {config.steps} steps were done already; the weights are exported again")
        self.speed = Speed(outline(config), self.device, world, config.compile)  # of all stages
        self.comparison = Comparison(config, self.objective, self.device, world, leader=rank == 0)
        self.watch = Watch(config.on_nonfinite)
        self.max_norm = config.optim.clip or math.inf
        self.log_tps = LogTps(config.data.global_batch) if config.log_tps else None
        self.masked_in_a_row = 0

    def _train(self, config: Config, built: Built, held_out: HeldOut | None) -> Trainee:
        objective = build_objective(config)
        optimizer = build_optimizer(built.parameters, config.optim, built.rates, built.matrices)
        average = EMA(built.parameters, config.optim.ema)
        validation = Validation(config, objective, held_out, self.mesh, self.device)
        return Trainee(config, objective, built.model, built.parameters, optimizer, average, validation)

    @property
    def model(self) -> nn.Module | Pipeline:
        return self.turns.now.model

    @property
    def parameters(self) -> nn.Module:
        return self.turns.now.parameters

    @property
    def optimizer(self) -> AnyOptimizer:
        return self.turns.now.optimizer

    @property
    def average(self) -> EMA:
        return self.turns.now.average

    def batches(self) -> Iterator[MicroBatches]:
        """This rank's part of one step after the other, from where the run is."""
        steps = self.data.steps(self.progress.cursor)
        if self.progress.step == 0:
            self._evaluate()
        while self.progress.step < self.config.steps and not self.interrupt.stop:
            number = self.progress.step + 1
            self.guard.at(f"the data of step {number}", self.config.deadline * self.data.steps_at_once)
            self.started = time.perf_counter()
            step = next(steps)
            self.guard.at(f"step {number}")
            self.data_seconds = time.perf_counter() - self.started
            if self.data.refusals:
                self.data.refusals.tell()
            place = (self.config.seed, step.index, self.data_index, rank_in(self.mesh, "cp"))
            objective = self.turns.take(step.index).objective
            batch = MicroBatches(step, objective, self.config.seed, self.device, partial(seed_dropout, *place))
            weight = batch.weigh() if reports_loss(self.mesh) else 0.0
            planned, made = step.digest % 2**20, batch.digest() % 2**20  # sums of these are exact
            others = self.world // self.data_ranks - 1  # that have the same samples as this rank
            differing = made * others if reports_loss(self.mesh) else -made
            batch.total, plans, differing = all_sum(weight, planned, differing, device=self.device)
            if plans != planned * self.world or differing:
                what = "planned other packs" if plans != planned * self.world else "could read other samples"
                raise ValueError(f"ranks {what} for step {number}: {self.data.name} is not the same on all hosts")
            if batch.total == 0:
                self._skip_masked(step)
                continue
            self.masked_in_a_row = 0
            yield batch
            reset_max_memory(self.device)

    def _skip_masked(self, step: Step) -> None:
        """Goes on behind a step of which no token is trained. ValueError where there is nothing but such steps."""
        self.masked_in_a_row += 1
        if self.masked_in_a_row == MOST_IN_A_ROW:
            raise ValueError(
                f"{MOST_IN_A_ROW} steps in a row had nothing to train on: not one sample of them has a token that is "
                f"trained. Look at {self.data.name}"
            )
        self.progress.cursor = step.cursor_after
        self.progress.skipped += 1
        self.metrics.say(f"there is nothing to train on in the samples up to {step.cursor_after:,}. Skipped")

    def set_rate(self) -> None:
        place = (self.progress.step, self.config.steps, self.config.optim)
        self.rate = learning_rate(*place)
        for group, rate in zip(self.optimizer.param_groups, self.turns.now.rates, strict=True):
            group["lr"] = learning_rate(*place, rate)

    def start_loss(self, losses: list[Tensor]) -> Callable[[], Tensor]:
        """The sum of all ranks' losses. It is on its way while the gradients are finished."""
        own = torch.cat(losses) if reports_loss(self.mesh) else torch.zeros(1, device=self.device)
        return start_sum(own.to(precise(self.device)).sum())

    def update(self, loss: Tensor, norm: Tensor) -> Tensor:
        """A step of the optimizer, unless loss or norm is not finite: then nothing changes, on every rank alike.

        Returns both, and whether it was taken: 3, on the device, for the host has not waited.
        """
        finite = loss.isfinite() & norm.isfinite()
        step_if(self.optimizer, finite)
        return torch.stack([loss, norm.to(loss.dtype), finite.to(loss.dtype)])

    def outcome(self, batch: MicroBatches, losses: list[Tensor], updated: Tensor) -> Outcome:
        """The step in global numbers; from here on, its samples count as seen."""
        spent = self.speed.count(batch.micro) if reports_loss(self.mesh) else (0.0, 0.0)
        self.comparison.look(batch.micro)
        counts = batch.count() | ({LOG_TPS: LogTps.count(batch.micro)} if self.log_tps else {})
        counted = [count if reports_loss(self.mesh) else 0.0 for count in counts.values()]
        tokens, operations, signals, *counted = all_sum(
            *spent, float(self.interrupt.signal), *counted, device=self.device
        )
        self.interrupt.hear(signals)
        summed, norm, finite = updated.tolist()
        loss = summed / batch.total
        self.progress.cursor = batch.step.cursor_after
        self.watch.see(bool(finite), loss, norm, losses, batch.step)
        counts = dict(zip(counts, counted, strict=True))
        return Outcome(self.progress.step, loss, norm, bool(finite), tokens, operations, counts)

    def report(self, step: Outcome) -> None:
        """Tells and keeps what a step was. Raises FloatingPointError if the run must end with a step that is not
        finite, after saving what is before it.
        """
        if not step.finite:
            return self._report_nonfinite()
        self.progress.step += 1
        synchronize(self.device)
        seconds = time.perf_counter() - self.started
        row = {
            "step": self.progress.step,
            **({} if self.turns.alone else {"expert": self.turns.now.name}),
            "loss": step.loss,
            "grad_norm": step.norm,
            "lr": self.rate,
            **found_rate(self.optimizer),
            "samples": self.progress.cursor,
            "seconds": seconds,
            "data_seconds": self.data_seconds,
        }
        if self.log_tps:
            self.log_tps.add(seconds, step.counts.pop(LOG_TPS))
        measured, text = self.speed.measure(step.tokens, step.operations, step.counts, seconds, self.data_seconds)
        self.metrics.step(row | measured | self.comparison.first(), text)
        last = self.progress.step == self.config.steps
        told = self.comparison.tell(row | measured, self.parameters, self.optimizer, self.average.average, last)
        if told:
            self.metrics.say(told)
        self.checkpoints.check()

    def _report_nonfinite(self) -> None:
        stops = self.watch.stop()  # on every rank alike, as loss and norm are global
        if stops:
            self.progress.cursor -= self.config.data.global_batch
            self._save()
            self.checkpoints.wait()
            self.metrics.close()
        why = self.watch.explain(self.progress.step, self.checkpoints.saved())
        if stops:
            raise FloatingPointError(why)
        self.progress.skipped += 1
        self.metrics.say(f"{one_line(why)}. Skipped")

    def save_if_due(self, step: Outcome) -> None:
        if step.finite and self.progress.step % self.config.checkpoint.every == 0:
            self._save()

    def evaluate_if_due(self, step: Outcome) -> None:
        """Validation, and samples of what the model makes."""
        if step.finite:
            self._evaluate()

    def finish(self) -> None:
        """Saves what was trained, and waits until it is written."""
        self.guard.at("the last checkpoint", deadline=math.inf)
        self._save()
        self.checkpoints.wait()
        if self.log_tps:
            self.metrics.say(self.log_tps.summarize())
        self.metrics.close()

    def check_finished(self) -> None:
        """Raise KeyboardInterrupt if the run was stopped before its last step."""
        if self.interrupt.stop:
            raise KeyboardInterrupt(f"stopped after step {self.progress.step}; the same command continues from there")

    def _save(self) -> None:
        if self.data.refusals:
            self.data.refusals.write()
        if self.progress.step == 0:
            return  # nothing is lost, and an optimizer without a step has no state to save
        self.checkpoints.save(self.progress.step, *self.turns.whole, asdict(self.progress), dump(self.config))

    def _evaluate(self) -> None:
        step = self.progress.step
        if self.turns.now.validation.due(step):
            row: dict[str, Any] = {"step": step}
            for now in self.turns.visit():
                self.guard.at(f"validation after step {step}", deadline=math.inf)
                with evaluated(now.parameters, now.optimizer):
                    row[f"validation_loss{'' if self.turns.alone else f'_{now.name}'}"] = now.validation(now.model)
                    if isinstance(self.samples, Answers) and (count := self.config.validation.answers):
                        row["validation_exact"] = share_exact(self.samples.ask(now.model, count))
            self.metrics.event(row)
        if self.samples.due(step):
            self.guard.at(f"samples after step {step}", deadline=math.inf)
            whole, sampler = self.turns.whole, self.turns.sampler(expert_boundary(self.config))
            with evaluated(whole.parameters, whole.optimizer):
                self.metrics.say(f"step {step} | {self.samples(sampler, whole.average, step)}")
            if self.metrics.tracker:
                self.metrics.tracker.send_samples(step)


def describe_micro_batches(config: Config, data_ranks: int) -> str:
    """What a rank does in a step, in words. ValueError where the global batch cannot be shared out."""
    each = config.micro_batches(data_ranks)
    if architecture(config)[0].chat is None:
        return f"{each} micro-batches of {config.data.micro_batch}"
    if not config.data.packing:
        return f"{each} conversations, one by one"
    return f"{each} conversations in packs of at most {config.data.max_tokens:,} tokens"


def summarize(
    config: Config,
    objective: Objective,
    built: Built,
    data: TrainingData,
    found: Path | None,
    changed: list[str],
    notes: list[str],
    attention: str,
    ranks: str,
    step: str,
) -> str:
    """What is about to happen, in a few lines. found, changed: the checkpoint that is continued, and settings that were
    changed since. notes: what the checks have told.
    """
    lines = [
        f"model      {config.model}: {built.size:,} parameters, {built.trained:,} trained, matrices in {config.dtype}",
        *(f"{'           ' if i else 'parts      '}{row}" for i, row in enumerate(built.parts)),
        f"task       {objective.task}{f', expert {config.expert}' if config.expert else ''}, {objective.describe()}",
        f"weights    {f'{found} (continuing)' if found else config.weights}{built.notes}",
        *(f"changed    {change}" for change in changed),
        f"data       {data.described}, {data.name}",
        *(f"           {note}" for note in [*data.notes, *notes]),
        f"attention  {attention}",
        f"optimizer  {describe_optimizer(config.optim)}",
        f"ranks      {ranks}",
        f"step       {config.data.global_batch} samples = {step}",
        *([f"samples    {samples}"] if (samples := describe_known_samples(config)) else []),
        *([f"memory     {describe_frozen(config.memory)}"] if config.memory.holds_frozen else []),
        *(["compile    each layer; steps with a new kind of shape take longer, and say so"] if config.compile else []),
    ]
    return "\n".join(map(one_line, lines))
