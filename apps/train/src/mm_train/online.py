"""Training straight from videos: clips are decoded by the loader and become features as they are needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mm_convert import replace_file
from mm_convert.cli.terminal import one_line
from mm_data import (
    Batch,
    Captions,
    Clip,
    ClipBatch,
    ClipDataset,
    Step,
    check_samples,
    for_task,
    pad_texts,
    read_manifest,
    select,
    survey,
)
from mm_parallel.encoders import interleave, share_encoding
from mm_train.config import Config
from mm_train.encode import Encoders, tell_short
from mm_train.mixture import count_sets, describe_sets
from mm_train.ranks import describe_missing, map_over_ranks, say


def find_clips(config: Config, encoders: Encoders) -> tuple[ClipDataset, list[dict[str, Any]]]:
    """The samples that an extraction would use, as far as that shows without decoding them; the others are reported.
    And their sets, as of `describe_sets`.
    """
    manifest = config.data.manifest
    listed = read_manifest(manifest, say, config.data.caption)
    samples = for_task(listed, controls=encoders.task.reads_control)
    geometry = encoders.fit_geometry(config.data.geometry)
    selection = select(samples, geometry, map_over_ranks(samples, partial(check_samples, geometry=geometry)))
    tell_short(selection, encoders.task)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    silent = rank > 0 or not sys.stderr.isatty()
    with tqdm(total=len(selection.kept), unit="clip", desc="looking into videos", disable=silent) as bar:
        look = partial(survey, geometry=geometry, progress=lambda done: bar.update(done * world - bar.n))
        found = map_over_ranks(selection.kept, look)
    shape = encoders.codec.latent_shape
    captions = Captions(config.seed, config.data.text_dropout)
    dataset = ClipDataset(
        selection.kept, geometry, config.seed, latent_shape=shape, path=manifest, captions=captions, found=found
    )
    left_out = [*selection.dropped, *dataset.unusable]
    if rank == 0:
        report = config.run_dir / "failures.jsonl"
        lines = [json.dumps({"id": sample.id, "reason": str(reason)}) + "\n" for sample, reason in left_out]
        replace_file(report, "".join(lines))
        why = describe_missing([str(reason) for _, reason in left_out], report)
        print(f"{one_line(manifest)}: {selection}", file=sys.stderr)
        said = f"{len(dataset)} of {len(samples)} samples of {manifest} can be used{why}"
        print(one_line(said), file=sys.stderr, flush=True)
    return dataset, describe_sets(dataset.portions, [shape[:3] for shape in dataset.clip_shapes], count_sets(left_out))


def encoded_steps(
    decoded: Iterator[Step], encoders: Encoders, every: int, device: torch.device, group: dist.ProcessGroup | None
) -> Iterator[Step]:
    """The steps with features in place of clips.

    `every` of them are encoded at a time, between which the encoders are on the host; with 0 they stay on the device.
    A group of ranks that has the same steps shares the work.
    """

    def encoded(_: int) -> Step:
        # Asked for here, not in advance: the clips of one step are in memory, not of all that are encoded at a time.
        step = _next(decoded)
        return Step(step.index, step.cursor_after, _encoded(encoders, step.micro, group))

    if every:
        return interleave(count(), encoded, every, encoders.to, device)
    encoders.to(device)
    return map(encoded, count())


def _next(decoded: Iterator[Step]) -> Step:
    try:
        return next(decoded)
    except ValueError as error:
        raise ValueError(
            f"{error}. No other sample is put in its place: mend the file and give the same command again with "
            "--checkpoint.resume changed, which continues from the last checkpoint. (`python -m mm_train.extract` "
            "decodes everything before training, and leaves out what is damaged)"
        ) from error


def _encoded(encoders: Encoders, batches: Sequence[ClipBatch], group: dist.ProcessGroup | None) -> list[Batch]:
    """Clips go through the encoders one by one, as in extraction, so that features are the same to the last bit."""

    def encode(shown: tuple[Clip, str]) -> dict[str, Tensor]:
        clip, caption = shown
        return encoders.encode([clip | {"captions": (caption,) if caption else ()}])[0]

    shown = [pair for batch in batches for pair in zip(batch.clips, batch.captions, strict=True)]
    features = iter(share_encoding(shown, encode, group))
    return [_collated(batch, [next(features) for _ in batch.clips], encoders) for batch in batches]


def _collated(batch: ClipBatch, features: list[dict[str, Tensor]], encoders: Encoders) -> Batch:
    """One batch, on the CPU."""
    texts = [one.pop("text.0").cpu() if "text.0" in one else encoders.empty_text for one in features]
    tensors = {name: torch.stack([one[name].cpu() for one in features]) for name in features[0]}
    return Batch(tensors | pad_texts(texts), batch.ids, batch.epochs)
