"""What a run is trained on: features from a cache, or made of videos on the way. The numbers are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from mm_data import BatchDataset, Captions, ClipDataset, FeatureDataset, Order, Step, build_loader
from mm_models.objective import Objective
from mm_parallel.encoders import ranks_of_sample
from mm_parallel.mesh import data_rank
from mm_train.config import Config
from mm_train.encode import Encoders
from mm_train.objective import architecture, build_objective
from mm_train.online import encoded_steps, find_clips


@dataclass(frozen=True)
class TrainingData:
    """Samples, and the steps that are made of them."""

    name: str
    """The flag that chose them, with its value."""
    samples: FeatureDataset | ClipDataset
    ids: list[str]
    buckets: list[Hashable]
    """What the samples of one step have alike: C F H W of the latents."""
    steps: Callable[[int], Iterator[Step]]
    """This rank's steps, without end, from a cursor on: `Step.cursor_after` of the last one that was trained on."""
    steps_at_once: int = 1
    """So many may be made before one is given out."""
    notes: list[str] = field(default_factory=list)
    """What a person should know before the first step, one line each."""

    @cached_property
    def fingerprint(self) -> str:
        """Changes when samples are added, removed, reordered or reshaped, i.e. when the sample stream changes."""
        rows = list(zip(self.ids, self.buckets, strict=True))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def check_same(self, progress: dict[str, Any], config: Config) -> None:
        """Raise ValueError if the samples are no longer those that the checkpoint was trained on."""
        if progress.get("dataset", self.fingerprint) != self.fingerprint:
            raise ValueError(
                f"the samples of {self.name} have changed since this run was saved, so its position in them means "
                f"nothing. Start a new run from its weights: --output another/ --weights {config.artifact} "
                "(`python -m mm_train.export` writes them from a checkpoint)"
            )


def training_data(config: Config, objective: Objective, mesh: DeviceMesh | None, device: torch.device) -> TrainingData:
    """The data of a run, from --data.features or --data.manifest. Raises ValueError for samples that cannot be used."""
    data = config.data
    if data.features:
        features = FeatureDataset(data.features, Captions(config.seed, data.text_dropout))
        name = f"--data.features {data.features}"
        notes = _notes(features, config)
        return TrainingData(
            name,
            features,
            features.ids,
            features.buckets,
            lambda cursor: _steps(features, config, mesh, cursor),
            notes=notes,
        )

    dtype = getattr(torch, config.dtype)
    _, shape = architecture(config)
    encoders = Encoders(data.encoders, shape, objective.task, "cpu", dtype, data.tiling)
    clips = find_clips(config, encoders)
    group = ranks_of_sample(mesh) if data.share_encoding else None

    def steps(cursor: int) -> Iterator[Step]:
        return encoded_steps(_steps(clips, config, mesh, cursor), encoders, data.encode_every, device, group)

    return TrainingData(
        f"--data.manifest {data.manifest}",
        clips,
        clips.ids,
        clips.buckets,
        steps,
        steps_at_once=max(1, data.encode_every),
        notes=_notes(clips, config),
    )


def _notes(dataset: BatchDataset, config: Config) -> list[str]:
    """Buckets too small for a step, and shapes of which the weights will not tell. Raises ValueError where all buckets
    are too small, and are to be dropped.
    """
    small = Order(dataset.buckets, config.data.global_batch, config.seed, config.data.small_buckets).small
    notes = [small.describe("--data.small_buckets ", "--data.global_batch ")] if small else []
    family, shape = architecture(config)
    other = family.video.note_shapes(shape, [tuple(frames_rows_columns) for _, *frames_rows_columns in dataset.buckets])
    return [*notes, other] if other else notes


def _steps(dataset: BatchDataset, config: Config, mesh: DeviceMesh | None, cursor: int) -> Iterator:
    rank, size = data_rank(mesh)
    loader = build_loader(
        dataset,
        global_batch=config.data.global_batch,
        micro_batch=config.data.micro_batch,
        dp_rank=rank,
        dp_size=size,
        seed=config.seed,
        cursor=cursor,
        num_workers=config.data.workers,
        small_buckets=config.data.small_buckets,
    )
    return iter(loader)


def check_features(path: Path, config: Config) -> None:
    """Raise ValueError where the features are not those of the model and its task."""
    dataset, objective = FeatureDataset(path), build_objective(config)
    item, (family, shape) = dataset[0], architecture(config)
    needed = dict(objective.stored)
    found = {name: tensor.shape[0] for name, tensor in item["conditions"].items()}
    found |= {"latents": item["latents"].shape[0], "text": item["text"][0].shape[-1]}
    sizes = {name: needed.pop(name) for name in ("latents", "text")}
    if any(found[name] != size for name, size in sizes.items()):
        raise ValueError(
            f"{path} holds latents of {found['latents']} channels and text of width {found['text']}; {config.model} "
            f"takes {sizes['latents']} and {sizes['text']}: extract again with its own encoders"
        )
    conditioning = family.video.conditioning(shape, objective.task)
    (rows, longest), most = dataset.longest_text, conditioning.text_tokens
    if most is not None and rows > most:
        raise ValueError(
            f"{path}: a text of {longest} has {rows} rows, but the model is asked to read {most}: give "
            f"--architecture with text_tokens of at least {rows}, as prompts are not cut once they are encoded"
        )
    if misfit := conditioning.find_misfit(item["conditions"]):
        raise ValueError(f"{path} {misfit}: extract again with --task {objective.task}")
    wrong = [
        f"{name} {found.get(name, 'missing')} instead of {size}"
        for name, size in needed.items()
        if found.get(name) != size
    ]
    if wrong:
        raise ValueError(
            f"{path} does not hold what {config.model} is conditioned on for {objective.task} ({', '.join(wrong)}): "
            f"extract with --model {config.model} --task {objective.task}"
        )
