"""Encode the videos and captions of a manifest once: ``python -m mm_train.extract``.

Decoding runs in worker processes while the device encodes; ranks of torchrun share the samples. What is in the cache already (same
bytes, same geometry, same encoders) is not encoded again, so a killed extraction continues where it was. A file that cannot be
decoded goes to failures.jsonl and the run goes on.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from mm_convert.arguments import parse
from mm_data import Failure, FeatureCache, Geometry, VideoDataset, read_manifest
from mm_models import presets
from mm_parallel.device import device as accelerator
from mm_parallel.device import init_distributed
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm


@dataclass
class Data:
    manifest: Path
    """data.txt, data.json or .jsonl in the format of the guides."""
    workers: int = 2
    """Decoding processes per rank."""


@dataclass
class ExtractConfig:
    """Encode videos and captions into a feature cache that mm_train reads."""

    model: str
    """Preset that the features are for."""
    encoders: Path
    """Diffusers directory with vae/, text_encoder/ and tokenizer/."""
    output: Path
    """Directory of the cache; may hold an earlier, unfinished extraction."""
    data: Data
    geometry: Geometry = field(default_factory=Geometry)
    batch: int = 1
    """Clips of one shape that are encoded together."""
    seed: int = 42
    """Of the random frame windows."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the text encoder; the VAE runs in float32."""
    tiling: bool = False
    """Let the VAE work in tiles: less memory, slightly other numbers at the seams."""

    def check(self) -> None:
        if self.model not in presets():
            raise ValueError(f"unknown model '{self.model}': choose one of {', '.join(presets())}")
        if not self.encoders.is_dir():
            raise ValueError(f"--encoders {self.encoders} is not a directory; it should hold vae/, text_encoder/ and tokenizer/")
        if self.batch < 1:
            raise ValueError(f"--batch is {self.batch}; it must be at least 1")
