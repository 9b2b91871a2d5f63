"""What cannot work, found before anything is loaded: so a mistake costs a second and not a quarter of an hour."""

from __future__ import annotations

from pathlib import Path

from mm_data import Geometry
from mm_train.config import Config


def check(config: Config) -> None:
    """Raise ValueError for settings that are impossible, or do not go together."""
    from mm_models import boundary, presets  # torch, only now

    if config.model not in presets():
        raise ValueError(f"unknown model '{config.model}': choose one of {', '.join(presets())}")
    if boundary(config.model) and not config.expert:
        raise ValueError(
            f"{config.model} is two models, for high and for low noise: give --expert high or --expert low, and "
            "train the other into the same --output afterwards"
        )
    if config.expert and not boundary(config.model):
        raise ValueError(f"--expert {config.expert}: {config.model} is one model, not two experts: leave it out")
    if not config.weights:
        raise ValueError(
            "no starting weights: give --weights with a diffusers directory, original Wan-AI files or one of "
            "our checkpoints, "
            "or ask for a fresh model with --weights random"
        )
    if config.weights != "random" and not Path(config.weights).exists():
        raise ValueError(
            f"--weights {config.weights} does not exist (a fresh model has to be asked for: --weights random)"
        )
    _check_data(config)
    _check_numbers(config)
    _check_trained(config)
    _check_samples(config)


def _check_data(config: Config) -> None:
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
    elif not data.manifest.is_file():
        raise ValueError(f"--data.manifest {data.manifest} is not a file: give a data.txt, data.json or .jsonl")
    elif data.encoders is None or not data.encoders.is_dir():
        raise ValueError(
            "--data.manifest needs --data.encoders, the diffusers directory with vae/, text_encoder/ and "
            f"tokenizer/ (got {data.encoders})"
        )
    for flag, path in (("data.features", config.data.features), ("validation.features", config.validation.features)):
        if path is not None and not path.is_dir():
            raise ValueError(
                f"--{flag} {path} is not a directory; `python -m mm_train.extract --output {path} …` writes one"
            )


def _check_numbers(config: Config) -> None:
    for name, value, least in (
        ("steps", config.steps, 1),
        ("data.global_batch", config.data.global_batch, 1),
        ("data.micro_batch", config.data.micro_batch, 1),
        ("data.workers", config.data.workers, 0),
        ("data.encode_every", config.data.encode_every, 0),
        ("optim.lr", config.optim.lr, 0),
        ("optim.min_lr", config.optim.min_lr, 0),
        ("optim.warmup", config.optim.warmup, 0),
        ("optim.weight_decay", config.optim.weight_decay, 0),
        ("optim.clip", config.optim.clip, 0),
        ("lora.rank", config.lora.rank, 0),
        ("checkpoint.every", config.checkpoint.every, 1),
        ("checkpoint.keep", config.checkpoint.keep, 0),
        ("validation.every", config.validation.every, 1),
        ("validation.max_samples", config.validation.max_samples, 1),
        ("sample.every", config.sample.every, 1),
        ("sample.steps", config.sample.steps, 1),
        ("sample.frames", config.sample.frames, 1),
        ("sample.height", config.sample.height, 16),
        ("sample.width", config.sample.width, 16),
        ("deadline", config.deadline, 10),
    ):
        if not value >= least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    for name, value in (("lora.alpha", config.lora.alpha), ("optim.eps", config.optim.eps)):
        if not value > 0:
            raise ValueError(f"--{name} is {value}; it must be positive")
    low, high = config.objective.range or (0, 1)
    if not 0 <= low < high <= 1:
        raise ValueError(f"--objective.range is [{low}, {high}]; it must satisfy 0 <= low < high <= 1")
    if config.objective.boundary is not None and not (config.expert and 0 < config.objective.boundary < 1):
        raise ValueError(
            f"--objective.boundary {config.objective.boundary}: it is for --expert high or low, and a noise level "
            "between 0 and 1"
        )
    for name, value in (
        ("data.text_dropout", config.data.text_dropout),
        ("lora.dropout", config.lora.dropout),
        ("optim.ema", config.optim.ema),
        *(("optim.betas", beta) for beta in config.optim.betas),
    ):
        if not 0 <= value < 1:
            raise ValueError(f"--{name} is {value}; it must lie in 0 <= x < 1")
    if config.optim.warmup >= config.steps > 1:
        raise ValueError(f"--optim.warmup {config.optim.warmup} takes the whole run of {config.steps} steps")
    for t in config.validation.timesteps:
        if not 0 < t < 1000:
            raise ValueError(f"--validation.timesteps contains {t}; timesteps lie between 0 and 1000")


def _check_trained(config: Config) -> None:
    """What is trained: patterns, adapters."""
    if not config.trained:
        raise ValueError('--trained is empty: give patterns of names, e.g. ["vace_*"], or leave it out for all')
    if config.lora.rank and config.trained != ("*",):
        raise ValueError(
            "--trained (perhaps of the model's recipe) chooses weights, --lora.rank trains adapters beside all: "
            "give --recipe with the name of the model and -lora, or --trained '[\"*\"]'"
        )
    if config.lora.rank and config.weights == "random":
        raise ValueError(
            "--lora.rank with --weights random: a fresh model's last projection is zero and would be frozen, so "
            "that no adapter could learn. Give --weights, or train without adapters"
        )
    if config.lora.dropout and config.parallel.tp > 1:
        raise ValueError("--lora.dropout would be drawn apart by --parallel.tp ranks: use 0, or no tp")
    if config.lora.dropout and (config.parallel.pp_layers or config.parallel.exact):
        raise ValueError(
            "--lora.dropout cannot be drawn alike in a pipeline, where micro-batches overlap, nor in exact mode: "
            "use 0, or no --parallel.pp_layers and no --parallel.exact"
        )


def _check_samples(config: Config) -> None:
    s = config.sample
    if not s.prompts and not s.from_validation:
        return
    if config.expert:
        raise ValueError(
            f"--sample.* with --expert {config.expert}: a video takes both experts. Generate with mm_infer, from the "
            "--output of both"
        )
    if s.from_validation < 0 or (s.from_validation and config.validation.features is None):
        raise ValueError(
            f"--sample.from_validation {s.from_validation}: give --validation.features, and how many of them"
        )
    if s.frames % 4 != 1:
        below = (s.frames - 1) // 4 * 4 + 1
        raise ValueError(f"--sample.frames {s.frames} is not 4k+1; the nearest are {below} and {below + 4}")
    for name, value in (("height", s.height), ("width", s.width)):
        if value % 16:
            raise ValueError(
                f"--sample.{name} {value} is not a multiple of 16 (VAE 8 x patch 2); the nearest are "
                f"{value // 16 * 16} and {value // 16 * 16 + 16}"
            )
    if s.encoders is None or not all((s.encoders / part).is_dir() for part in ("vae", "text_encoder", "tokenizer")):
        raise ValueError(
            "sample videos need --sample.encoders, the diffusers directory with vae/, text_encoder/ and "
            f"tokenizer/ (got {s.encoders})"
        )
