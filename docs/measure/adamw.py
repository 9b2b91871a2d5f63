"""AdamW's kernels over thousands of steps: fused and foreach against the formula in float64.

    python docs/measure/adamw.py                  # 2,000 steps; some minutes on one core
    python docs/measure/adamw.py --steps 200

A small transformer learns sequences of numbers. First it is trained in float64 by the formula below. The gradient of
each of its steps, rounded to float32, is what both kernels are given as well, so that nothing but their arithmetic
can differ. A case multiplies these gradients: AdamW does not care for their size, but for eps and for what
overflows. `drift` is the largest distance of a weight from float64's after a tenth of the steps and after all, in
learning rates; `apart` is that of the two kernels from each other. `loss` is the model's with the weights of the end.
Then both kernels train the model by gradients of their own, and last their steps of 20M weights are timed in turns.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

BETAS, EPS, RATE = (0.9, 0.999), 1e-8, 1e-3
KERNELS = {"fused": {"fused": True}, "foreach": {"foreach": True}}
SCALES: dict[str, Callable[[int], float]] = {
    "as they are": lambda step: 1.0,
    "small, 1e-8": lambda step: 1e-8,
    "tiny, 1e-18": lambda step: 1e-18,  # squares are below the smallest normal float32
    "large, 1e8": lambda step: 1e8,
    "huge, 1e18": lambda step: 1e18,  # squares are near the largest float32
    "a burst of 1e4 every 100": lambda step: 1e4 if step % 100 == 50 else 1.0,
    "none in 9 of 10": lambda step: float(step % 10 == 0),
}


class Model(nn.Module):
    def __init__(self, dim: int = 64, words: int = 32):
        super().__init__()
        self.embed = nn.Embedding(words, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(dim, words)

    def forward(self, words: Tensor) -> Tensor:
        mask = torch.ones(words.shape[1], words.shape[1], dtype=torch.bool).triu(1)
        x = self.embed(words)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return nn.functional.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def draw(step: int, words: int = 32) -> Tensor:
    """Sequences that count up by a step of their own; 8 x 16."""
    generator = torch.Generator().manual_seed(step)
    first, by = torch.randint(0, words, (2, 8, 1), generator=generator)
    return (first + (by % 5 + 1) * torch.arange(16)) % words


class Formula:
    """AdamW as its paper has it, in the dtype of its weights."""

    def __init__(self, weights: list[Tensor], decay: float):
        self.weights, self.decay, self.taken = weights, decay, 0
        self.first, self.second = ([torch.zeros_like(w) for w in weights] for _ in range(2))

    @torch.no_grad()
    def step(self, grads: Iterable[Tensor]) -> None:
        self.taken += 1
        (a, b), t = BETAS, self.taken
        for w, m, v, g in zip(self.weights, self.first, self.second, grads, strict=True):
            m.mul_(a).add_(g, alpha=1 - a)
            v.mul_(b).addcmul_(g, g, value=1 - b)
            w.mul_(1 - RATE * self.decay)
            w.sub_(RATE * (m / (1 - a**t)) / ((v / (1 - b**t)).sqrt() + EPS))


def copy(model: Model, dtype: torch.dtype) -> Model:
    twin = Model().to(dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def optimizer(model: Model, kernel: str, decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), RATE, BETAS, EPS, decay, **KERNELS[kernel])


def farthest(model: Model, exact: list[Tensor]) -> float:
    """In learning rates."""
    with torch.no_grad():
        off = [(p.double() - w).abs().max() for p, w in zip(model.parameters(), exact, strict=True)]
    return float(torch.stack(off).max()) / RATE  # NaN where one is


@torch.no_grad()
def losses(model: Model) -> float:
    return sum(model(draw(-1 - i)).item() for i in range(8)) / 8


def feed(start: Model, grads: list[list[Tensor]], name: str, decay: float) -> None:
    """The same gradients to the formula and to both kernels."""
    scale, exact = SCALES[name], copy(start, torch.float64)
    formula = Formula(list(exact.parameters()), decay)
    models = {kernel: copy(start, torch.float32) for kernel in KERNELS}
    optimizers = {kernel: optimizer(model, kernel, decay) for kernel, model in models.items()}
    drifts: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for step, own in enumerate(grads):
        given = [g * scale(step) for g in own]  # float32, and so the same for all
        formula.step(g.double() for g in given)
        for kernel, model in models.items():
            for parameter, grad in zip(model.parameters(), given, strict=True):
                parameter.grad = grad.clone()
            optimizers[kernel].step()
        if step + 1 in (len(grads) // 10, len(grads)):
            for kernel, model in models.items():
                drifts[kernel].append(farthest(model, formula.weights))
    apart = farthest(models["fused"], [p.double() for p in models["foreach"].parameters()])
    ends = [losses(model) for model in (exact, *models.values())]
    cells = [name, decay, *(", ".join(f"{x:.1e}" for x in each) for each in drifts.values()), f"{apart:.1e}"]
    print(f"| {' | '.join(map(str, cells))} | {' / '.join(f'{loss:.5f}' for loss in ends)} |", flush=True)
    wrong = [kernel for kernel, drift in drifts.items() if math.isnan(drift[-1])]
    assert not wrong, f"not a number: {wrong}"


def main(steps: int) -> None:
    torch.manual_seed(0)
    start = Model()
    exact = copy(start, torch.float64)
    formula, grads = Formula(list(exact.parameters()), 0.01), []
    for step in range(steps):
        found = torch.autograd.grad(exact(draw(step)), list(exact.parameters()))
        formula.step(found)
        grads.append([g.float() for g in found])
    size = sum(p.numel() for p in start.parameters())
    print(f"{size:,} weights, {steps:,} steps, rate {RATE}, torch {torch.__version__}\n")
    print("| gradients | decay | drift of fused | of foreach | apart | loss: float64 / fused / foreach |")
    print("|---|--:|--:|--:|--:|---|")
    for name in SCALES:
        feed(start, grads, name, 0.01)
    for decay in (0.0, 0.1, 1.0):
        feed(start, grads, "as they are", decay)

    print("\n| trained by | loss at the end |\n|---|--:|")
    print(f"| the formula in float64 | {losses(exact):.5f} |")
    for kernel in KERNELS:
        model = copy(start, torch.float32)
        own = optimizer(model, kernel, 0.01)
        for step in range(steps):
            own.zero_grad()
            model(draw(step)).backward()
            own.step()
        print(f"| {kernel} | {losses(model):.5f} |", flush=True)

    many = {kernel: nn.ParameterList(torch.randn(1024, 1024) for _ in range(20)) for kernel in KERNELS}
    timed = {kernel: torch.optim.AdamW(weights, **KERNELS[kernel]) for kernel, weights in many.items()}
    seconds: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for _ in range(10):
        for kernel, weights in many.items():
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            started = time.process_time()
            timed[kernel].step()
            seconds[kernel].append(time.process_time() - started)
    best = ", ".join(f"{kernel} {min(each) * 1e3:.0f} ms" for kernel, each in seconds.items())
    print(f"\na step of 20M weights: {best} of the CPU")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    main(parser.parse_args().steps)
