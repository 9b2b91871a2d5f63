"""What happens before the first step: the run directory, the model with its weights, and checks that need both."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_convert import open_checkpoint
from mm_convert.arguments import dump
from mm_data import FeatureDataset
from mm_models import build, plan
from mm_models.initial import initial
from mm_models.layers import cast_weights
from mm_models.lora import LoRAConfig, add_lora
from mm_parallel import load_parameters, parallelize
from mm_train.checkpoint import latest
from mm_train.config import Config
from mm_train.optim import EMA

# Settings that are part of what a checkpoint means: with another value the rest of the run would be another run.
FIXED = ("model", "architecture", "seed", "data.global_batch", "lora.rank", "lora.targets")


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that this run continues. Raises ValueError where continuing would not be the same run."""
    found = latest(config.output / "checkpoints")
    if found is None:
        return None
    if config.checkpoint.resume == "never":
        raise ValueError(
            f"{config.output} holds a run ({found.name}) and --checkpoint.resume is never: choose another "
            "--output, or delete it"
        )
    saved, now = _flat(tomllib.loads((found / "config.toml").read_text())), _flat(tomllib.loads(dump(config)))
    # An adapter means nothing without the base that it was trained on.
    for key in (*FIXED, "weights") if config.lora.rank else FIXED:
        old, new = ({k: v for k, v in values.items() if k == key or k.startswith(f"{key}.")} for values in (saved, now))
        if old != new:
            raise ValueError(
                f"{found} was made with {old or f'no {key}'}, this command says {new or f'no {key}'}: that would "
                "train on other samples or "
                f"another model. Give the old value to continue, or a new --output to start a run of its own"
            )
    return found


def check_features(dataset: FeatureDataset, config: Config) -> None:
    """Raise ValueError where the features are not those of the model."""
    item, shape = dataset[0], build(config.model, device="meta", **config.architecture).config
    channels, text = item["latents"].shape[0], item["text"][0].shape[-1]
    if channels != shape.out_channels or text != shape.text_dim:
        raise ValueError(
            f"{dataset.path} holds latents of {channels} channels and text of width {text}; "
            f"{config.model} takes {shape.out_channels} and {shape.text_dim}: extract again with its own encoders"
        )
    if shape.in_channels != shape.out_channels:
        raise ValueError(
            f"{config.model} takes {shape.in_channels} channels, {shape.in_channels - shape.out_channels} of them "
            "conditions, and these features hold none: only text-to-video models can be trained so far"
        )


def dataset_fingerprint(dataset: FeatureDataset) -> str:
    """Changes when samples are added, removed, reordered or reshaped, i.e. when the sample stream changes."""
    rows = [(dataset.ids[i], list(dataset.shapes[i])) for i in range(len(dataset))]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def check_dataset(progress: dict[str, Any], dataset: FeatureDataset, config: Config) -> None:
    """Raise ValueError if the samples are no longer those that the checkpoint was trained on."""
    if progress.get("dataset", (now := dataset_fingerprint(dataset))) != now:
        raise ValueError(
            f"the samples in {config.data.features} have changed since this run was saved, so its position in "
            "them means nothing. "
            f"Start a new run from its weights: --output another/ --weights {config.output}/weights "
            f"(`python -m mm_train.export` writes them from a checkpoint)"
        )


def build_model(config: Config, mesh: DeviceMesh | None, device: torch.device) -> nn.Module:
    """The model, cut over the mesh and filled tensor by tensor; no rank ever holds all of it."""
    dtype = getattr(torch, config.dtype)
    model = build(config.model, device="meta", **config.architecture)
    model.compute_dtype = dtype
    if config.lora.rank:
        cast_weights(model, dtype)  # a frozen base needs no float32 masters
        add_lora(model, LoRAConfig(config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets))
    source = Start(config, model)
    parallelize(model, plan(model), mesh, config.memory, dtype)
    load_parameters(model, source, device)
    return model.train()


class Start(Mapping[str, Tensor]):
    """Every parameter by name, read or drawn when it is asked for.

    Adapter matrices are fresh; the layers they wrap keep their published name in the file.
    """

    def __init__(self, config: Config, model: nn.Module):
        self.seed = config.seed
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.file = None if config.weights == "random" else open_checkpoint(config.weights)
        self.adapters = {name for name in self.shapes if ".lora_" in name}
        self.published = {name.replace(".base_layer.", "."): name for name in self.shapes if name not in self.adapters}
        self.names = [*self.adapters, *(self.published.get(n, n) for n in (self.file or self.published))]

    def __getitem__(self, name: str) -> Tensor:
        if name in self.adapters or self.file is None:
            return initial(name, self.shapes[name], self.seed)
        return self.file[name.replace(".base_layer.", ".")]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def check_space(model: nn.Module, ema: EMA | None, config: Config, leader: bool) -> None:
    """Raise ValueError if not even one checkpoint fits on the disk of the output directory."""
    if not leader:
        return
    config.output.mkdir(parents=True, exist_ok=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = trained * (16 if ema else 12)  # float32: weights, two moments, and the average
    free = shutil.disk_usage(config.output).free
    if needed > free:
        raise ValueError(
            f"a checkpoint needs {needed / 2**30:.1f} GiB and {config.output} has {free / 2**30:.1f} GiB free: "
            "free some, or choose another --output"
        )


def dropout_seed(*place: int) -> int:
    """Seed of the only ambient draw there is, the adapters' dropout: a function of (seed, step, micro-batch, rank)."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=7).digest(), "big")


def summary(
    config: Config, model: nn.Module, dataset: FeatureDataset, world: int, micro_batches: int, found: Path | None
) -> str:
    """What is about to happen, in four lines."""
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ranks = world if world == 1 else f"{world} ({config.parallel})"
    return (
        f"model      {config.model}: {everything:,} parameters, {trained:,} trained, matrices in {config.dtype}\n"
        f"weights    {found or config.weights}{' (continuing)' if found else ''}\n"
        f"data       {len(dataset):,} samples in {len(set(dataset.shapes))} shapes from {config.data.features}\n"
        f"step       {config.data.global_batch} samples = {ranks} ranks x {micro_batches} micro-batches x "
        f"{config.data.micro_batch}"
    )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows = {}
    for key, value in table.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows
