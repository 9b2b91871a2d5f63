"""Optimizer groups, learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_train.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases and vectors are not decayed (Megatron's rule, as in the guides).

    Sharded and replicated parameters lie in separate groups, since one fused kernel cannot take both.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = parameter.ndim > 1 and not name.endswith("bias")
            groups.setdefault((decay, isinstance(parameter, DTensor)), []).append(parameter)
    if not groups:
        raise ValueError("nothing to train: no parameter requires a gradient")
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": config.weight_decay if decay else 0.0} for (decay, _), p in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of optimizer step `step` (from 0) of `steps`; a function of the step alone, so there is no state to
    restore.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, steps - config.warmup)
    shape = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * shape


class EMA:
    """Moving average of the trainable parameters, float32, laid out like them (sharded where they are sharded)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Young averages forget faster, min(decay, (1 + step) / (10 + step)), or they would keep the initial
        weights.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        live = dict(model.named_parameters())
        for sharded in (False, True):
            names = [n for n in self.average if isinstance(self.average[n], DTensor) == sharded]
            if names:
                torch._foreach_lerp_([self.average[n] for n in names], [live[n].detach() for n in names], weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        live = dict(model.named_parameters())
        for name, average in self.average.items():
            held = live[name].detach().clone()
            live[name].copy_(average)
            average.copy_(held)
