"""What cannot work, found before anything is loaded: so a mistake costs a second and not a quarter of an hour.

A list of named checks. `train` raises what the first one finds; the list can as well be printed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

from mm_convert import read_json
from mm_convert.cli.values import check_config
from mm_data import Geometry
from mm_data.annotations import ANNOTATION, find_annotations
from mm_models.families import find
from mm_models.family import Video
from mm_models.folder import check_parts
from mm_parallel.launch import read_launch
from mm_train.adapter import check_adapter
from mm_train.config import (
    AnswerSamples,
    Config,
    ConversationData,
    ConversationValidation,
    VideoData,
    VideoSamples,
    VideoValidation,
)
from mm_train.conversations import find_processor, read_sources
from mm_train.objective import architecture, choose_options, choose_task, expert_boundary
from mm_train.settle import settle_samples

# The options of a run that are for one kind of model alone.
VIDEOS = {"data": VideoData, "validation": VideoValidation, "sample": VideoSamples}
CONVERSATIONS = {"data": ConversationData, "validation": ConversationValidation, "sample": AnswerSamples}

When = Literal["at once", "with torch"]


class Check(NamedTuple):
    """One thing that must hold. `run(config)` raises ValueError with the numbers, the reason and the way out."""

    name: str
    when: When
    """at once: looks at flags, paths and small files. with torch: also opens data; takes seconds."""
    run: Callable[[Config], None]


def check(config: Config, when: When = "at once") -> None:
    """Raise ValueError for what is impossible, or does not go together."""
    for one in CHECKS:
        if one.when == when:
            one.run(config)


def check_encoders(video: Video, path: Path | None, folders: Sequence[str], flag: str) -> None:
    """Raise ValueError unless a diffusers directory holds these folders, and nothing in them must not be done."""
    missing = [f"{folder}/" for folder in folders if path is None or not (path / folder).is_dir()]
    if missing:
        wanted = ", ".join(f"{folder}/" for folder in folders)
        raise ValueError(f"{flag} {path} has no {', '.join(missing)}: give the diffusers directory with {wanted}")
    check_parts(path, folders, video.own_folders, video.kinds)


def check_manifest(path: Path) -> None:
    """Raise ValueError unless this is a list of samples, or a folder of lists. No sample is read."""
    if not path.exists():
        raise ValueError(
            f"--data.manifest {path} is not a file{_near(path)}: give a data.txt, data.json or .jsonl, or a folder "
            f"with {ANNOTATION} in it or in its folders"
        )
    try:
        find_annotations(path)
    except ValueError as error:
        raise ValueError(f"--data.manifest {error}") from error


def _limits(config: Config) -> None:
    """Of a configuration that no command line has read."""
    check_config(config, "--")


def _model(config: Config) -> None:
    _, preset = find(config.model)
    family, shape = architecture(config)
    if preset.boundary and not config.expert:
        raise ValueError(
            f"{config.model} is two models, for high and for low noise: give --expert high or --expert low, and "
            "train the other into the same --output afterwards"
        )
    if config.expert and not preset.boundary:
        raise ValueError(f"--expert {config.expert}: {config.model} is one model, not two experts: leave it out")
    choose_task(config.model, family, shape, config.objective.task, "--objective.task")
    choose_options(config, family)


def _weights(config: Config) -> None:
    if not config.weights:
        raise ValueError(
            "no starting weights: give --weights with a diffusers directory, the makers' original files or one of our "
            "checkpoints, or ask for a fresh model with --weights random"
        )
    if config.weights != "random" and not Path(config.weights).exists():
        raise ValueError(
            f"--weights {config.weights} does not exist{_near(Path(config.weights))} (a fresh model has to be asked "
            "for: --weights random)"
        )


def _near(path: Path) -> str:
    neighbours = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(str(path), neighbours, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _kind(config: Config) -> None:
    """Options are for what the model is trained on: videos, or conversations."""
    chats = architecture(config)[0].chat is not None
    others, what = (VIDEOS, "videos") if chats else (CONVERSATIONS, "conversations")
    reads = "reads conversations" if chats else "makes videos"
    for section, of in others.items():
        for one in fields(of):
            default = one.default if one.default_factory is MISSING else one.default_factory()
            if getattr(getattr(config, section), one.name) != default:
                raise ValueError(
                    f"--{section}.{one.name} is for {what}, and {config.model} {reads}: leave it out"
                    + (" (give --data.conversations)" if chats and section == "data" else "")
                )
    if config.log_tps and not chats:
        raise ValueError(f"--log_tps is for conversations, and {config.model} {reads}: leave it out")


def _data(config: Config) -> None:
    _conversations(config) if architecture(config)[0].chat is not None else _videos(config)


def _conversations(config: Config) -> None:
    """Files and folders are there. What is in them is looked at later."""
    data = config.data
    if not data.conversations:
        raise ValueError(
            "no training data: give --data.conversations with JSON or JSONL of conversations, e.g. "
            "--data.conversations a.json,b.jsonl"
        )
    for flag, listed in (
        ("--data.conversations", data.conversations),
        ("--validation.conversations", config.validation.conversations),
    ):
        for source in read_sources(listed, flag):
            if not Path(source.path).is_file():
                raise ValueError(f"{flag} {source.path} is not a file{_near(Path(source.path))}")
    if data.media is not None and not data.media.is_dir():
        raise ValueError(f"--data.media {data.media} is not a folder{_near(data.media)}")
    find_processor(config, architecture(config)[0].chat)
    if config.validation.answers and not config.validation.conversations:
        raise ValueError(
            f"--validation.answers {config.validation.answers}: give --validation.conversations, from which they are"
        )
    if config.validation.answers > config.validation.max_samples:
        raise ValueError(
            f"--validation.answers {config.validation.answers} are of the {config.validation.max_samples} "
            "conversations of --validation.max_samples: raise that, or ask for fewer"
        )


def _videos(config: Config) -> None:
    data = config.data
    if (data.features is None) == (data.manifest is None):
        raise ValueError(
            f"{'no' if data.features is None else 'two kinds of'} training data: give either --data.features, a "
            "directory written by `python -m mm_train.extract`, or --data.manifest and --data.encoders, to encode "
            "the videos while training"
        )
    if data.features is not None:
        given = {"encoders": data.encoders is not None, "geometry": data.geometry != Geometry()}
        for name in (name for name, given in given.items() if given):
            raise ValueError(f"--data.{name} is for --data.manifest: features were encoded by mm_train.extract")
    elif data.encoders is None and data.manifest.exists():
        raise ValueError("--data.manifest needs --data.encoders, the diffusers directory of the encoders")
    else:
        check_manifest(data.manifest)
        family, shape = architecture(config)
        check_encoders(family.video, data.encoders, family.video.encoders(shape), "--data.encoders")
    for flag, path in (("data.features", data.features), ("validation.features", config.validation.features)):
        if path is not None and not path.is_dir():
            raise ValueError(
                f"--{flag} {path} is not a directory{_near(path)}; `python -m mm_train.extract --output {path} …` "
                "writes one"
            )


def _objective(config: Config) -> None:
    low, high = config.objective.range or (0, 1)
    if not low < high:
        raise ValueError(f"--objective.range is [{low}, {high}]; it must satisfy 0 <= low < high <= 1")
    if config.objective.boundary is not None and not config.expert:
        raise ValueError(f"--objective.boundary {config.objective.boundary}: it is for --expert high or low")


def _rates(config: Config) -> None:
    if config.optim.warmup >= config.steps > 1:
        raise ValueError(f"--optim.warmup {config.optim.warmup} takes the whole run of {config.steps} steps")
    if config.optim.schedule != "constant" and config.optim.min_lr > config.optim.lr:
        raise ValueError(
            f"--optim.min_lr {config.optim.min_lr} is more than --optim.lr {config.optim.lr}, and the "
            f"{config.optim.schedule} schedule falls from one to the other: give a smaller one, or leave it out"
        )
    if config.optim.schedule == "constant" and config.optim.min_lr:
        raise ValueError(
            f"--optim.min_lr {config.optim.min_lr} is where a schedule ends, and --optim.schedule is constant: "
            "give cosine or linear, or leave it out"
        )


def _trained(config: Config) -> None:
    """What is trained: patterns, adapters."""
    if not config.trained:
        raise ValueError("--trained is empty: give patterns of names, as --trained '[\"blocks.*\"]', or leave it out")
    if config.lora.rank and config.trained != ("*",):
        raise ValueError(
            "--trained (perhaps of the model's recipe) chooses weights, --lora.rank trains adapters beside all: "
            "give --recipe with the name of the model and -lora, or --trained '[\"*\"]'"
        )
    if config.lora.rank and config.weights == "random":
        raise ValueError(
            "--lora.rank with --weights random: adapters stand beside weights that stay as they are, and these would "
            "have learnt nothing. Give --weights, or train without adapters"
        )
    if config.lora.dropout and config.parallel.tp > 1:
        raise ValueError("--lora.dropout would be drawn apart by --parallel.tp ranks: use 0, or no tp")
    if config.lora.dropout and (config.parallel.pp_layers or config.parallel.exact):
        raise ValueError(
            "--lora.dropout cannot be drawn alike in a pipeline, where micro-batches overlap, nor in exact mode: "
            "use 0, or no --parallel.pp_layers and no --parallel.exact"
        )


def _layout(config: Config) -> None:
    """The layout fits the ranks that were started, and the batch fits the layout."""
    layout = config.parallel.resolve(read_launch().world)
    config.micro_batches(layout.dp_replicate * layout.dp_shard)


def _samples(config: Config) -> None:
    s = config.sample
    if not s.prompts and not s.from_validation:
        return
    family, shape = architecture(config)
    if family.chat is not None:
        if not config.validation.conversations:
            raise ValueError(
                f"--sample.from_validation {s.from_validation}: give --validation.conversations, which are asked"
            )
        return
    if config.expert:
        raise ValueError(
            f"--sample.* with --expert {config.expert}: a video takes both experts. Generate with mm_infer, from the "
            "--output of both"
        )
    if s.from_validation and config.validation.features is None:
        raise ValueError(
            f"--sample.from_validation {s.from_validation}: give --validation.features, and how many of them"
        )
    s = settle_samples(config)
    video = family.video
    folders = [part for part in video.encoders(shape) if part != "image_encoder"]  # what it saw lies in the features
    check_encoders(video, s.encoders, folders, "sample videos: --sample.encoders")
    time, rows, columns = video.multiples(shape, s.encoders)
    if s.frames % time != 1 % time:
        below = (s.frames - 1) // time * time + 1
        raise ValueError(f"--sample.frames {s.frames} is not {time}k+1; the nearest are {below} and {below + time}")
    for name, value, multiple in (("height", s.height, rows), ("width", s.width, columns)):
        if value % multiple:
            below = value // multiple * multiple
            nearest = f"{below} and {below + multiple}" if below else f"{multiple}"
            raise ValueError(
                f"--sample.{name} {value} is not a multiple of {multiple} (pixels per latent of this VAE x latents per "
                f"token); the nearest are {nearest}"
            )


def _output(config: Config) -> None:
    """The output must not hold what this run would overwrite or mix with: one model where there are two experts,
    experts beside one model, or an expert that was trained up to another boundary.
    """
    made = config.artifact
    pair = [p for p in (made / "experts.json", config.output / "high", config.output / "low") if p.exists()]
    one = [
        p for p in (config.output / "metrics.jsonl", made / "config.json", made / "adapter_config.json") if p.exists()
    ]
    if other := one if config.expert else pair:
        kinds = ("one model", "an expert of two") if config.expert else ("two experts", "one model")
        raise ValueError(f"{other[0]} belongs to {kinds[0]}, and this run trains {kinds[1]}: choose another --output")
    if not config.expert or not (made / "experts.json").exists():
        return
    said, wanted = read_json(made / "experts.json").get("boundary"), expert_boundary(config)
    if said != wanted:
        raise ValueError(
            f"{made} holds experts that part at noise level {said}; this run would part at {wanted}. Give "
            f"--objective.boundary {said}, or another --output"
        )


def _features(config: Config) -> None:
    from mm_train.data import check_features  # torch, only now

    for path in (config.validation.features, config.data.features):
        if path is not None:
            check_features(path, config)


def _compile(config: Config) -> None:
    if config.compile and config.parallel.exact:
        raise ValueError(
            "--compile with --parallel.exact: compiled kernels sum in an order of their own: leave one of them out"
        )
    if config.compile and config.parallel.schedule == "zero_bubble":
        raise ValueError(
            "--compile with --parallel.schedule zero_bubble: it splits a backward in two, and that of compiled code is "
            "one. Use schedule 1f1b, or leave --compile out"
        )


def _compiler(config: Config) -> None:
    if config.compile:
        from mm_parallel.compile import check_compiler
        from mm_parallel.device import device

        check_compiler(device().type)


CHECKS = (
    Check("limits", "at once", _limits),
    Check("model", "at once", _model),
    Check("weights", "at once", _weights),
    Check("kind", "at once", _kind),
    Check("data", "at once", _data),
    Check("objective", "at once", _objective),
    Check("learning rate", "at once", _rates),
    Check("what is trained", "at once", _trained),
    Check("adapter", "at once", check_adapter),
    Check("layout", "at once", _layout),
    Check("compile", "at once", _compile),
    Check("samples", "at once", _samples),
    Check("output", "at once", _output),
    Check("compiler", "with torch", _compiler),
    Check("features", "with torch", _features),
)


def check_space(trained: int, config: Config) -> None:
    """Raise ValueError if not even one checkpoint of so many trained parameters fits on the disk of the output."""
    needed = trained * (16 if config.optim.ema else 12)  # float32: weights, two moments, and the average
    free = shutil.disk_usage(config.run_dir).free
    if needed > free:
        raise ValueError(
            f"a checkpoint needs {needed / 2**20:,.0f} MiB and {config.output} has {free / 2**20:,.0f} MiB free: "
            "free some, or choose another --output"
        )
