"""What a command of inference needs, as named checks: ``python -m mm_infer … --check`` tells what each of them finds.

The program raises by the same functions what the first one finds. Nothing is made, and no tensor is read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from mm_convert import Adapter, Checkpoint
from mm_convert.cli.arguments import flags_of
from mm_convert.cli.checks import Check, NotHere, Together, report
from mm_infer.config import Config
from mm_infer.identity import identify
from mm_infer.inputs import Given
from mm_infer.lists import Request, read_requests
from mm_infer.loras import Lora, read_loras
from mm_infer.settle import check, settle
from mm_infer.weights import Transformer, Weights, find_encoders, must_exist, open_transformers
from mm_models.distilled import describe_distilled
from mm_models.families import find as find_preset
from mm_models.libraries import check_libraries, installed
from mm_parallel.launch import read_launch

T = TypeVar("T")
PATIENCE = 1800
"""Seconds that all checks may take on a rank."""


class Asked:
    """Videos that are asked for, and what several checks look at, opened once."""

    def __init__(self, config: Config, world: int | None = None) -> None:
        self.config = config
        self.world = read_launch().world if world is None else world

    @cached_property
    def requests(self) -> list[Request]:
        return read_requests(self.config)

    @cached_property
    def transformers(self) -> tuple[Transformer, ...]:
        """Without their adapter."""
        config = self.config
        if config.model is not None:
            find_preset(config.model)
        return open_transformers(must_exist(config.weights, "weights"), config.model, (), config.boundary)[0]

    @cached_property
    def weights(self) -> Weights:
        """With adapter and encoders."""
        return open_weights(self.config)


def open_weights(config: Config) -> Weights:
    """The weights that are asked for. ValueError as `Weights`."""
    return Weights(
        config.weights,
        config.encoders,
        model=config.model,
        lora=config.lora,
        lora_strength=config.lora_strength,
        lora_alpha=config.lora_alpha,
        boundary=config.boundary,
        text_tokens=config.text_tokens,
    )


def _requests(asked: Asked) -> str:
    count = len(asked.requests)
    return f"{count} video{'s' * (count != 1)}"


def check_output(folder: Path) -> str:
    """Raise ValueError where the folder of the output cannot be made, or written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"output {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output {folder}: {there} cannot be written by this user: choose another")
    return str(folder)


def _weights(asked: Asked) -> str:
    return "\n".join(describe_file(one.checkpoint) for one in asked.transformers)


def describe_file(file: Checkpoint) -> str:
    """`825 tensors of wan, BF16, names of diffusers`"""
    kinds = " and ".join(sorted({tensor.dtype for tensor in file.tensors.values()}))
    size = sum(tensor.nbytes for tensor in file.tensors.values()) / 2**30
    return f"{file.family}: {len(file.tensors):,} tensors, {size:,.1f} GiB, {kinds}, {file.dialect} names"


def _adapter(asked: Asked) -> str:
    config = asked.config
    loras = read_loras(config.lora, config.lora_strength, config.lora_alpha)
    if not loras:
        return NotHere("no --lora")
    made, _ = open_transformers(config.weights, config.model, loras, config.boundary)
    said = dict.fromkeys(describe_adapter(lora, adapter) for one in made for lora, adapter in one.adapters)
    return "; ".join(said)


def describe_adapter(lora: Lora, adapter: Adapter) -> str:
    """`a.safetensors: 400 linears, 3 whole differences, strength 0.8`"""
    changed = {"linear": len(adapter.modules), "whole difference": len(adapter.differences)}
    said = [f"{count} {what}{'s' * (count > 1)}" for what, count in changed.items() if count]
    said += [f"strength {lora.strength:g}"] if lora.strength != 1 else []
    return f"{lora.expert}{'=' if lora.expert else ''}{lora.path}: {', '.join(said)}"


def _encoders(asked: Asked) -> str:
    from mm_models.encoders.text import open_tokenizer  # torch, only now

    one, config = asked.transformers[0], asked.config
    encoders = None if config.encoders is None else must_exist(config.encoders, "encoders")
    repository = find_encoders(config.weights, encoders, one.family, one.config)
    one.family.video.fit(one.config, repository)
    open_tokenizer(repository)
    return f"{repository}: {', '.join(one.family.video.encoders(one.config))}"


def _tensors(asked: Asked) -> str:
    for one in asked.transformers:
        one.check_fit()
    count = sum(len(one.checkpoint) for one in asked.transformers)
    return f"all {count:,} have the shapes of the model"


def _tasks(asked: Asked) -> str:
    tasks = [check(asked.config.options, Given(**one.given), asked.weights.facts).name for one in asked.requests]
    return ", ".join(dict.fromkeys(tasks))


def _settings(asked: Asked) -> str:
    """With nothing left open, and what videos are made from looked into."""
    facts, made = asked.weights.facts, []
    for request in asked.requests:
        options = settle(asked.config.options, Given(**request.given), facts)
        check_passes(asked.config, options)
        made.append(f"{options.frames} frames of {options.height}x{options.width}, {options.steps} steps")
    known = [describe_distilled(facts.distilled, vars(asked.config.options))] if facts.distilled else []
    return "\n".join(["; ".join(dict.fromkeys(made)), *known])


def check_passes(config: Config, options: Any) -> None:
    """Raise ValueError where two passes are shared out, and settings make one."""
    if config.parallel.guidance == 2 and max(options.scales) == 1:
        raise ValueError("parallel.guidance 2 shares two passes, but guidance 1 makes one: leave either out")


def _layout(asked: Asked) -> str:
    from mm_infer.ranks import count_ranks

    ranks = asked.config.parallel
    each = count_ranks(ranks, asked.world) * ranks.guidance
    return f"{asked.world} rank{'s' * (asked.world > 1)}, {each} make{'s' * (each == 1)} a video"


def _experts(asked: Asked) -> str:
    if len(asked.transformers) == 1:
        if asked.config.offload is not None:
            raise ValueError(
                f"offload is for two experts, of which one rests, but {asked.config.weights} holds one model: leave it "
                "out"
            )
        return NotHere("one model")
    return f"the first makes the steps from noise level {asked.weights.boundary} on"


def choose_device(asked: str | None) -> Any:
    """The device that is asked for, or the accelerator. ValueError for one that is not here."""
    import torch

    from mm_parallel.device import device as accelerator

    usual = accelerator()  # which also makes other makers' devices known to torch
    try:
        return torch.empty(0, device=asked or usual).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {asked}: {str(error).splitlines()[0]}") from error


def describe_device(dtype: str | None, asked: str | None = None) -> str:
    """The device that computes. ValueError where it is not here, or does not compute in what is asked for."""
    import torch

    from mm_parallel.device import bf16_ok, name_of

    found = choose_device(asked)
    if dtype == "bfloat16" and not bf16_ok(found):
        raise ValueError(f"--dtype bfloat16: {name_of(found)} has no arithmetic of it: give --dtype float32")
    if found.type == "cpu":
        return f"the CPU computes, with {torch.get_num_threads()} threads{'' if asked else ': no accelerator is found'}"
    return f"{torch.accelerator.device_count()} x {name_of(found)}"


def _attention(asked: Asked) -> str:
    import torch

    from mm_infer.sample import Sampler
    from mm_parallel.attention import activate
    from mm_parallel.device import device

    here, name, dtype = device(), asked.config.attention, asked.config.dtype
    if here.type == "cpu" and name not in ("auto", "cpu", "math"):
        return NotHere(f"no accelerator here that could run {name}")
    activate(name, here.type)
    return Sampler(asked.weights, here, None if dtype is None else getattr(torch, dtype), attention=name).kernel


CHECKS: tuple[Check[Asked], ...] = (
    Check("libraries", "at once", lambda asked: check_libraries()),
    Check("requests", "at once", _requests),
    Check("output", "at once", lambda asked: check_output(asked.config.output)),
    Check("weights", "when asked", _weights),
    Check("adapter", "with torch", _adapter, after=("weights",)),
    Check("tensors", "with torch", _tensors, after=("weights",)),
    Check("encoders", "when asked", _encoders, after=("weights",)),
    Check("experts", "with torch", _experts, after=("weights", "adapter", "encoders")),
    Check("task", "at once", _tasks, after=("requests", "weights", "adapter", "encoders")),
    Check("settings", "with torch", _settings, after=("task",)),
    Check("layout", "with torch", _layout),
    Check("device", "when asked", lambda asked: describe_device(asked.config.dtype)),
    Check("attention", "when asked", _attention, after=("weights", "adapter", "encoders")),
)


def read_contents(config: Config) -> Mapping[str, Mapping[str, str]]:
    """The identities of all files that are read, by flag."""
    return identify(config, open_weights(config).facts)


def tell(checks: Sequence[Check[T]], asked: T, config: Any, read: Callable[[], Mapping[str, Mapping[str, str]]]) -> int:
    """Print what all of them find, of all ranks together. Returns the exit code: 2 where one fails.

    config, read: what is compared between ranks: the configuration, and the identities of files by flag and name.
    """
    if not read_launch().joins:
        return report(checks, asked, sys.stdout)
    from mm_infer.ranks import distributed
    from mm_parallel.guard.agree import check_alike, gather
    from mm_parallel.guard.diagnosis import ranks_of

    with distributed(PATIENCE) as (rank, guard):
        guard.at("looking", PATIENCE)
        compare = partial(check_alike, flags_of(config), installed(), read)
        return report(checks, asked, sys.stdout, Together(rank, gather, ranks_of, compare))
