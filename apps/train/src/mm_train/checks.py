"""What cannot work, found before anything is loaded: so a mistake costs a second and not a quarter of an hour.

A list of named checks. `train` raises what the first one finds; `python -m mm_train.doctor` runs and tells them all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert import read_json
from mm_convert.cli.checks import Check, NotHere, When
from mm_convert.cli.values import check_config
from mm_data import Geometry
from mm_data.manifest import list_files
from mm_data.sets import is_sets_file, read_sets
from mm_models.families import find
from mm_models.family import Family, Video, later
from mm_models.folder import check_parts
from mm_models.libraries import check_libraries
from mm_parallel.config import MemoryConfig
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
from mm_train.optimizers import KINDS, check_optimizer
from mm_train.resume import find_checkpoint
from mm_train.settle import describe_known_samples, settle_samples

if TYPE_CHECKING:
    from torch import nn

# The options of a run that are for one kind of model alone.
VIDEOS = {"data": VideoData, "validation": VideoValidation, "sample": VideoSamples}
CONVERSATIONS = {"data": ConversationData, "validation": ConversationValidation, "sample": AnswerSamples}


class Asked:
    """A run that is asked for, and what several checks look at, opened once."""

    def __init__(self, config: Config, world: int | None = None, device: str = "", devices: Path | None = None) -> None:
        """world: ranks; by default those that were started. device: its name in the table of `mm_train.estimate`, or in
        the file `devices`; by default that which is found.
        """
        self.config, self.device, self.devices = config, device, devices
        self.world = read_launch().world if world is None else world

    @property
    def family(self) -> Family:
        return architecture(self.config)[0]

    @property
    def shape(self) -> Any:
        """The model's configuration."""
        return architecture(self.config)[1]

    @cached_property
    def model(self) -> nn.Module:
        """Whole, on the meta device."""
        from mm_train.start import outline  # torch, only now

        return outline(self.config)

    @cached_property
    def continued(self) -> tuple[Path | None, list[str]]:
        """The checkpoint that the run goes on from, and what was changed since. ValueError for one of another run."""
        return find_checkpoint(self.config)


def check(config: Config, when: When = "at once") -> list[str]:
    """Raise ValueError for what is impossible, or does not go together. Returns what a person should know of the rest,
    one line each.
    """
    asked = Asked(config)
    said = [one.run(asked) or "" for one in CHECKS if one.when == when]
    return [note for text in said for note in text.split("\n")[1:]]


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


def _look(name: str) -> Any:
    """A check that needs torch, which is imported when it runs."""
    return later("mm_train.looks", name)


def _limits(asked: Asked) -> str:
    """Of a configuration that no command line has read."""
    check_config(asked.config, "--")
    return f"{asked.config.steps:,} steps, {asked.config.dtype}"


def _model(asked: Asked) -> str:
    config = asked.config
    _, preset = find(config.model)
    family, shape = architecture(config)
    if preset.boundary and not config.expert:
        raise ValueError(
            f"{config.model} is two models, for high and for low noise: give --expert high or --expert low, and "
            "train the other into the same --output afterwards; or --expert both, in one run"
        )
    if config.expert and not preset.boundary:
        raise ValueError(f"--expert {config.expert}: {config.model} is one model, not two experts: leave it out")
    task = choose_task(config.model, family, shape, config.objective.task, "--objective.task")
    choose_options(config, family)
    return f"{config.model}{f', expert {config.expert}' if config.expert else ''}, trained for {task}"


def _both(asked: Asked) -> str:
    """Two experts in one run: what cannot wait on the host, or is for one of them."""
    config = asked.config
    if config.expert != "both":
        if config.expert_steps != type(config).expert_steps:
            raise ValueError(f"--expert_steps {config.expert_steps} is for --expert both")
        return NotHere("not --expert both")
    refused = {
        "--parallel.pp_layers": (config.parallel.pp_layers, "stages of both would run through one pipeline"),
        "--parallel.exact": (config.parallel.exact, "it verifies one model"),
        "--memory.offload_params": (config.memory.offload_params, "the one that trains would be on the host, too"),
        "--memory.host_layers": (config.memory.host_layers, "the one that trains would be on the host, too"),
        "--memory.base": (config.memory.base != "dtype", "what is held in fewer bits does not move"),
        "--objective.range": (config.objective.range, "each has its own part"),
        "--objective.shift_by": (config.objective.shift_by not in (None, "fixed"), "their shares would differ by size"),
        "--optim.name schedulefree": (config.optim.name == "schedulefree", "its average is counted in all steps"),
        "--sample.lora": (config.sample.lora, "it is that of one model"),
    }
    for flag, (given, why) in refused.items():
        if given:
            raise ValueError(f"{flag} with --expert both: {why}. Leave it out, or train --expert high and then low")
    return f"turns of {config.expert_steps} steps"


def _weights(asked: Asked) -> str:
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


def _kind(asked: Asked) -> str:
    """Options are for what the model is trained on: videos, or conversations."""
    config, chats = asked.config, asked.family.chat is not None
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
    return f"all are for a model that {reads}"


def _data(asked: Asked) -> str:
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


def _objective(asked: Asked) -> str:
    config = asked.config
    low, high = config.objective.range or (0, 1)
    if not low < high:
        raise ValueError(f"--objective.range is [{low}, {high}]; it must satisfy 0 <= low < high <= 1")
    if config.objective.boundary is not None and not config.expert:
        raise ValueError(f"--objective.boundary {config.objective.boundary}: it is for --expert high, low or both")
    options = choose_options(config, asked.family)
    o = config.objective
    for name in ("logit_mean", "logit_std"):
        if getattr(o, name) is not None and o.sampling != "logit_normal":
            raise ValueError(f"--objective.{name} {getattr(o, name):g} is for --objective.sampling logit_normal")
    if o.shift_by == "flux" and o.shift is not None:
        raise ValueError(
            f"--objective.shift {o.shift:g} with --objective.shift_by flux, which has its own: leave it out"
        )
    if (o.shift_tokens is None) == (o.shift_by == "sqrt"):
        raise ValueError(
            f"--objective.shift_tokens {o.shift_tokens} with --objective.shift_by {o.shift_by}: sqrt needs it, and "
            "only it takes it, e.g. 32760 for 81 frames of 480x832 in patches of 4x16x16"
        )
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _rates(asked: Asked) -> str:
    config = asked.config
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
    return f"{config.optim.lr:g}, {config.optim.schedule}, {config.optim.warmup:,} steps of warmup"


def _log(asked: Asked) -> str:
    project, name = asked.config.log.wandb, asked.config.log.wandb_name
    if name and not project:
        raise ValueError(f"--log.wandb_name {name}: give --log.wandb with a project")
    if project and find_spec("wandb") is None:
        raise ValueError(f"--log.wandb {project} needs the package wandb: pip install wandb")
    return f"metrics.jsonl, TensorBoard{f', Weights & Biases: {project}' if project else ''}"


def _trained(asked: Asked) -> str:
    """What is trained: patterns, adapters."""
    config = asked.config
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
    lora = config.lora
    return f"adapters of rank {lora.rank}, alpha {lora.alpha:g}" if lora.rank else ", ".join(config.trained)


def _adapter(asked: Asked) -> str:
    """To go on from; of two experts, both."""
    return [check_adapter(one) for one in asked.config.trainees][-1]


def _frozen(asked: Asked) -> str:
    """How matrices are held that are not trained."""
    config = asked.config
    if not config.memory.holds_frozen:
        return NotHere("no --memory.base and no --memory.host_layers")
    said = describe_frozen(config.memory)
    if not config.has_frozen:
        raise ValueError(
            f"--memory: {said}, but all of the model is trained: give --lora.rank 16, or --trained with what is, or "
            "leave --memory.base and --memory.host_layers out"
        )
    if config.parallel.tp > 1:
        raise ValueError(
            f"--memory: {said}, with --parallel.tp {config.parallel.tp}: codes and their scales are not cut over ranks "
            "that share a matrix. Leave tp out; dp_shard, cp and pp_layers go together with it"
        )
    return said


def describe_frozen(memory: MemoryConfig) -> str:
    """`frozen matrices of layers in nf4, those of 30 layers on the host`"""
    held = "" if memory.base == "dtype" else f" in {memory.base}"
    plural = "s" * (memory.host_layers > 1)
    waiting = f"those of {memory.host_layers} layer{plural} on the host" if memory.host_layers else ""
    return ", ".join(filter(None, [f"frozen matrices of layers{held}", waiting]))


def _layout(asked: Asked) -> str:
    """The layout fits the ranks that were started, and the batch fits the layout."""
    layout = asked.config.parallel.resolve(asked.world)
    each = asked.config.micro_batches(layout.dp_replicate * layout.dp_shard)
    names = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
    degrees = ", ".join(f"{name} {getattr(layout, name)}" for name in names if getattr(layout, name) > 1)
    ranks = f"{asked.world} rank{'s' * (asked.world > 1)}{f' ({degrees})' if degrees else ''}"
    data = asked.config.data
    return f"{ranks}; of {data.global_batch} samples a step {each * data.micro_batch} on each data rank"


def _samples(asked: Asked) -> str:
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


def _output(asked: Asked) -> str:
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


def _writable(asked: Asked) -> str:
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


def _compile(asked: Asked) -> str:
    config = asked.config
    if not config.compile:
        return NotHere("no --compile")
    if config.parallel.exact:
        raise ValueError(
            "--compile with --parallel.exact: compiled kernels sum in an order of their own: leave one of them out"
        )
    if config.parallel.schedule == "zero_bubble":
        raise ValueError(
            "--compile with --parallel.schedule zero_bubble: it splits a backward in two, and that of compiled code is "
            "one. Use schedule 1f1b, or leave --compile out"
        )
    return "each layer"


def _compiler(asked: Asked) -> str:
    if not asked.config.compile:
        return NotHere("no --compile")
    from mm_parallel.compile import check_compiler
    from mm_parallel.device import device

    return check_compiler(device().type)


def _attention(asked: Asked) -> str:
    from mm_parallel.device import device
    from mm_train.start import choose_attention

    here, name = device(), asked.config.attention
    if here.type == "cpu" and name not in ("auto", "cpu", "math"):
        return NotHere(f"no accelerator here that could run {name}")
    return choose_attention(asked.config, None, here)


CHECKS: tuple[Check[Asked], ...] = (
    Check("libraries", "at once", lambda asked: check_libraries()),
    Check("configuration", "at once", _limits),
    Check("model", "at once", _model),
    Check("both experts", "at once", _both, after=("model",)),
    Check("weights", "at once", _weights, after=("model",)),
    Check("options", "at once", _kind, after=("model",)),
    Check("data", "at once", _data, after=("model", "options")),
    Check("objective", "at once", _objective, after=("model",)),
    Check("learning rate", "at once", _rates),
    Check("optimizer", "at once", lambda asked: check_optimizer(asked.config.optim, asked.world)),
    Check("log", "at once", _log),
    Check("what is trained", "at once", _trained),
    Check("frozen matrices", "at once", _frozen, after=("what is trained",)),
    Check("adapter", "at once", _adapter, after=("what is trained",)),
    Check("layout", "at once", _layout),
    Check("compile", "at once", _compile),
    Check("samples", "at once", _samples, after=("model", "options")),
    Check("output", "at once", _output, after=("model",)),
    Check("resume", "when asked", _writable, after=("output",)),
    Check("compiler", "with torch", _compiler, after=("compile",)),
    Check("model in layout", "with torch", _look("check_cut"), after=("model", "what is trained", "layout")),
    Check("tensors", "when asked", _look("check_tensors"), after=("model", "weights", "what is trained", "resume")),
    Check("adapter in model", "when asked", _look("check_adapter"), after=("model", "adapter", "what is trained")),
    Check("sample adapter", "when asked", _look("check_sample_adapter"), after=("model", "what is trained", "samples")),
    Check("encoders", "when asked", _look("check_encoders"), after=("model", "data", "samples")),
    Check("features", "with torch", _look("check_features"), after=("model", "data", "objective")),
    Check("validation", "with torch", _look("check_validation"), after=("features",)),
    Check("sample", "when asked", _look("check_sample"), after=("model", "data", "features", "encoders")),
    Check("batches", "when asked", _look("check_batches"), after=("sample", "layout")),
    Check("disk", "when asked", _look("check_disk"), after=("model", "what is trained", "resume")),
    Check("device", "when asked", _look("check_device")),
    Check(
        "memory",
        "when asked",
        _look("check_memory"),
        after=("model", "options", "what is trained", "features", "model in layout"),
    ),
    Check("attention", "when asked", _attention, after=("model",)),
)


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
