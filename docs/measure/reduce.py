"""What gradients that are reduced in bf16 cost in loss: `MemoryConfig(reduce="bfloat16")` against fp32.

    python docs/measure/reduce.py                 # 400 steps on 4 ranks; some minutes on two cores
    python docs/measure/reduce.py --steps 100

A tiny language model of Qwen2.5-VL learns sequences that count up by a step of their own. All runs see the same
sequences, gather weights in bf16, and differ in nothing but how gradients are reduced; one has two ranks in place of
four, which differs from the first by rounding alone: that is how far rounding takes a run.
"""

from __future__ import annotations

import argparse

import torch

from mm_models import build, plan
from mm_models.qwen2_5_vl import positions
from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    clip_grad_norm,
    finish_gradients,
    forward_backward,
    make_mesh,
    parallelize,
)
from mm_parallel.grads import by_layout
from mm_parallel.testing import spawn

WORDS, LENGTH, ROWS = 48, 32, 16
CASES = {  # ranks, dtype of the reduction
    "float32, 4 ranks": (4, "float32"),
    "float32, 2 ranks": (2, "float32"),
    "bfloat16, 4 ranks": (4, "bfloat16"),
}


def draw(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    first, by = torch.randint(0, WORDS, (2, ROWS, 1), generator=generator)
    return (first + (by % 7 + 1) * torch.arange(LENGTH)) % WORDS


def train(rank: int, world: int, reduce: str, steps: int) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    model, mesh = build("qwen2.5-vl-tiny", vocab_size=512), make_mesh(ParallelConfig(), "cpu")
    model.visual.requires_grad_(False)
    model.compute_dtype = torch.bfloat16
    parallelize(model, plan(model), mesh, memory=MemoryConfig(reduce=reduce), dtype=torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": each} for each in by_layout(trained)], 1e-3, fused=True)
    found = []
    for step in range(steps):
        ids = draw(step).chunk(world)[rank]
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        inputs = {"input_ids": ids, "position_ids": positions(ids, (), config=model.config), "labels": labels}
        losses = forward_backward(model, 1, lambda i, inputs=inputs: inputs, lambda y, i: y, ROWS * (LENGTH - 1), mesh)
        loss = losses[0].sum() / (ROWS * (LENGTH - 1))
        torch.distributed.all_reduce(loss)
        finish_gradients(model, mesh)
        clip_grad_norm(model, 1.0, mesh)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main(steps: int) -> None:
    print(f"torch {torch.__version__}\n")
    tenths = [steps * part // 10 for part in (1, 2, 4, 6, 8, 10)]
    print(f"| reduced in | {' | '.join(f'step {step}' for step in tenths)} |\n|---|{'--:|' * len(tenths)}")
    for name, (ranks, reduce) in CASES.items():
        found = spawn(ranks, train, reduce, steps, timeout=3600)[0]
        means = [sum(found[step - steps // 20 : step]) / (steps // 20) for step in tenths]  # of the steps before
        print(f"| {name} | {' | '.join(f'{mean:.4f}' for mean in means)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)
