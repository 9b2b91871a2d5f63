"""What a run is trained on: features from a cache, or made of videos on the way, the same numbers; conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from mm_data import BatchDataset, Captions, ClipDataset, FeatureDataset, Order, Step, build_loader
from mm_models.objective import Objective
from mm_parallel.encoders import ranks_of_sample
from mm_parallel.mesh import data_rank, size
from mm_train.config import Config
from mm_train.contents import encoder_files, find_conversations
from mm_train.conversations import (
    Refusals,
    describe_refused,
    describe_sources,
    open_conversations,
    open_processing,
    read_sources,
)
from mm_train.encode import Encoders
from mm_train.mixture import describe_sets, tabulate
from mm_train.objective import architecture, build_objective
from mm_train.online import encoded_steps, find_clips


@dataclass(frozen=True)
class TrainingData:
    """Samples, and the steps that are made of them."""

    name: str
    """The flag that chose them, with its value."""
    identity: str
    """Changes when samples are added, removed, reordered or reshaped, i.e. when the sample stream changes."""
    described: str
    """How many samples there are, in words."""
    files: Mapping[str, Mapping[str, Path]]
    """By flag, the files that are read, by what they are called."""
    contents: Mapping[str, Mapping[str, str]]
    """By flag, what decides besides what is read, by what it is called."""
    steps: Callable[[int], Iterator[Step]]
    """This rank's steps, without end, from a cursor on: `Step.cursor_after` of the last one that was trained on."""
    steps_at_once: int = 1
    """So many may be made before one is given out."""
    notes: list[str] = field(default_factory=list)
    """What a person should know before the first step, one line each."""
    refusals: Refusals | None = None
    """Of conversations, those that are not used."""
    sets: list[dict[str, Any]] = field(default_factory=list)
    """Of videos, the sets that they are of, as of `describe_sets`."""

    def check_same(self, progress: dict[str, Any], config: Config) -> None:
        """Raise ValueError if the samples are no longer those that the checkpoint was trained on."""
        if progress.get("dataset", self.identity) != self.identity:
            raise ValueError(
                f"the samples of {self.name} have changed since this run was saved, so its position in them means "
                f"nothing. Start a new run from its weights: --output another/ --weights {config.artifact} "
                "(`python -m mm_train.export` writes them from a checkpoint)"
            )


def training_data(config: Config, objective: Objective, mesh: DeviceMesh | None, device: torch.device) -> TrainingData:
    """The data of a run: conversations, or videos from --data.features or --data.manifest.

    Raises ValueError for samples that cannot be used.
    """
    if architecture(config)[0].chat is not None:
        return _conversations(config, mesh)
    return _features(config, mesh) if config.data.features else _clips(config, objective, mesh, device)


def _features(config: Config, mesh: DeviceMesh | None) -> TrainingData:
    features = FeatureDataset(config.data.features, Captions(config.seed, config.data.text_dropout))
    sets = describe_sets(features.portions, [shape for _, *shape in features.buckets])
    return TrainingData(
        f"--data.features {config.data.features}",
        _fingerprint(features),
        _describe(features),
        {"data.features": features.files},
        {},
        lambda cursor: _steps(features, config, mesh, cursor),
        notes=[*tabulate(sets, "latents of frames x rows x columns"), *_notes(features, config)],
        sets=sets,
    )


def _clips(config: Config, objective: Objective, mesh: DeviceMesh | None, device: torch.device) -> TrainingData:
    data, dtype = config.data, getattr(torch, config.dtype)
    family, shape = architecture(config)
    encoders = Encoders(data.encoders, shape, objective.task, "cpu", dtype, data.tiling)
    clips, sets = find_clips(config, encoders)
    group = ranks_of_sample(mesh) if data.share_encoding else None
    captions = sha256(json.dumps(clips.all_captions).encode()).hexdigest()[:16]
    tiling = family.video.choose_tiling(data.tiling, "training")

    def steps(cursor: int) -> Iterator[Step]:
        return encoded_steps(_steps(clips, config, mesh, cursor), encoders, data.encode_every, device, group)

    return TrainingData(
        f"--data.manifest {data.manifest}",
        _fingerprint(clips),
        _describe(clips),
        {"data.manifest": clips.files, "data.encoders": encoder_files(data.encoders, encoders.folders)},
        {
            "data.manifest": {"its captions": captions},
            "data.encoders": {"the tiles of vae": tiling} if tiling != "none" else {},
        },
        steps,
        steps_at_once=max(1, data.encode_every),
        notes=[*tabulate(sets, "clips of frames x height x width"), *_notes(clips, config)],
        sets=sets,
    )


def _conversations(config: Config, mesh: DeviceMesh | None) -> TrainingData:
    """Images and videos are identified by what the survey sees of them: names and sizes."""
    flag, listed = "--data.conversations", config.data.conversations
    processing = open_processing(config)
    pad = size(mesh, "pp") > 1
    conversations = open_conversations(config, listed, flag, processing, "", pad=pad)
    sources = read_sources(listed, flag)
    refused = describe_refused(conversations.ledger)
    held_out = {
        Path(s.path).resolve() for s in read_sources(config.validation.conversations, "--validation.conversations")
    }
    twice = [
        f"{source.path} is trained and is --validation.conversations as well: its loss is not that of what is held out"
        for source in sources
        if Path(source.path).resolve() in held_out
    ]
    left_out = [f"left out: {refused}; {config.run_dir / 'failures.jsonl'} names them"] if refused else []
    return TrainingData(
        f"{flag} {describe_sources(sources)}",
        conversations.identity,
        f"{len(conversations.ids):,} conversations",
        find_conversations(config),
        {"data.processor": {"what is made of a conversation": processing.identity}},
        lambda cursor: _steps(conversations, config, mesh, cursor),
        notes=[*left_out, *twice, *conversations.notes, *_small(conversations, config)],
        refusals=Refusals(conversations.ledger, config.run_dir / "failures.jsonl"),
    )


def _fingerprint(dataset: FeatureDataset | ClipDataset) -> str:
    parts: list[Any] = list(zip(dataset.ids, dataset.buckets, strict=True))
    parts += [(count, str(times)) for count, times in dataset.sets]
    return sha256(json.dumps(parts).encode()).hexdigest()


def _describe(dataset: FeatureDataset | ClipDataset) -> str:
    if dataset.sets:
        epoch = float(sum(portion.places for portion in dataset.portions))
        return (
            f"{len(dataset.ids):,} samples in {len(set(dataset.buckets))} shapes, shown {epoch:,.0f} times in an epoch"
        )
    return f"{len(dataset.ids):,} samples in {len(set(dataset.buckets))} shapes"


def _notes(dataset: BatchDataset, config: Config) -> list[str]:
    """Buckets too small for a step, and shapes of which the weights will not tell. Raises ValueError where all buckets
    are too small, and are to be dropped.
    """
    family, shape = architecture(config)
    shapes = [tuple(frames_rows_columns) for _, *frames_rows_columns in dataset.buckets]
    task, stills = family.task(shape, build_objective(config).task), sum(frames == 1 for frames, *_ in shapes)
    notes = [*_small(dataset, config), family.video.note_shapes(shape, shapes)]
    if stills and "image" in task.needs:
        notes.append(f"{stills:,} samples are of one frame, which task {task.name} is given: they teach no movement")
    return [note for note in notes if note]


def _small(dataset: BatchDataset, config: Config) -> list[str]:
    small = Order(
        dataset.buckets, config.data.global_batch, config.seed, config.data.small_buckets, getattr(dataset, "sets", ())
    ).small
    return [small.describe("--data.small_buckets ", "--data.global_batch ")] if small else []


def _steps(dataset: BatchDataset, config: Config, mesh: DeviceMesh | None, cursor: int) -> Iterator:
    rank, ranks = data_rank(mesh)
    loader = build_loader(
        dataset,
        global_batch=config.data.global_batch,
        micro_batch=config.data.micro_batch,
        dp_rank=rank,
        dp_size=ranks,
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
    task = family.task(shape, objective.task)
    short = [name for name, bucket in zip(dataset.ids, dataset.buckets, strict=True) if bucket[1] == 1]
    if short and task.least_frames > 1:
        raise ValueError(
            f"{path}: {len(short):,} of {len(dataset):,} samples, e.g. {short[0]}, are of one frame, and task "
            f"{task.name} needs {task.least_frames}: extract again with --task {task.name}, which leaves them out"
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
