"""Small runs that the tests share: features of random numbers, and a Wan of a hundred thousand parameters."""

import json
import os
from pathlib import Path

import torch

from mm_data import FeatureCache
from mm_train.config import Config
from mm_train.recipe import load_config

SMALL = {"dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_dim": 8}


CONDITIONS = {  # by task: channels (or tokens and width) of what a sample holds besides latents and text
    "t2v": {},
    "i2v": {"condition": 16, "image": (257, 32)},
    "vace": {"control": 32, "control_mask": 64},
}


def write_features(path: Path, count: int = 14, poison: str | None = None, task: str = "t2v") -> Path:
    """Two shapes of clips; the latents of the sample named `poison` are not numbers."""
    random = torch.Generator().manual_seed(0)
    with FeatureCache(path) as cache:
        for i in range(count):
            size = (4, 6) if i % 3 else (6, 4)
            latents = torch.randn(16, 2, *size, generator=random)
            name = f"clip{i}.mp4"
            if name == poison:
                latents[0, 0, 0, 0] = float("nan")
            texts = {f"text.{k}": torch.randn(3 + i % 4, 8, generator=random) for k in range(1 + i % 2)}
            extras = {
                key: torch.randn(size if isinstance(size, tuple) else (size, *latents.shape[1:]), generator=random)
                for key, size in CONDITIONS[task].items()
            }
            cache.put(f"{i:064d}", {"latents": latents, **texts, **extras}, {"id": name})
        cache.put_empty_text(torch.randn(1, 8, generator=random))
        cache.finish()
    return path


def arguments(features: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model", "wan-tiny", "--weights", "random", "--dtype", "float32", "--architecture", json.dumps(SMALL)),
        *("--data.features", str(features), "--output", str(output), "--data.workers", "0"),
        *("--data.global_batch", "4", "--data.micro_batch", "2", "--optim.lr", "1e-2", "--steps", "4"),
        *more,
    ]


def config(features: Path, output: Path, *more: str) -> Config:
    return load_config(arguments(features, output, *more))


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in rows(output) if "loss" in row]


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a training checkpoint by name."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def as_torchrun(rank: int, world: int) -> None:
    """What torchrun would put into the environment of this rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
