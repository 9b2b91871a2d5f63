"""Every sample of a manifest into a feature cache.

Decoding runs in worker processes while the device encodes; ranks of torchrun share the samples. What is in the cache
already (same bytes, same geometry, same encoders) is not encoded again, so a killed extraction continues where it
was. Whatever is left out, before decoding or in it, stands in failures.jsonl with its reason, and the run goes on; what
fails of encoding or writing ends it.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from mm_convert.cli.arguments import flags_of
from mm_convert.cli.terminal import one_line
from mm_data import (
    Clip,
    Failure,
    FeatureCache,
    FeatureDataset,
    Geometry,
    Sample,
    Selection,
    VideoDataset,
    check_samples,
    decode,
    for_task,
    identify_files,
    read_manifest,
    select,
)
from mm_data.clips import survey
from mm_data.files import shorten
from mm_data.layout import geometry_of
from mm_data.sets import portions_of
from mm_models import preset
from mm_models.families import find
from mm_models.family import ClipSize
from mm_parallel.device import device as accelerator
from mm_parallel.guard import Watchdog, agree, join
from mm_parallel.guard.agree import ALIKE, COPY
from mm_train.command import prepare_output
from mm_train.contents import check_ranks, encoder_files
from mm_train.encode import Encoders, tell_short
from mm_train.extract import ExtractConfig
from mm_train.mixture import count_sets, describe_sets, tabulate, write_sets
from mm_train.ranks import broadcast, describe_missing, map_over_ranks, say

LOOKED_AT = 32  # samples whose files say how large features are
ADVICE = {
    "HDR": "their colours are taken as they are stored, which looks pale; tone-map the files first to train on colours "
    "as they are seen",
    "interlaced": "a frame holds two moments, and what moves has combs; deinterlace the files first (FFmpeg's bwdif)",
}


def encode_all(config: ExtractConfig) -> int:
    """Run the extraction; returns how many samples of the manifest have no features in the end."""
    with join(deadline=config.deadline) as guard:  # leaving it waits for all ranks, which need not be equally fast
        publish = _encode_share(config, guard)
    return publish()


def _encode_share(config: ExtractConfig, guard: Watchdog) -> Callable[[], int]:
    """Encodes this rank's part; returns what is to be done when all ranks have."""
    guard.at("preparing", deadline=math.inf)  # every file is hashed, and encoders are read
    prepare_output(config.output)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = accelerator()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Leave the workers their cores: the threads of one operation spin while one of them waits for a core.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world - config.data.workers))
    agree(flags_of(config), "the configuration", way_out=ALIKE)
    listed = read_manifest(config.data.manifest, say, config.data.caption)
    dtype, task = getattr(torch, config.dtype), config.chosen_task
    encoders = Encoders(config.encoders, preset(config.model), task, device, dtype, config.tiling)
    samples = for_task(listed, controls=encoders.task.reads_control)
    asked = {sample.id: (sample.captions, sample.cut, sample.size, _describe_set(sample)) for sample in samples}
    agree(asked, "the samples of --data.manifest", None, COPY)
    files = identify_files(encoder_files(config.encoders, encoders.folders))
    check_ranks({"encoders": files})
    unread = sum(a != b for a, b in zip(listed, samples, strict=True))
    if unread:
        say(f"{task} uses no sources, masks or references: {unread} samples have them")
    geometry = encoders.fit_geometry(config.geometry)
    selection = select(samples, geometry, map_over_ranks(samples, partial(check_samples, geometry=geometry)))
    tell_short(selection, encoders.task)

    with FeatureCache(config.output) as cache:
        identified = _identify(selection.kept, cache, rank == 0, world)
        todo = cache.find_work(identified, geometry, encoders.identity, config.seed)
        if rank == 0:
            for name, what in ((config.data.manifest, selection), (config.output, todo)):
                print(f"{one_line(name)}: {what}", file=sys.stderr, flush=True)
            for row in _tabulate_asked(selection):
                print(one_line(row), file=sys.stderr, flush=True)
            if not cache.has_empty_text(encoders.identity):
                cache.put_empty_text(encoders.empty_text, encoders.identity, files)
        broadcast(lambda: check_room(config, todo.to_encode, geometry))
        dataset = VideoDataset(todo.to_encode, geometry, config.seed, on_error="return")
        progress = Progress(len(todo.to_encode), leader=rank == 0, world=world)
        # Shared out by key, not by place: a rank that sees the store a moment later must not shift everybody's share.
        own = [i for i, sample in enumerate(todo.to_encode) if int(todo.keys[sample.id][:8], 16) % world == rank]
        guard.at("the first clips")
        with closing(batches(dataset, own, config, lambda failure: _fail(cache, progress, failure))) as decoded:
            for clips in decoded:
                guard.at(f"the clips from {clips[0]['id']} on")
                for clip, features in zip(clips, encoders.encode(clips), strict=True):
                    cache.put(todo.keys[clip["id"]], features, clip["meta"])
                progress.advance(len(clips))
        progress.close()
        guard.at("the last features", deadline=math.inf)

    def publish() -> int:
        found = cache.finish(todo, selection.dropped)
        missing = len(samples) - found
        why = describe_missing(cache.failures().values(), config.output / "failures.jsonl")
        print(one_line(f"{found} of {len(samples)} samples in {config.output}{why}"), file=sys.stderr)
        for note, names in cache.notes(todo).items():
            many = f"{len(names)} sample{'s' * (len(names) != 1)}, e.g. {names[0]}"
            advice = ADVICE["interlaced" if note == "interlaced" else "HDR"]
            print(one_line(f"note: {note}: {many}: {advice}"), file=sys.stderr)
        if not found:
            raise ValueError(f"not one sample of {config.data.manifest} could be used{why}")
        features = FeatureDataset(config.output, None)
        there = set(features.ids)
        left_out = count_sets((sample, None) for sample in samples if sample.id not in there)
        sets = describe_sets(features.portions, [shape for _, *shape in features.buckets], left_out)
        write_sets(config.output, sets)
        for row in tabulate(sets, "latents of frames x rows x columns"):
            print(one_line(row), file=sys.stderr)
        return missing

    return publish if rank == 0 else lambda: 0


def check_room(config: ExtractConfig, samples: Sequence[Sample], geometry: Geometry) -> None:
    """Raise ValueError where the features of these samples do not fit on the disk of the output.

    Files of up to 32 of them say how large their clips are; of texts one row each is counted. So it is the least.
    """
    some = samples[:: -(-len(samples) // LOOKED_AT) or 1]
    shapes = [shape for shape in survey(some, geometry) if not isinstance(shape, str)]
    if not shapes:
        return
    family, model = find(config.model)
    sizes = [ClipSize(shape.frames, shape.height, shape.width, text=1) for shape in shapes]
    tensors = [x for size in sizes for x in family.example(model.config, config.chosen_task, size).values()]
    needed = sum(x.numel() * x.element_size() for x in tensors) // len(shapes) * len(samples)
    free = shutil.disk_usage(config.output).free
    if needed > free:
        raise ValueError(
            f"the features of {len(samples):,} clips take {needed / 2**30:,.1f} GiB or more ({len(shapes)} were looked "
            f"at), and {config.output} has {free / 2**30:,.1f} GiB free: free some, give another --output or a "
            "smaller --geometry, or encode while training (--data.manifest of mm_train)"
        )


def _describe_set(sample: Sample) -> tuple[str, ...]:
    """What its set asks for besides; the same on all hosts, which may have it at other paths."""
    one = sample.set
    return () if one is None else (one.name, str(one.repeats), str(one.weight), str(one.frames))


def _tabulate_asked(selection: Selection) -> list[str]:
    """The sets of a file of sets, before anything is decoded: with the largest clip that each sample may become."""
    if not any(sample.set for sample in selection.kept):
        return []
    asked = [geometry_of(sample, selection.geometry) for sample in selection.kept]
    shapes = [(one.num_frames, one.max_height, one.max_width) for one in asked]
    portions = portions_of(sample.set for sample in selection.kept)
    return tabulate(
        describe_sets(portions, shapes, count_sets(selection.dropped)), "clips of at most frames x height x width"
    )


def batches(dataset: VideoDataset, indices: Sequence[int], config: ExtractConfig, on_failure) -> Iterator[list[Clip]]:
    """Clips of one shape, up to config.batch of them, decoded ahead by the workers in the order of the manifest."""
    waiting: dict[torch.Size, list[Clip]] = defaultdict(list)
    with closing(decode(dataset, indices, config.data.workers)) as decoded:
        for clip in decoded:
            if isinstance(clip, Failure):
                on_failure(clip)
                continue
            same = waiting[clip["video"].shape]
            same.append(clip)
            if len(same) == config.batch:
                yield waiting.pop(clip["video"].shape)
    yield from waiting.values()


def _fail(cache: FeatureCache, progress: Progress, failure: Failure) -> None:
    cache.fail(failure.sample.id, failure.reason)
    progress.say(f"skipped {shorten(failure.sample.id)}: {shorten(failure.reason, 500)}")
    progress.advance(1)


def _identify(samples: list[Sample], cache: FeatureCache, leader: bool, world: int) -> list[Sample]:
    """The samples with the hashes of their files; every rank reads its share of them."""
    with tqdm(total=len(samples), unit="file", desc="hashing", disable=not (leader and sys.stderr.isatty())) as bar:

        def identify(own: Sequence[Sample]) -> Iterator[Sample]:
            for sample in cache.identify(own):
                bar.update(world)
                yield sample

        return map_over_ranks(samples, identify)


class Progress:
    """A bar on a terminal, elsewhere a line every ten seconds, with rate and time left. Ranks run alike: the first
    one's is shown.
    """

    def __init__(self, total: int, leader: bool, world: int):
        self.total, self.leader, self.world, self.done = total, leader, world, 0
        self.started = self.said = time.monotonic()
        self.bar = tqdm(total=total, unit="clip", dynamic_ncols=True, disable=not (leader and sys.stderr.isatty()))

    def advance(self, clips: int) -> None:
        self.done = min(self.total, self.done + clips * self.world)
        self.bar.update(clips * self.world)
        if self.leader and self.bar.disable and (time.monotonic() - self.said > 10 or self.done == self.total):
            self.said = time.monotonic()
            rate = self.done / max(self.said - self.started, 1e-9)
            left = (self.total - self.done) / rate
            print(
                f"{self.done}/{self.total} clips | {rate:.2f} clips/s | {left:.0f} s left", file=sys.stderr, flush=True
            )

    def say(self, text: str) -> None:
        tqdm.write(one_line(text), file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
