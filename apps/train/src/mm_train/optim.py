"""Optimizer groups, learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from mm_parallel.fsdp import drop_gathered
from mm_parallel.grads import by_layout
from mm_train.config import OptimConfig


def build_optimizer(
    model: nn.Module, config: OptimConfig, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases and vectors are not decayed (Megatron's rule, as MindSpeed-MM does).

    Parameters that are cut differently lie in separate groups, since one fused kernel cannot take both. So do those
    with other learning rates: `rates` by name, `config.lr` for all others.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(config.lr, True): [], (config.lr, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = parameter.ndim > 1 and not name.endswith("bias")
            groups.setdefault(((rates or {}).get(name, config.lr), decay), []).append(parameter)
    alike = [(key, part) for key, those in groups.items() for part in by_layout(those)]
    if not alike:
        raise ValueError("nothing to train: no parameter requires a gradient")
    return torch.optim.AdamW(
        [
            {"params": part, "lr": rate, "weight_decay": config.weight_decay if decay else 0.0}
            for (rate, decay), part in alike
        ],
        betas=config.betas,
        eps=config.eps,
        fused=config.kernel == "fused",
        foreach=config.kernel == "foreach",
    )


def step_if(optimizer: torch.optim.AdamW, finite: Tensor) -> None:
    """A step of the optimizer where `finite`, a bool scalar, is true; else weights, moments and counts stay as they
    are.

    The fused kernels of CUDA and of the CPU look for themselves, as a GradScaler has them do. So the host hands the
    step on while the device is still in the backward. Elsewhere the host has to wait, and look.
    """
    devices = {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
    if optimizer.defaults["fused"] and finite.device.type in ("cpu", "cuda") and devices == {finite.device}:
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
