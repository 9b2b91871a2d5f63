"""What an estimate is told: all that a run is told, and what nobody can look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mm_train.config import Config

Side = Annotated[int, ">= 1", "<= 1048576"]


@dataclass
class SizeOptions:
    """How large samples are, where there is no data that says it. What is not given is as the model was published."""

    frames: Side | None = None
    """For videos: frames of a clip."""
    height: Side | None = None
    width: Side | None = None
    """For videos: pixels."""
    text: Side | None = None
    """For videos: rows of the text; by default as many as the model reads."""
    conversation: Annotated[int, ">= 1", "<= 16777216"] = 1024
    """For conversations: tokens of one, those of its image included. They are packed up to --data.max_tokens."""
    patches: Annotated[float, ">= 0", "<= 64"] = 2.0
    """For conversations: patches of images for each token. Of Qwen2.5-VL four make one token: 2 says that half of all
    tokens are of images.
    """
    labels: Annotated[float, ">= 0", "<= 1"] = 0.25
    """For conversations: the share of the tokens that are trained."""


@dataclass
class EstimateConfig(Config):
    """Say what a run will take: memory, time, disk; without a device, weights or data. All flags of mm_train are taken,
    and their paths need not be there.
    """

    world: Annotated[int, ">= 1", "<= 1048576"] | None = None
    """How many ranks the run has; by default as many as torchrun started, or 1."""
    device: str = ""
    """Device of the table, e.g. h100, for seconds and for what fits; empty counts memory, FLOPs and bytes alone."""
    devices: Path | None = None
    """TOML with devices of your own, in the form of the table in mm_parallel."""
    search: bool = False
    """Rank the layouts of --world ranks, with recompute, offload and micro-batch, by speed among those that fit."""
    json: Path | None = None
    """File to write the estimate into."""
    size: SizeOptions = field(default_factory=SizeOptions)
