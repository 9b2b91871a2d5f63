"""First block cache: a step whose first layer changes little takes the other layers' work from the last full step.

    layer 0 ── its residual, against that of the last full step ──┬─ other by more than the threshold: all layers run
                                                                  └─ alike: x + what layers 1 … n added last time

Each pass of guidance and each expert remembers for itself. Off unless it is asked for: videos become others.
Source: diffusers' `apply_first_block_cache`, after ParaAttention; with Wan the latents equal diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class _Pass:
    """What is remembered of the last full step, each as large as the residual stream."""

    first: Tensor | None = None  # what layer 0 added
    rest: Tensor | None = None  # what the layers after it added
    behind_first: Tensor | None = None  # the stream there, while the others run
    skips: bool = False


class FirstBlockCache:
    """`with cache.on(model): …`, and `cache.pass_ = "text"` before each call of a model.

    threshold: mean of |change| over mean of |residual| up to which a step is taken from the last full one.
    total: sums a tensor over the ranks that share the tokens of a video, so that all decide alike.
    """

    def __init__(self, threshold: float, total: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        self.threshold, self.total = threshold, total
        self.pass_ = "text"
        self.calls, self.skipped = 0, 0
        self._passes: dict[tuple[int, str], _Pass] = {}

    @contextmanager
    def on(self, *models: nn.Module) -> Iterator[None]:
        """In this block the models' layers ask it; afterwards nothing is left of it. They have two layers or more."""
        for number, model in enumerate(models):
            model.layer = self._ask(number, model.layer, len(model.layers) - 1)
        try:
            yield
        finally:
            for model in models:
                del model.layer  # the class's own is behind it

    def _ask(self, number: int, layer: Callable, last: int) -> Callable:
        def ask(i: int, stream):
            held = self._passes.setdefault((number, self.pass_), _Pass())
            if i == 0:
                return self._first(held, stream, layer(0, stream))
            if held.skips:
                return stream
            stream = layer(i, stream)
            if i == last:
                held.rest, held.behind_first = stream.x - held.behind_first, None
            return stream

        return ask

    def _first(self, held: _Pass, stream, after):
        added = after.x - stream.x
        self.calls += 1
        held.skips = held.rest is not None and self._change(added, held.first) <= self.threshold
        if held.skips:
            self.skipped += 1
            return after._replace(x=after.x + held.rest)
        held.first, held.behind_first = added, after.x
        return after

    def _change(self, added: Tensor, before: Tensor) -> float:
        sums = torch.stack([(added - before).abs().sum(dtype=torch.float32), before.abs().sum(dtype=torch.float32)])
        change, size = self.total(sums).tolist()
        return change / max(size, torch.finfo(torch.float32).tiny)
