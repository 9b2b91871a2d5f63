"""Paths that are not there, or hold something else; and room for what will be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from mm_convert import read_json
from mm_convert.cli.checks import NotHere
from mm_data import Geometry
from mm_data.manifest import list_files
from mm_data.sets import is_sets_file, read_sets
from mm_models.family import Video
from mm_models.folder import check_parts
from mm_train.checks.asked import Asked
from mm_train.config import Config
from mm_train.conversations import find_processor, read_sources
from mm_train.objective import architecture, expert_boundary
from mm_train.optimizers import KINDS
from mm_train.settle import describe_known_samples, settle_samples


def check_encoders(video: Video, path: Path | None, folders: Sequence[str], flag: str) -> None:
    """Raise ValueError unless a diffusers directory holds these folders, and nothing in them must not be done."""
    missing = [f"{folder}/" for folder in folders if path is None or not (path / folder).is_dir()]
    if missing:
        wanted = ", ".join(f"{folder}/" for folder in folders)
        raise ValueError(f"{flag} {path} has no {', '.join(missing)}: give the diffusers directory with {wanted}")
    check_parts(path, folders, video.own_folders, video.kinds)


def check_manifest(path: Path) -> None:
    """Raise ValueError unless this is a list of samples, a folder of lists or of clips, or sets. No sample is read."""
    if not path.exists():
        raise ValueError(
            f"--data.manifest {path} is not a file{_near(path)}: give a data.txt, data.json or .jsonl, a folder of "
            "clips with a .txt beside each, or a sets.toml of these"
        )
    try:
        list_files(path)
    except ValueError as error:
        raise ValueError(f"--data.manifest {error}") from error


def check_weights(asked: Asked) -> str:
    config = asked.config
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
    return "a fresh model" if config.weights == "random" else f"{config.weights} is there"


def _near(path: Path) -> str:
    neighbours = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(str(path), neighbours, n=1)
    return f", did you mean {near[0]}?" if near else ""


def check_data(asked: Asked) -> str:
    return _conversations(asked.config) if asked.family.chat is not None else _videos(asked.config)


def _conversations(config: Config) -> str:
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
    return ", ".join(str(source.path) for source in read_sources(data.conversations, "--data.conversations"))


def _videos(config: Config) -> str:
    data = config.data
    if (data.features is None) == (data.manifest is None):
        raise ValueError(
            f"{'no' if data.features is None else 'two kinds of'} training data: give either --data.features, a "
            "directory written by `python -m mm_train.extract`, or --data.manifest and --data.encoders, to encode "
            "the videos while training"
        )
    if data.features is not None:
        given = {"encoders": data.encoders is not None, "geometry": data.geometry != Geometry()}
        given["caption"] = data.caption is not None
        for name in (name for name, given in given.items() if given):
            raise ValueError(f"--data.{name} is for --data.manifest: features were encoded by mm_train.extract")
    elif data.encoders is None and data.manifest.exists():
        raise ValueError("--data.manifest needs --data.encoders, the diffusers directory of the encoders")
    else:
        check_manifest(data.manifest)
        family, shape = architecture(config)
        check_encoders(family.video, data.encoders, family.video.encoders(shape), "--data.encoders")
    for flag, path in (("data.features", data.features), ("validation.features", config.validation.features)):
        if path is not None and is_sets_file(path) and path.is_file():
            try:
                read_sets(path, of_features=True)
            except ValueError as error:
                raise ValueError(f"--{flag} {error}") from error
        elif path is not None and not path.is_dir():
            raise ValueError(
                f"--{flag} {path} is not a directory{_near(path)}; `python -m mm_train.extract --output {path} …` "
                "writes one"
            )
    return f"features in {data.features}" if data.features else f"clips of {data.manifest}"


def check_samples(asked: Asked) -> str:
    config, s = asked.config, asked.config.sample
    if not s.prompts and not s.from_validation:
        if s.lora is not None:
            raise ValueError(
                f"--sample.lora {s.lora} acts while samples are made, and none are: give --sample.prompts or "
                "--sample.from_validation, or leave it out"
            )
        return NotHere("no --sample.prompts and no --sample.from_validation")
    family, shape = architecture(config)
    if family.chat is not None:
        if not config.validation.conversations:
            raise ValueError(
                f"--sample.from_validation {s.from_validation}: give --validation.conversations, which are asked"
            )
        return f"{s.from_validation} answers, every {s.every:,} steps"
    if config.expert in ("high", "low"):
        raise ValueError(
            f"--sample.* with --expert {config.expert}: a video takes both experts. Generate with mm_infer, from the "
            "--output of both"
        )
    if s.from_validation and config.validation.features is None:
        raise ValueError(
            f"--sample.from_validation {s.from_validation}: give --validation.features, and how many of them"
        )
    if s.lora is None and s.lora_strength != 1:
        raise ValueError(f"--sample.lora_strength {s.lora_strength:g} is that of an adapter: give --sample.lora")
    if s.lora is not None and config.compile and (config.memory.base != "dtype" or config.memory.host_layers):
        raise ValueError(
            "--sample.lora runs beside what --memory.base or --memory.host_layers holds, which compiled layers do not "
            "see: leave out --compile, or --sample.lora"
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
    made = f"{len(s.prompts) + s.from_validation} of {s.frames} frames of {s.height}x{s.width}, every {s.every:,} steps"
    known = describe_known_samples(config)
    return f"{made}\n{known}" if known else made


def check_output(asked: Asked) -> str:
    """The output must not hold what this run would overwrite or mix with: one model where there are two experts,
    experts beside one model, or an expert that was trained up to another boundary.
    """
    config = asked.config
    made = config.artifact
    runs = {name: config.output / name for name in ("high", "low", "both")}
    if config.expert == "both" and (other := [runs[name] for name in ("high", "low") if runs[name].exists()]):
        raise ValueError(f"{other[0]} is the run of one expert, and this run trains both: choose another --output")
    if config.expert in ("high", "low") and runs["both"].exists():
        raise ValueError(f"{runs['both']} is a run of both experts, and this trains one: choose another --output")
    pair = [p for p in (made / "experts.json", *runs.values()) if p.exists()]
    one = [
        p for p in (config.output / "metrics.jsonl", made / "config.json", made / "adapter_config.json") if p.exists()
    ]
    if other := one if config.expert else pair:
        kinds = ("one model", "an expert of two") if config.expert else ("two experts", "one model")
        raise ValueError(f"{other[0]} belongs to {kinds[0]}, and this run trains {kinds[1]}: choose another --output")
    if not config.expert or not (made / "experts.json").exists():
        return str(config.output)
    said, wanted = read_json(made / "experts.json").get("boundary"), expert_boundary(config)
    if said != wanted:
        raise ValueError(
            f"{made} holds experts that part at noise level {said}; this run would part at {wanted}. Give "
            f"--objective.boundary {said}, or another --output"
        )
    return str(config.output)


def check_writable(asked: Asked) -> str:
    """The output can be made and written, as far as that shows without doing it; and which run is in it."""
    where, own = nearest(asked.config.run_dir), asked.config.run_dir
    for link in (one for one in (own, *own.absolute().parents) if one.is_symlink() and not one.exists()):
        raise ValueError(f"--output {asked.config.output}: {link} is a link to nothing: choose another --output")
    if not where.is_dir():
        raise ValueError(f"--output {asked.config.output}: {where} is a file, not a folder: choose another --output")
    if not os.access(where, os.W_OK | os.X_OK):
        raise ValueError(f"--output {asked.config.output}: {where} cannot be written by this user: choose another")
    found, changed = asked.continued
    if found is None:
        return "a new run"
    return "\n".join([f"the run goes on from {found}", *(f"changed: {change}" for change in changed)])


def nearest(path: Path) -> Path:
    """The path, or the first above it that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def checkpoint_bytes(trained: int, config: Config) -> int:
    """What a checkpoint of so many trained parameters takes, at most: float32 weights, moments, and the average."""
    models = 2 if config.expert == "both" else 1
    return models * round(trained * (4 + KINDS[config.optim.name].checkpoint + (4 if config.optim.ema else 0)))


def check_space(trained: int, config: Config) -> None:
    """Raise ValueError if not even one checkpoint of so many trained parameters fits on the disk of the output."""
    needed, free = checkpoint_bytes(trained, config), shutil.disk_usage(nearest(config.run_dir)).free
    if needed > free:
        raise ValueError(
            f"a checkpoint needs {needed / 2**20:,.0f} MiB and {config.output} has {free / 2**20:,.0f} MiB free: "
            "free some, or choose another --output"
        )
