"""Optimizer groups, learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mm_parallel import ParallelPlan
from mm_parallel.fsdp import drop_gathered
from mm_parallel.grads import by_layout
from mm_train.adamw8bit import AdamW8bit
from mm_train.config import OptimConfig


class Together:
    """Several optimizers that share out one model's parameters, driven as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = [part for part in parts if part.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


AnyOptimizer = torch.optim.Optimizer | Together


def parts_of(optimizer: AnyOptimizer) -> list[torch.optim.Optimizer]:
    return optimizer.parts if isinstance(optimizer, Together) else [optimizer]


def find_matrices(model: nn.Module, plan: ParallelPlan) -> frozenset[str]:
    """Names of the trained matrices in layers: what Muon is for. Embeddings, heads, convolutions and vectors are not.

    model: whole, also on the meta device.
    """
    units = {
        f"{prefix}{name}.": unit
        for prefix, ladder, own in plan.ladders(model)
        for name, unit in own.units_of(ladder).items()
    }
    return frozenset(
        unit + name
        for unit, module in units.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and not name.endswith("bias")
    )


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    rates: Mapping[str, float] | None = None,
    matrices: Container[str] = frozenset(),
) -> AnyOptimizer:
    """The optimizer of this name over the trainable parameters; biases and vectors are not decayed (Megatron's rule, as
    MindSpeed-MM does).

    Parameters that are cut differently lie in separate groups, since one fused kernel cannot take both. So do those
    with other learning rates: `rates` by name, `config.lr` for all others. matrices: names of those that Muon takes.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("nothing to train: no parameter requires a gradient")
    adam = {"betas": config.betas, "eps": config.eps}
    how = {"fused": config.kernel == "fused", "foreach": config.kernel == "foreach"}
    if config.name == "muon":
        chosen = {name for name in trained if name in matrices}
        return Together(
            *_if_any(
                _group({n: p for n, p in trained.items() if n in chosen}, config, rates),
                # with this factor an update is about as large as AdamW's: so both take one rate, and one decay
                lambda groups: torch.optim.Muon(groups, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"),
            ),
            *_if_any(
                _group({n: p for n, p in trained.items() if n not in chosen}, config, rates),
                lambda groups: torch.optim.AdamW(groups, **adam, **how),
            ),
        )
    groups = _group(trained, config, rates)
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups)
    if config.name == "adamw8bit":
        return AdamW8bit(groups, **adam)
    if config.name == "prodigy":
        return _build_prodigy(groups, config)
    if config.name == "schedulefree":
        return _build_schedule_free(groups, config)
    return torch.optim.AdamW(groups, **adam, **how)


def _group(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, rates: Mapping[str, float] | None
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(config.lr, True): [], (config.lr, False): []}
    for name, parameter in parameters.items():
        decay = parameter.ndim > 1 and not name.endswith("bias")
        groups.setdefault(((rates or {}).get(name, config.lr), decay), []).append(parameter)
    return [
        {"params": part, "lr": rate, "weight_decay": config.weight_decay if decay else 0.0}
        for (rate, decay), those in groups.items()
        for part in by_layout(those)
    ]


def _if_any(
    groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> list[torch.optim.Optimizer]:
    return [make(groups)] if groups else []


def _build_prodigy(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    optimizer = Prodigy(groups, betas=config.betas, eps=config.eps, safeguard_warmup=config.warmup > 0)
    _begin(optimizer, lambda p: {"step": 0, "s": torch.zeros_like(p.flatten()), "p0": p.flatten().clone()})
    _begin(optimizer, lambda p: {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")})
    return optimizer


def _build_schedule_free(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, betas=config.betas, eps=config.eps)
    _begin(optimizer, lambda p: {"z": p.clone(), "exp_avg_sq": torch.zeros_like(p)})
    optimizer.train()
    return optimizer


def _begin(optimizer: torch.optim.Optimizer, make: Callable[[Tensor], dict[str, Any]]) -> None:
    """The states of all parameters, as the packages make them in their first step.

    A run that goes on reads them before it, and one of them makes other ones of weights that are zero.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] |= make(parameter.detach())


def found_rate(optimizer: AnyOptimizer) -> dict[str, float]:
    """For metrics: the factor of the learning rate that Prodigy has found so far; nothing for others."""
    group = optimizer.param_groups[0]
    return {"found_rate": float(group["d"])} if "d_numerator" in group else {}


@contextmanager
def evaluated(model: nn.Module, optimizer: AnyOptimizer) -> Iterator[dict[str, Tensor]]:
    """Inside the block the model has the weights that are to be used: those of schedule-free's average.

    It takes its gradients elsewhere, between the average and where the steps lead; the block is given these weights by
    name, and the model has them again afterwards, to the bit. For all other optimizers nothing happens.
    """
    if not hasattr(optimizer, "eval"):
        yield {}
        return
    drop_gathered(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {name: p.detach().clone() for name, p in trained.items()}
    optimizer.eval()
    for group in optimizer.param_groups:
        group["train_mode"] = True  # it would compute its way back, and not come back to the same bits
    try:
        yield held
    finally:
        drop_gathered(model)  # of an evaluation, which may keep them
        with torch.no_grad():
            for name, value in held.items():
                trained[name].copy_(value)


def step_if(optimizer: AnyOptimizer, finite: Tensor) -> None:
    """A step of the optimizer where `finite`, a bool scalar, is true; else weights, moments and counts stay as they
    are.

    The fused kernels of CUDA and of the CPU look for themselves, as a GradScaler has them do. So the host hands the
    step on while the device is still in the backward. Elsewhere the host has to wait, and look.
    """
    devices = {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
    fused = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    if fused and finite.device.type in ("cpu", "cuda") and devices == {finite.device}:
        optimizer.found_inf = (~finite).float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
    elif finite:
        optimizer.step()


def learning_rate(step: int, steps: int, config: OptimConfig, rate: float | None = None) -> float:
    """Rate of optimizer step `step` (from 0) of `steps`; a function of the step alone, so there is no state to
    restore. Where its highest is `rate` and not `config.lr`, the lowest is another in the same proportion.
    """
    if rate is not None and rate != config.lr:
        config = replace(config, lr=rate, min_lr=config.min_lr and config.min_lr * rate / config.lr)
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, steps - config.warmup)
    shape = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * shape


class EMA:
    """Moving average of a model's trainable parameters, float32, laid out like them (sharded where they are sharded).

    With decay 0 there is none, and every method does nothing.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.average: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and decay
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, from 0. Young averages forget faster, min(decay, (1 + step) / (10 + step)), or
        they would keep the initial weights.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        live = dict(self.model.named_parameters())
        names = {id(average): name for name, average in self.average.items()}
        for alike in by_layout(self.average.values()):
            torch._foreach_lerp_(alike, [live[names[id(average)]].detach() for average in alike], weight)

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if not self.average:
            return
        drop_gathered(self.model)  # of an evaluation, which may keep them
        live = dict(self.model.named_parameters())
        for name, average in self.average.items():
            held = live[name].detach().clone()
            live[name].copy_(average)
            average.copy_(held)
