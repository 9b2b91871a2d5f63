"""Checks that look into files and build the model without values: see `mm_train.checks`, which names them in order.

Each says what it found; lines behind the first are notes. Nothing is written.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_convert import Checkpoint
from mm_convert.cli.checks import NotHere
from mm_data import Captions, FeatureDataset, Order, Pick, VideoDataset, for_task, identify_files, read_manifest, select
from mm_data.clips import survey
from mm_data.conversation_dataset import ConversationDataset
from mm_data.conversations import Conversations, Ledger, find_missing, read_conversations
from mm_data.random import generator
from mm_data.sets import portions_of
from mm_models.encoders.text import open_tokenizer
from mm_models.families import family_of
from mm_parallel.compile import check_compiler as check_compiler_of
from mm_parallel.device import bf16_ok, max_device_memory, name_of
from mm_parallel.device import device as accelerator
from mm_parallel.devices import find_device, recognize
from mm_parallel.quantise import check_device as check_codes
from mm_train import start
from mm_train.adapter import open_adapter
from mm_train.checks.asked import Asked
from mm_train.checks.paths import check_encoders as check_folders
from mm_train.checks.paths import check_space, checkpoint_bytes, nearest
from mm_train.contents import encoder_files
from mm_train.conversations import describe_refused, open_processing, read_sources
from mm_train.data import check_features as check_features_of
from mm_train.encode import fit_geometry
from mm_train.objective import build_objective
from mm_train.sample_adapter import open_sample_adapter
from mm_train.start import Start
from mm_train.step import OnDevice

LOOKED_AT = 256  # samples of which files are looked for
TRIED = 8  # samples of which one must be read
SHAPES = 16  # shapes of which one sample each goes through the stem


def check_cut(asked: Asked) -> str:
    """The layout can be made of this model."""
    start.check_cut(asked.model, asked.config, asked.world)
    return f"{sum(1 for _ in asked.model.layers)} layers"


def check_tensors(asked: Asked) -> str:
    """Every tensor's name, shape and kind of numbers, from the headers of the files, against the model."""
    config = asked.config
    found, _ = asked.continued
    if found and not config.has_frozen:
        return NotHere(f"the run goes on from {found}, and reads --weights no more")
    for one in config.trainees:
        source = Start(asked.model, one)
        source.check_fit(asked.model)
        source.check_open(asked.model)
    if source.file is None:
        return NotHere("fresh weights are drawn (--weights random)")
    said = source.describe().strip()
    notes = [*(note for note in source.file.notes if note not in said), *([said] if said else [])]
    return "\n".join([describe_file(source.file), *notes])


def describe_file(file: Checkpoint) -> str:
    """`1,095 tensors in 6 files, 26.6 GiB, BF16, names of diffusers`"""
    size = sum(tensor.nbytes for tensor in file.tensors.values())
    kinds = " and ".join(sorted({tensor.dtype for tensor in file.tensors.values()}))
    files = f"{len(file.files)} file{'s' * (len(file.files) != 1)}"
    return f"{len(file.tensors):,} tensors in {files}, {_size(size)}, {kinds}, {file.dialect} names"


def check_adapter(asked: Asked) -> str:
    """The adapter to go on from stands beside the linears that are trained."""
    if asked.config.lora.weights is None:
        return NotHere("no --lora.weights: nothing is gone on from")
    for one in asked.config.trainees:
        adapter = open_adapter(one)
        source = Start(asked.model, one, adapter)
    return "\n".join([f"{len(adapter.modules)} linears, as --lora.targets name them", *source.other_base])


def check_sample_adapter(asked: Asked) -> str:
    """The adapter that acts while samples are made fits the model."""
    if asked.config.sample.lora is None:
        return NotHere("no --sample.lora")
    adapter = open_sample_adapter(asked.config, asked.model)
    whole = f", {len(adapter.differences)} whole differences" if adapter.differences else ""
    return f"{len(adapter.alphas)} linears{whole}, strength {adapter.strength:g}, while samples are made"


def check_encoders(asked: Asked) -> str:
    """Encoders are of the model's widths, and their tokenizer opens; or the processor of conversations does."""
    config = asked.config
    if asked.family.chat is not None:
        open_processing(config)
        return "tokenizer and image processor open"
    used = bool(config.sample.prompts or config.sample.from_validation)
    given = {"--data.encoders": config.data.encoders, "--sample.encoders": config.sample.encoders if used else None}
    given = {flag: path for flag, path in given.items() if path is not None}
    if not given:
        return NotHere("features are trained on, and no samples are made")
    video, said = asked.family.video, []
    for flag, path in given.items():
        folders = [part for part in video.encoders(asked.shape) if flag == "--data.encoders" or part != "image_encoder"]
        check_folders(video, path, folders, flag)
        video.fit(asked.shape, path)
        open_tokenizer(path)
        said.append(f"{path}: {', '.join(folders)}")
    return "; ".join(said)


def check_features(asked: Asked) -> str:
    """Features are those of the model and its task."""
    path = asked.config.data.features
    if path is None:
        return NotHere("nothing is trained from features")
    check_features_of(path, asked.config)
    features = FeatureDataset(path)
    said = f"{len(features):,} samples in {len(set(features.buckets))} shapes"
    return "\n".join([said, *_other_encoders(asked, features)])


def _other_encoders(asked: Asked, features: FeatureDataset) -> Iterator[str]:
    """A note where sample videos are decoded, or their prompts read, by others than those that made the features."""
    samples = asked.config.sample
    if not (samples.prompts or samples.from_validation) or samples.encoders is None:
        return
    folders = [part for part in asked.family.video.encoders(asked.shape) if part != "image_encoder"]
    now = identify_files(encoder_files(samples.encoders, folders))
    if other := [name for name, found in now.items() if features.encoders.get(name, found) != found]:
        yield (
            f"--sample.encoders {samples.encoders} are not those that made --data.features {features.path}: {other[0]} "
            f"was {features.encoders[other[0]]}, and is {now[other[0]]}; if they are another model's, sample videos "
            "show nothing of what is learned: give the directory that was given to mm_train.extract --encoders"
        )


def check_validation(asked: Asked) -> str:
    """Those of validation are, too, and were made as those that are trained."""
    config = asked.config
    path = config.validation.features
    if path is None:
        return NotHere("no --validation.features")
    check_features_of(path, config)
    held_out = FeatureDataset(path)
    said = f"{min(len(held_out), config.validation.max_samples):,} of {len(held_out):,} samples"
    if config.data.features is None:
        return said
    trained = FeatureDataset(config.data.features)
    if None not in (trained.encoding, held_out.encoding) and trained.encoding != held_out.encoding:
        said += (
            f"\n--validation.features {path} and --data.features {config.data.features} were made by other encoders, "
            "with other tiles of the VAE, or for another task: their losses do not compare"
        )
    known = set(trained.contents) - {None}
    if twice := [name for name, content in zip(held_out.ids, held_out.contents, strict=True) if content in known]:
        said += (
            f"\n{len(twice):,} of the samples of --validation.features {path}, e.g. {twice[0]}, are of files that are "
            "trained, perhaps in another size or cut: their loss is not that of what is held out"
        )
    return said


def check_sample(asked: Asked) -> str:
    """One sample is read for real, and the model's stem takes what is made of it, on the meta device."""
    config = asked.config
    if asked.family.chat is not None:
        return "\n".join(_try_conversations(asked))
    if config.data.features is None:
        return _try_clips(asked)
    features = FeatureDataset(config.data.features, Captions(config.seed, config.data.text_dropout))
    features.check_files()
    if config.validation.features is not None:
        FeatureDataset(config.validation.features).check_files()
    by_shape = {shape: index for index, shape in reversed(list(enumerate(features.buckets)))}
    indices = sorted(by_shape.values())[:SHAPES]
    for index in indices:
        batch = features.batch([Pick(index, 0)])
        _enter(asked, batch.tensors, batch.ids[0], config.data.features)
    shape = "x".join(map(str, features.buckets[indices[0]]))
    return f"latents of {shape}{f' and {len(indices) - 1} other shapes' if len(indices) > 1 else ''} enter the model"


def _enter(asked: Asked, tensors: Mapping[str, Tensor], name: str, where: Path | str) -> None:
    """Raise ValueError where the stem of the model does not take a batch."""
    objective = build_objective(asked.config)
    drawn = objective.draw(tensors, lambda i, purpose: generator(asked.config.seed, 0, name, purpose))
    inputs = objective.inputs(OnDevice(tensors, torch.device("cpu"), objective.host), drawn)
    nowhere = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in inputs.items()}
    try:
        asked.model.stem(**nowhere)
    except ValueError as error:
        raise ValueError(f"{where}: sample {name} does not fit {asked.config.model}: {error}") from error


def _spread(count: int, most: int) -> list[int]:
    """At most so many numbers below `count`, from its whole length."""
    return list(dict.fromkeys(number * count // most for number in range(most)))


def _try_clips(asked: Asked) -> str:
    """A clip is decoded; the files of others are looked into."""
    config, video = asked.config, asked.family.video
    flag, heard = f"--data.manifest {config.data.manifest}", []
    multiples = video.multiples(asked.shape, config.data.encoders)
    task = asked.family.task(asked.shape, build_objective(config).task)
    listed = for_task(
        read_manifest(config.data.manifest, heard.append, config.data.caption), controls=task.reads_control
    )
    geometry = fit_geometry(config.data.geometry, multiples, task)
    some = [listed[index] for index in _spread(len(listed), LOOKED_AT)]
    selection = select(some, geometry)
    shapes = survey(selection.kept, geometry)
    usable = [sample for sample, shape in zip(selection.kept, shapes, strict=True) if not isinstance(shape, str)]
    reasons = [f"{sample.id}: {reason}" for sample, reason in selection.dropped]
    reasons += [f"{s.id}: {why}" for s, why in zip(selection.kept, shapes, strict=True) if isinstance(why, str)]
    if not usable:
        why = f", e.g. {reasons[0]}" if reasons else ""
        raise ValueError(f"{flag}: none of {len(some)} samples that were looked at can be used{why}")
    clips = VideoDataset(usable[:TRIED], geometry, config.seed, on_error="return")
    found, failures = None, []
    for index in range(len(clips)):
        clip = clips[index]
        if isinstance(clip, dict):
            found = clip
            break
        failures.append(f"{clip.sample.id}: {clip.reason}")
    if found is None:
        raise ValueError(f"{flag}: none of {len(clips)} clips can be decoded, e.g. {failures[0]}")
    frames, height, width = found["video"].shape[1:]
    time, *sides = multiples
    tokens = ((frames - 1) // time + 1) * (height // sides[0]) * (width // sides[1])
    notes = [*heard, *failures]
    if reasons:
        notes.append(f"{len(reasons)} of {len(some)} samples that were looked at cannot be used, e.g. {reasons[0]}")
    said = f"{found['id']}: {frames} frames of {height}x{width} at {found['fps']:g} per second, {tokens:,} tokens"
    return "\n".join([said, *notes])


def _try_conversations(asked: Asked) -> Iterator[str]:
    """A conversation of each flag is encoded; the media of others are looked for."""
    config, processing = asked.config, open_processing(asked.config)
    for flag, listed in (
        ("--data.conversations", config.data.conversations),
        ("--validation.conversations", config.validation.conversations),
    ):
        if not listed:
            continue
        conversations = read_conversations(read_sources(listed, flag), config.data.media, boxes=config.data.boxes)
        if not len(conversations):
            raise ValueError(f"{flag}: there is no conversation in it")
        indices, ledger = _spread(len(conversations), LOOKED_AT), Ledger()
        find_missing(conversations, ledger, indices=indices)
        if len(ledger) == len(indices):
            first = ledger.entries[0]
            raise ValueError(
                f"{flag}: not one of {len(indices)} conversations that were looked at can be used "
                f"({describe_refused(ledger)}), e.g. {first.id}: {first.text}; is --data.media {config.data.media} "
                "the right folder?"
            )
        if len(ledger):
            first = ledger.entries[0]
            looked = f"{flag}: {len(ledger)} of {len(indices)} that were looked at cannot be used"
            notes = [f"{looked} ({describe_refused(ledger)}), e.g. {first.id}: {first.text}"]
        else:
            notes = []
        yield _try_one(asked, flag, conversations, processing, ledger)
        yield from notes


def _try_one(asked: Asked, flag: str, conversations: Conversations, processing: Any, ledger: Ledger) -> str:
    data, refused = asked.config.data, {entry.id for entry in ledger.entries}
    found = Ledger()
    dataset = ConversationDataset(
        conversations,
        processing,
        max_tokens=data.max_tokens,
        max_patches=data.most_patches,
        too_long=data.too_long,
        packing=False,
        survey=False,
        ledger=found,
        decode_timeout=data.decode_timeout,
        cost=family_of(asked.model.config).cost(asked.model).weigh,
    )
    usable = [i for i in _spread(len(conversations), LOOKED_AT) if conversations.ids[i] not in refused]
    for index in usable[:TRIED]:
        packs = [pack for pack in dataset.plan([Pick(index, 0)], 1)[0] if pack.picks]
        batch = dataset.batch(*packs[0]) if packs else None
        if batch is None or not batch.ids:
            continue
        _enter(asked, batch.tensors, batch.ids[0], flag)
        counts = build_objective(asked.config).count(batch.tensors)
        numbers = ", ".join(f"{count:,.0f} {name.replace('_', ' ')}" for name, count in counts.items() if count)
        return f"{flag}: {len(conversations):,} conversations; {batch.ids[0]}: {numbers}"
    first = found.entries[0]
    raise ValueError(f"{flag}: none of {len(usable[:TRIED])} conversations can be used, e.g. {first.id}: {first.text}")


def check_batches(asked: Asked) -> str:
    """There are enough samples for a step."""
    config = asked.config
    each = config.data.global_batch
    if config.data.features is not None:
        features = FeatureDataset(config.data.features)
        small = Order(features.buckets, each, config.seed, config.data.small_buckets, features.sets).small
        notes = [small.describe("--data.small_buckets ", "--data.global_batch ")] if small else []
        epoch = math.floor(sum(one.places for one in features.portions))
        said = f"{len(features):,} samples, {each} a step: an epoch is about {max(1, epoch // each):,} steps"
        return "\n".join([said, *notes])
    if config.data.manifest is not None:
        listed = read_manifest(config.data.manifest, lambda said: None, config.data.caption)
        count, epoch = len(listed), sum(one.places for one in portions_of(sample.set for sample in listed))
    else:
        sources = read_sources(config.data.conversations, "--data.conversations")
        count = epoch = len(read_conversations(sources, config.data.media, boxes=config.data.boxes))
    few = (
        f"\nthey are fewer than a step takes ({each}): samples are shown several times in a step"
        if count < each
        else ""
    )
    steps = max(1, math.floor(epoch) // each)
    return f"{count:,} samples are listed, {each} a step: an epoch is about {steps:,} steps{few}"


def check_disk(asked: Asked) -> str:
    """A checkpoint fits on the disk of the output; and it is said where not all that are kept do."""
    config = asked.config
    trained = sum(p.numel() for p in asked.model.parameters() if p.requires_grad)
    check_space(trained, config)
    one, free = checkpoint_bytes(trained, config), shutil.disk_usage(nearest(config.run_dir)).free
    kept = config.checkpoint.keep + 1 if config.checkpoint.keep else config.steps // config.checkpoint.every + 1
    said = f"a checkpoint takes {_size(one)}, {_size(free)} are free"
    if one * kept + 4 * trained > free:
        said += (
            f"\n{kept} checkpoints (--checkpoint.keep {config.checkpoint.keep}, and one that is being written) and the "
            f"last weights take {_size(one * kept + 4 * trained)}"
        )
    return said


def check_device(asked: Asked) -> str:
    """What is found here, and whether it computes in the dtype of the run."""
    device = accelerator()
    dtype = getattr(torch, asked.config.dtype)
    if dtype == torch.bfloat16 and not bf16_ok(device):
        raise ValueError(f"--dtype bfloat16: {name_of(device)} has no arithmetic of it: give --dtype float32")
    check_codes(asked.config.memory.base, device)
    if device.type == "cpu":
        return f"no accelerator is found here: a run computes on the CPU, with {torch.get_num_threads()} threads"
    return f"{torch.accelerator.device_count()} x {name_of(device)}, {_size(max_device_memory(device))}"


def check_compiler(asked: Asked) -> str:
    """There is what `--compile` needs to make code."""
    if not asked.config.compile:
        return NotHere("no --compile")
    return check_compiler_of(accelerator().type)


def check_attention(asked: Asked) -> str:
    """The kernel that was named runs here."""
    here, name = accelerator(), asked.config.attention
    if here.type == "cpu" and name not in ("auto", "cpu", "math"):
        return NotHere(f"no accelerator here that could run {name}")
    return start.choose_attention(asked.config, None, here)


def check_memory(asked: Asked) -> str:
    """The fullest rank fits the device, as far as an estimate tells."""
    from mm_train.estimate.estimate import estimate  # which asks these checks

    if asked.device:
        device = find_device(asked.device, asked.devices)
    else:
        here = accelerator()
        device = None if here.type == "cpu" else recognize(name_of(here))
    if device is None:
        return NotHere("no accelerator of the table is found here: --device h100 (or another) says where it will run")
    found = estimate(asked.config, asked.world, device)
    said = f"about {_size(found.peak)} of the {_size(device.memory)} of {device.name}"
    search = "python -m mm_train.estimate --search with the same flags ranks the layouts that fit"
    if found.peak > device.memory:
        memory = asked.config.memory
        ways = [
            *(["--memory.recompute full"] if memory.recompute != "full" else []),
            *(["--memory.offload inputs"] if memory.offload != "inputs" else []),
        ]
        if asked.config.has_frozen and asked.config.parallel.tp == 1:
            ways += ["--memory.base nf4"] if memory.base == "dtype" else []
            ways += ["--memory.host_layers"] if not memory.host_layers else []
        raise ValueError(
            f"a rank takes {said}, by estimate ({found.fullest.moment}): give {', '.join([*ways, 'more ranks'])}, or "
            f"another layout; {search}"
        )
    if not found.fits(device):
        host = max(rank.host for rank in found.memory)
        raise ValueError(
            f"a rank puts about {_size(host)} on the host, which has {_size(device.host_memory)} for each "
            f"{device.name}, by estimate: offload less, or give more ranks; {search}"
        )
    return f"{said}, by estimate"


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
