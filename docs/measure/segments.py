"""Packed samples: a call for each sample, cut out by slices, against the op of mm_parallel and the core of mm_models.

    python docs/measure/segments.py            # 64 samples of 64 tokens, then 120 of 20 to 60

Causal, 4 heads of 64 elements; forward and backward together, the best of three.
"""

import random
import time
from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mm_models import layers
from mm_parallel.attention import core
from mm_parallel.plan import Sequence


def slices(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    ends = pairwise(sequence.segments)
    return torch.cat([layers.attention(*(x[:, a:b] for x in (q, k, v)), sequence.causal) for a, b in ends], 1)


def measure(attend: Callable, lengths: list[int], dtype: torch.dtype) -> float:
    segments = tuple(accumulate(lengths, initial=0))
    sequence = Sequence(segments[-1], True, segments)
    qkv = [torch.randn(1, segments[-1], 4, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        attend(*qkv, sequence).sum().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    draw = random.Random(0)
    packs = {"64 of 64": [64] * 64, "120 of 20 to 60": [draw.randint(20, 60) for _ in range(120)]}
    for name, lengths in packs.items():
        for dtype in (torch.float32, torch.bfloat16):
            parts = {"slices": slices, "op": core, "layers.core": layers.core}
            times = (f"{part} {1e3 * measure(attend, lengths, dtype):.0f} ms" for part, attend in parts.items())
            print(f"{name}, {dtype}: {', '.join(times)}")
