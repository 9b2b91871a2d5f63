"""The bubble of the pipeline's schedules against theory, with layers that sleep, so that cores do not matter.

    python libs/mm-parallel/tests/measure_pipeline.py

A layer sleeps UNIT in the forward and twice that in the backward. Without bubble and communication, m micro-batches
over r layers on 2 ranks take 3 * UNIT * m * r / 2; what a step takes longer, as a part of the whole, is the bubble. In
theory it is b / (m + b) with b = (pp - 1) / v for v virtual stages.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mm_parallel import ParallelConfig, Pipeline, make_mesh
from mm_parallel.plan import ParallelPlan
from mm_parallel.testing import spawn

UNIT = 0.05
LAYERS = 4


class Stream(NamedTuple):
    x: Tensor


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        time.sleep(UNIT)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * UNIT)
        return grad, grad.sum()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, stream: Stream) -> Stream:
        if stream.x.is_meta:  # only asked for shapes
            return Stream(stream.x * self.weight)
        return Stream(Sleep.apply(stream.x, self.weight))


class Sleeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def stem(self, x: Tensor) -> Stream:
        return Stream(x)

    def layer(self, i: int, stream: Stream) -> Stream:
        return self.layers[i](stream)

    def head(self, stream: Stream) -> Tensor:
        return stream.x


def measure(rank: int, world: int, layers: tuple, count: int) -> float:
    parallel = ParallelConfig(pp_layers=layers)
    pipeline = Pipeline(Sleeper(), ParallelPlan(layers=("layers.*",)), make_mesh(parallel, "cpu"), parallel)
    best = float("inf")
    for _ in range(4):
        torch.distributed.barrier()
        start = time.perf_counter()
        pipeline.step(count, lambda i: {"x": torch.ones(1)}, lambda output, i: output, count)
        torch.distributed.barrier()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    print("pp v  m    step s  bubble  theory")
    for layers in ((2, 2), ((1, 1), (1, 1))):
        virtual = len(layers) if isinstance(layers[0], tuple) else 1
        for count in (2, 4, 8):
            seconds = max(spawn(2, measure, layers, count))
            ideal, extra = 3 * UNIT * count * LAYERS / 2, 1 / virtual
            bubble, theory = 1 - ideal / seconds, extra / (count + extra)
            print(f" 2 {virtual} {count:2d} {seconds:9.3f} {bubble:7.3f} {theory:7.3f}", flush=True)


if __name__ == "__main__":
    main()
