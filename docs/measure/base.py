"""LoRA on a frozen base in bfloat16, fp8, int8 and nf4: losses beside each other, on a tiny model trained here first.

    python docs/measure/base.py [--steps 100]        # a few minutes on one core

A small Wan learns moving waves for 300 steps. Adapters of rank 8 then learn other waves, from the same seeds, beside
each base. The loss of validation is of samples, timesteps and noise that are the same for all.
"""

import argparse
import contextlib
import io
import json
import math
import tempfile
from pathlib import Path

import torch

from mm_data import FeatureCache
from mm_train.recipe import load_config
from mm_train.train import train

BASES = ("dtype", "int8", "fp8", "nf4")
MODEL = {"dim": 192, "num_heads": 4, "num_layers": 4, "ffn_dim": 512, "text_dim": 16}


def write_waves(path: Path, count: int, seed: int, turned: bool) -> Path:
    """Latents of a wave that moves as its text says; of another direction where `turned`."""
    random = torch.Generator().manual_seed(seed)
    rows, columns, frames = (torch.arange(n, dtype=torch.float32) for n in (8, 8, 3))
    with FeatureCache(path) as cache:
        for i in range(count):
            speed, phase = torch.rand(2, generator=random).tolist()
            along, across = (columns[None, None], rows[None, :, None])
            place = (across - along if turned else along + 0.5 * across) * 0.8
            wave = torch.sin(place - 4 * (speed - 0.5) * frames[:, None, None] + 2 * math.pi * phase)
            latents = torch.stack([wave * math.cos(c) + 0.3 * wave.roll(1, -1) * math.sin(c) for c in range(16)])
            text = torch.tensor([speed, phase, float(turned)]).repeat_interleave(16).view(3, 16)
            cache.put(f"{i:064d}", {"latents": latents, "text.0": text}, {"id": f"wave{i}.mp4"})
        cache.put_empty_text(torch.zeros(1, 16))
        cache.finish()
    return path


def run(features: Path, held_out: Path, output: Path, *more: str) -> list[dict]:
    """Trains; returns the rows of metrics.jsonl."""
    words = ["--model", "wan-tiny", "--architecture", json.dumps(MODEL), "--data.features", str(features)]
    words += ["--output", str(output), "--data.global_batch", "8", "--data.micro_batch", "8", "--data.workers", "0"]
    words += ["--validation.features", str(held_out), "--validation.every", "1000000", "--objective.shift", "3"]
    with contextlib.redirect_stderr(io.StringIO()):
        train(load_config([*words, *more]))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        first, second = (write_waves(root / f"waves{turned}", 64, 0, bool(turned)) for turned in (0, 1))
        held_out = write_waves(root / "held-out", 32, 1, True)
        run(first, held_out, root / "base", "--weights", "random", "--steps", "300", "--optim.lr", "3e-3")
        weights = str(root / "base" / "weights")
        more = ("--weights", weights, "--lora.rank", "8", "--steps", str(steps), "--optim.lr", "2e-3")
        more += ("--validation.every", str(steps))
        print(
            f"| base | validation before | after {steps} steps | training, mean of the last 20 | most apart in a step |"
        )
        print("|---|--:|--:|--:|--:|")
        plain: list[float] = []
        for base in BASES:
            rows = run(second, held_out, root / base, *more, "--memory.base", base)
            seen = [row["validation_loss"] for row in rows if "validation_loss" in row]
            losses = [row["loss"] for row in rows if "loss" in row]
            plain = plain or losses
            apart = max(abs(a / b - 1) for a, b in zip(losses, plain, strict=True))
            name = "bfloat16" if base == "dtype" else base
            last = sum(losses[-20:]) / len(losses[-20:])
            print(f"| {name} | {seen[0]:.4f} | {seen[-1]:.4f} | {last:.4f} | {apart:.1%} |", flush=True)


if __name__ == "__main__":
    main()
