"""Layouts that are worth looking at: which there are, and how a command line says one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, replace
from io import StringIO
from typing import Any

from mm_parallel.config import ParallelConfig
from mm_parallel.pipeline.cut import even
from mm_train.config import Config, LayoutConfig
from mm_train.estimate.config import EstimateConfig
from mm_train.objective import architecture
from mm_train.recipe import load_config

MEMORIES = (
    {"recompute": "none", "offload": "none"},
    {"recompute": "but_attention", "offload": "none"},
    {"recompute": "but_attention", "offload": "attention"},
    {"recompute": "full", "offload": "none"},
    {"recompute": "full", "offload": "inputs"},
)
"""From the fastest to the smallest."""
VIRTUAL = (1, 2)
"""Virtual stages on each rank of a pipeline."""
ENOUGH = 4096
"""Tokens of a micro-batch on a rank: with more, no kernel gets much faster."""
FEW = 2048
"""Tokens of a micro-batch on a context rank: with fewer, kernels get slower, and more is sent for each."""


def find_layouts(config: Config, world: int, layers: int, tokens: float, per_host: int) -> Iterator[Config]:
    """The run in every layout of `world` ranks that may be the best, once with each micro-batch that fits the step.

    layers: of the model; tokens: of the smallest forward; per_host: devices of a host. Left out are
    - tensor parallelism and Ulysses over hosts, rings within one or beside tensor parallelism: more is sent, over
      slower links, for nothing
    - context ranks with fewer than `FEW` tokens
    - copies (dp_replicate) that are not whole hosts: FSDP within a host costs less than it saves
    - micro-batches of several samples with more than `ENOUGH` tokens on a rank
    Memory is as in `config`. Whether the model can be cut so is not asked here.
    """
    for tp in divisors(world):
        if tp > per_host:
            continue
        for pp in divisors(world // tp):
            if pp > layers:
                continue
            for cp in divisors(world // tp // pp):
                inside = max(1, per_host // tp)
                if (cp > 1 and tokens / cp < FEW) or (cp > inside and (tp > 1 or cp % inside)):
                    continue
                ulysses, rest = min(cp, inside), world // tp // pp // cp
                for replicate in divisors(rest):
                    whole = replicate in (1, rest) or (rest // replicate * cp * tp) % per_host == 0
                    if config.data.global_batch % rest or not whole:
                        continue
                    shape = LayoutConfig(
                        dp_replicate=replicate,
                        dp_shard=rest // replicate,
                        cp=cp,
                        ulysses=ulysses,
                        ring=cp // ulysses,
                        tp=tp,
                    )
                    micro = micro_batches(config, config.data.global_batch // rest, tokens / cp)
                    yield from _stages(config, shape, pp, layers, micro)


def _stages(config: Config, shape: LayoutConfig, pp: int, layers: int, micro: Sequence[int]) -> Iterator[Config]:
    """The layout with its stages and micro-batches."""
    for virtual in VIRTUAL if pp > 1 else (1,):
        if pp * virtual > layers:
            continue
        stages = even(layers, pp, virtual) if pp > 1 else ()
        stages = stages[0] if len(stages) == 1 else stages
        parallel = replace(shape, pp_layers=stages, schedule=config.parallel.schedule)
        for size in micro:
            yield replace(config, parallel=parallel, data=replace(config.data, micro_batch=size))


def micro_batches(config: Config, samples: int, tokens: float) -> list[int]:
    """Sizes of a micro-batch that share the `samples` of a data rank, of so many tokens on each rank."""
    if architecture(config)[0].chat is not None:
        return [config.data.micro_batch]  # a pack is one
    sizes = [2**n for n in range(10) if n == 0 or 2**n * tokens <= ENOUGH]
    return [size for size in sizes if samples % size == 0]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def command(config: Config, argv: Sequence[str], world: int, per_host: int) -> str:
    """What starts this run: the command that was given, with the layout that was found in place of its own."""
    hosts = next(n for n in range(-(-world // per_host), world + 1) if world % n == 0)  # each with as many ranks
    meet = ["--nnodes", str(hosts), "--rdzv_backend", "c10d", "--rdzv_endpoint", "HOST:29500"] if hosts > 1 else []
    start = ["torchrun", *meet, "--nproc_per_node", str(world // hosts)] if world > 1 else ["python"]
    kept = _without_layout(argv)
    with redirect_stderr(StringIO()):  # notes that the reader has seen
        usual = load_config(kept)
    return shlex.join([*start, "-m", "mm_train", *kept, *_flags(config, usual)])


_LAYOUT = {
    "parallel": ("dp_replicate", "dp_shard", "cp", "ulysses", "ring", "tp", "pp_layers"),
    "memory": ("recompute", "but_attention", "offload"),
    "data": ("micro_batch",),
}


def _without_layout(argv: Sequence[str]) -> list[str]:
    """The words of a command line that say something else than the layout, or than what only an estimate is told."""
    ours = {f.name for f in fields(EstimateConfig)} - {f.name for f in fields(Config)}
    kept: list[str] = []
    dropped = False
    for word in argv:
        if word.startswith("--"):
            section, _, name = word.removeprefix("--").partition("=")[0].partition(".")
            dropped = section in ours | {"parallel"} or name in _LAYOUT.get(section, ())
        if not dropped:
            kept.append(word)
    return kept


def _flags(config: Config, usual: Config) -> list[str]:
    """The layout in flags, as far as it is another than that of the rest of the command."""
    flags = []
    for section, names in _LAYOUT.items():
        ours, theirs = getattr(config, section), getattr(usual, section)
        for name in names:
            value, other = getattr(ours, name), getattr(theirs, name)
            alone = name in ("cp", "ulysses", "ring") and other is None and value == 1
            if value != other and not alone:
                text = json.dumps(value).replace(" ", "") if isinstance(value, tuple) else str(value)
                flags += [f"--{section}.{name}", text]
    return flags


def with_memory(config: Config, memory: dict[str, Any]) -> Config:
    return replace(config, memory=replace(config.memory, but_attention=0, **memory))


def describe(config: Config, layout: ParallelConfig | None = None) -> str:
    """`dp_shard 8, ulysses 4, tp 2, recompute full`: what is not 1, or none. layout: resolved."""
    p, m = layout or config.parallel, config.memory
    named = {
        "dp_replicate": p.dp_replicate,
        "dp_shard": p.dp_shard,
        "ulysses": p.ulysses,
        "ring": p.ring,
        "tp": p.tp,
    }
    words = [f"{name} {value}" for name, value in named.items() if value > 1]
    if p.pp_layers:
        virtual = f" x {len(p.stages)} virtual" if len(p.stages) > 1 else ""
        words.append(f"pp {p.pp}{virtual}")
    words += [f"recompute {m.recompute}"] if m.recompute not in ("none", 0) else []
    words += [f"but_attention {m.but_attention}"] if m.but_attention else []
    words += [f"offload {m.offload}"] if m.offload != "none" else []
    words += [f"base {m.base}"] if m.base != "dtype" else []
    words += [f"host_layers {m.host_layers}"] if m.host_layers else []
    words += [f"micro-batch {config.data.micro_batch}"] if config.data.micro_batch > 1 else []
    return ", ".join(words) or "1 rank"
