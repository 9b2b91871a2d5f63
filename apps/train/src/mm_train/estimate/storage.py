"""Bytes beside the model: encoders in memory, features and checkpoints on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mm_models.folder import check_weights
from mm_train.checks.paths import checkpoint_bytes
from mm_train.config import Config
from mm_train.objective import architecture

_WEIGHTS = {".safetensors", ".ckpt", ".pt", ".bin"}


@dataclass(frozen=True)
class Encoders:
    """Of a run that encodes videos as they are needed. Without what they make while they work."""

    folders: tuple[str, ...]
    bytes: int | None
    """Of their weights, as they are loaded; None: the folder is not here."""
    stays: bool
    """Whether they stay on the device in between (--data.encode_every 0)."""


@dataclass(frozen=True)
class Disk:
    """Bytes on disk."""

    checkpoint: int
    """Of one."""
    checkpoints: int
    """How many there are at one time, the one that is being written among them."""
    exported: int
    """Of the weights, or the adapter, that come out in the end."""
    feature: int
    """Of one clip, as features; 0 where none are made."""

    @property
    def run(self) -> int:
        """What the run writes, at most."""
        return self.checkpoint * self.checkpoints + self.exported


def find_encoders(config: Config) -> Encoders | None:
    """The encoders of a run with --data.manifest; None for others."""
    family, shape = architecture(config)
    if config.data.manifest is None or family.video is None:
        return None
    names = family.video.encoders(shape)
    folders = tuple(name for name in names if not name.startswith("tokenizer"))
    path, stays = config.data.encoders, config.data.encode_every == 0
    if path is None or not all((path / name).is_dir() for name in folders):
        return Encoders(folders, None, stays)
    text = torch.finfo(getattr(torch, config.dtype)).bits // 8
    own = family.video.own_folders
    sizes = (_bytes(path / name, name in own, text if name == "text_encoder" else 4) for name in folders)
    return Encoders(folders, sum(sizes), stays)


def _bytes(folder: Path, own: bool, each: int) -> int:
    """Of its weights in memory, `each` a number. Of files of a family's own kind, theirs on disk, as float32 lies."""
    if own:
        return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in _WEIGHTS)
    return each * check_weights(folder)


def find_disk(config: Config, model: nn.Module, feature: int) -> Disk:
    """model: on the meta device, as it is trained; feature: bytes of one clip."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = [p for name, p in model.named_parameters() if ".lora_" not in name]
    saves = -(-config.steps // config.checkpoint.every)
    kept = min(saves, config.checkpoint.keep + 1) if config.checkpoint.keep else saves
    out = trained * 4 if config.lora.rank else sum(p.numel() * p.element_size() for p in own)
    if not config.lora.rank and architecture(config)[0].exported != "mm":
        out = sum(p.numel() for p in own) * torch.finfo(getattr(torch, config.dtype)).bits // 8
    return Disk(checkpoint_bytes(trained, config), kept, out * (2 if config.optim.ema else 1), feature)
