"""Flags that do not go together, or with the model: nothing is opened."""

from __future__ import annotations

from dataclasses import MISSING, fields
from importlib.util import find_spec

from mm_convert.cli.checks import NotHere
from mm_convert.cli.values import check_config
from mm_models.families import find
from mm_parallel.config import MemoryConfig
from mm_train.adapter import check_adapter
from mm_train.checks.asked import Asked
from mm_train.config import (
    AnswerSamples,
    ConversationData,
    ConversationValidation,
    VideoData,
    VideoSamples,
    VideoValidation,
)
from mm_train.objective import architecture, choose_options, choose_task

# The options of a run that are for one kind of model alone.
VIDEOS = {"data": VideoData, "validation": VideoValidation, "sample": VideoSamples}
CONVERSATIONS = {"data": ConversationData, "validation": ConversationValidation, "sample": AnswerSamples}


def check_limits(asked: Asked) -> str:
    """Of a configuration that no command line has read."""
    check_config(asked.config, "--")
    return f"{asked.config.steps:,} steps, {asked.config.dtype}"


def check_model(asked: Asked) -> str:
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


def check_both_experts(asked: Asked) -> str:
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


def check_kind(asked: Asked) -> str:
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


def check_objective(asked: Asked) -> str:
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


def check_rates(asked: Asked) -> str:
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


def check_log(asked: Asked) -> str:
    project, name = asked.config.log.wandb, asked.config.log.wandb_name
    if name and not project:
        raise ValueError(f"--log.wandb_name {name}: give --log.wandb with a project")
    if project and find_spec("wandb") is None:
        raise ValueError(f"--log.wandb {project} needs the package wandb: pip install wandb")
    return f"metrics.jsonl, TensorBoard{f', Weights & Biases: {project}' if project else ''}"


def check_trained(asked: Asked) -> str:
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


def check_adapter_file(asked: Asked) -> str:
    """To go on from; of two experts, both."""
    return [check_adapter(one) for one in asked.config.trainees][-1]


def check_frozen(asked: Asked) -> str:
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


def check_layout(asked: Asked) -> str:
    """The layout fits the ranks that were started, and the batch fits the layout."""
    layout = asked.config.parallel.resolve(asked.world)
    each = asked.config.micro_batches(layout.dp_replicate * layout.dp_shard)
    names = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
    degrees = ", ".join(f"{name} {getattr(layout, name)}" for name in names if getattr(layout, name) > 1)
    ranks = f"{asked.world} rank{'s' * (asked.world > 1)}{f' ({degrees})' if degrees else ''}"
    data = asked.config.data
    return f"{ranks}; of {data.global_batch} samples a step {each * data.micro_batch} on each data rank"


def check_compile(asked: Asked) -> str:
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
