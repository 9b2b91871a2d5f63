"""What the machinery of mm-parallel costs on this machine, as ratios within one run.

    python docs/measure/parallel.py

1. A step of Wan (50M parameters, 1,536 tokens) by mm-parallel with every size 1, against a bare torch loop.
2. Attention shared by two ranks, by Ulysses and by a ring, against two ranks that each compute half the heads and
   exchange nothing: the same work, so the ratio is what the exchange costs.
3. Attention with a quarter of the keys masked, by our op and by torch's with a bool and with an additive mask, against
   our op without a mask.
"""

import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mm_models import build, plan
from mm_parallel import ParallelConfig, clip_grad_norm, finish_gradients, forward_backward, make_mesh, parallelize
from mm_parallel.attention import core
from mm_parallel.context import Context
from mm_parallel.plan import Sequence
from mm_parallel.testing import spawn

ROUNDS = 7


def machinery(rank: int, world: int) -> tuple[list[float], list[float]]:
    """Seconds of bare and of our steps, in turns."""
    sizes = {"dim": 768, "ffn_dim": 3072, "num_heads": 12, "num_layers": 4, "text_dim": 64}
    bare, model = build("wan-tiny", **sizes), build("wan-tiny", **sizes)
    mesh = make_mesh(ParallelConfig(), "cpu")
    parallelize(model, plan(model), mesh)
    batch = {"video": torch.randn(1, 16, 6, 32, 32), "t": torch.tensor([500.0]), "text": torch.randn(1, 20, 64)}
    target = torch.randn(1, 16, 6, 32, 32)

    def plain() -> None:
        (bare(**batch) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        bare.zero_grad()

    def ours() -> None:
        forward_backward(model, 1, lambda i: batch, lambda out, i: (out - target).square().flatten(1).mean(1), total=1)
        finish_gradients(model, mesh)
        clip_grad_norm(model, 1.0, mesh)
        model.zero_grad()

    return alternating([plain, ours])


def shared(rank: int, world: int, tokens: int) -> list[list[float]]:
    """Seconds of forward and backward: half the heads alone, Ulysses, ring."""
    heads, width, sequence = 12, 64, Sequence(tokens)
    ulysses, ring = (Context(make_mesh(ParallelConfig(**{way: 2}), "cpu")) for way in ("ulysses", "ring"))
    part = [torch.randn(1, tokens // 2, heads, width, requires_grad=True) for _ in range(3)]
    half = [torch.randn(1, tokens, heads // 2, width, requires_grad=True) for _ in range(3)]

    def run(attention, inputs: list[Tensor]):
        def turn() -> None:
            dist.barrier()
            attention(*inputs).square().sum().backward()

        return turn

    return alternating(
        [
            run(lambda *qkv: core(*qkv, sequence), half),
            run(lambda *qkv: ulysses.attention(*qkv, sequence), part),
            run(lambda *qkv: ring.attention(*qkv, sequence), part),
        ]
    )


def masked(rank: int, world: int, tokens: int) -> list[list[float]]:
    """Seconds of forward and backward of two samples: without a mask, ours with one, torch's with the same as bool and
    as numbers to add."""
    q, k, v = (torch.randn(2, tokens, 12, 64, requires_grad=True) for _ in range(3))
    mask = torch.stack((torch.arange(tokens) < tokens * 3 // 4, torch.arange(tokens) % 4 > 0))
    added = torch.zeros(2, 1, 1, tokens).masked_fill(~mask[:, None, None], float("-inf"))

    def torchs(seen: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen)

    ways = (
        lambda: core(q, k, v, Sequence(tokens)),
        lambda: core(q, k, v, Sequence(tokens), mask),
        lambda: torchs(mask[:, None, None]),
        lambda: torchs(added),
    )
    return alternating([lambda way=way: way().square().sum().backward() for way in ways])


def alternating(turns: list) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in turns]
    for _ in range(ROUNDS):
        for own, turn in zip(seconds, turns, strict=True):
            started = time.perf_counter()
            turn()
            own.append(time.perf_counter() - started)
    return [own[1:] for own in seconds]  # the first round warms up


def ratios(seconds: list[list[float]]) -> list[float]:
    """Each against the first of its round, the median over rounds."""
    return [statistics.median(b / a for a, b in zip(seconds[0], own, strict=True)) for own in seconds[1:]]


if __name__ == "__main__":
    seconds = spawn(1, machinery, timeout=600)[0]
    print(f"all sizes 1: {ratios(seconds)[0]:.3f} of a bare step of {statistics.median(seconds[0]):.2f} s")
    for tokens in (1024, 4096):
        seconds = spawn(2, shared, tokens, timeout=600)[0]
        ulysses, ring = ratios(seconds)
        alone = statistics.median(seconds[0])
        print(f"{tokens} tokens on 2 ranks: Ulysses {ulysses:.3f}, ring {ring:.3f} of {alone * 1e3:.0f} ms unshared")
    seconds = spawn(1, masked, 2048, timeout=600)[0]
    ours, as_bool, added = ratios(seconds)
    print(
        f"2048 tokens, a quarter masked: {ours:.3f}, torch's with a bool mask {as_bool:.3f}, with an additive one "
        f"{added:.3f} of {statistics.median(seconds[0]) * 1e3:.0f} ms without a mask"
    )
