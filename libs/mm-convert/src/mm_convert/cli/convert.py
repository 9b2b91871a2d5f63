"""`convert`: the one verb behind every command that writes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_convert.cli.options import Convert, Layers
from mm_convert.cli.terminal import one_line
from mm_convert.lora.adapter import Adapter
from mm_convert.lora.reading import find_lora, open_lora
from mm_convert.read.checkpoint import Checkpoint, open_checkpoint
from mm_convert.read.experts import expert_of, open_experts
from mm_convert.write.outputs import Files
from mm_convert.write.pairs import prepare_pair
from mm_convert.write.prepare import prepare_adapter, prepare_conversion, prepare_like, prepare_merge
from mm_convert.write.targets import split_of


def convert(options: Convert) -> None:
    """Do it, or only say what would be done; notes go to stderr."""
    write(prepare(options), options)


def write(files: Files, options: Convert) -> None:
    """Write the files, or only list them."""
    for note in files.notes:
        sys.stderr.write(f"note: {one_line(note)}\n")
    if options.dry_run:
        files.refuse(options.overwrite)
        print(files)
    else:
        files.write(overwrite=options.overwrite, show_progress=True, sha256=options.sha256)


def prepare(options: Convert) -> Files:
    """What would be written. Raises ValueError for what cannot be done."""
    if options.takes == "anything":
        if pair := open_experts(options.source):
            adapters = open_experts(options.lora) if options.lora else None

            def one(expert: str, source: Path, target: Path) -> tuple[Checkpoint | Adapter, Files]:
                lora = getattr(adapters, expert) if adapters else options.lora
                return _prepare_one(replace(options, source=source, target=target, lora=lora), expert)

            return prepare_pair(pair, options.target, options.to or "mm", options.boundary, one)
        if options.boundary is not None:
            raise ValueError(f"{options.source} is not two experts, so it has no boundary")
    return _prepare_one(options)[1]


def _prepare_one(options: Convert, expert: str = "") -> tuple[Checkpoint | Adapter, Files]:
    """What lies in one folder, that of an `expert` or of a model, and what writing it would write."""
    if options.lora:
        return _prepare_merge(options, expert or expert_of(options.source) or "")
    if options.takes == "model":
        return _prepare_model(options)
    look = open_lora if options.takes == "adapter" else find_lora
    adapter = look(options.source, alpha=options.lora_alpha, family=options.family)
    if adapter:
        for name in ("shard_gb", "pp_layers", "vit_pp_layers"):
            if getattr(options, name):
                raise ValueError(f"{options.source} is a LoRA adapter, which has no use for --{name}")
        if options.tp_size > 1:
            raise ValueError(f"{options.source} is a LoRA adapter, which has no use for --tp_size")
        if options.family not in ("", adapter.family.name):
            raise ValueError(f"{options.source} is for {adapter.family.name}, not for {options.family}")
        return adapter, prepare_adapter(adapter, options.source, options.target, options.to or "mm", options.dtype)
    if options.lora_alpha is not None:
        raise ValueError(f"{options.source} is no LoRA adapter, so it has no lora_alpha")
    return _prepare_model(options)


def _prepare_model(options: Convert) -> tuple[Checkpoint, Files]:
    if options.like:
        model = _open(replace(options, source=options.like, published=True, part="model", prefix="", steps=False))
        checkpoint = _open(options, config=model.config)
        return checkpoint, prepare_like(checkpoint, options.target, model, dtype=options.dtype)
    checkpoint = _open(options)
    files = prepare_conversion(checkpoint, options.target, _form(options, checkpoint), **_cut(options))
    return checkpoint, files


def _prepare_merge(options: Convert, expert: str) -> tuple[Checkpoint, Files]:
    assert options.lora
    base = _open(options)
    adapter = open_lora(options.lora, alpha=options.lora_alpha, rank=options.lora_rank, expert=expert)
    files = prepare_merge(base, adapter, options.lora, options.target, _form(options, base), **_cut(options))
    return base, files


def _cut(options: Convert) -> dict[str, Any]:
    """How a target is cut into stages, ranks and files, and its dtype."""
    return {
        "pp_layers": _layers(options.pp_layers, options.vit_pp_layers),
        "tp_size": options.tp_size,
        "shard_bytes": None if options.shard_gb is None else int(options.shard_gb * 1e9),
        "dtype": options.dtype,
    }


def _open(options: Convert, config: dict[str, Any] | None = None) -> Checkpoint:
    """The model at the source. Raises ValueError if it is of another family, or split otherwise than is said."""
    source = options.source
    if options.steps and options.iteration is not None:
        source = source / f"iter_{options.iteration:07d}"
    elif options.steps and (steps := sorted(source.glob("iter_*"))):
        source = steps[-1]
    checkpoint = open_checkpoint(
        source, config=config, published=options.published, part=options.part, prefix=options.prefix
    )
    if options.family not in ("", checkpoint.family):
        raise ValueError(f"{checkpoint.path} is a checkpoint of {checkpoint.family}, not of {options.family}")
    if checkpoint.layout == "mindspeed":
        _refuse_other_split(checkpoint, options)
    return checkpoint


def _refuse_other_split(checkpoint: Checkpoint, options: Convert) -> None:
    """A split that a person states and the files contradict is a mistake on one side: which, only the person knows."""
    found, said = checkpoint.split, _layers(options.source_pp_layers, options.source_vit_pp_layers)
    stated = split_of(checkpoint.content.family, said, options.source_tp_size)
    different = [
        f"{name} {stated.flat(name)}, it has {found['layers'][name]}"
        for name in stated.layers
        if stated.flat(name) != found["layers"][name]
    ]
    if (stated.layers or stated.tp > 1) and stated.tp != found["tp"]:
        different.append(f"tp_size {stated.tp}, it has {found['tp']}")
    if different:
        raise ValueError(f"{checkpoint.path} is said to be split by {'; '.join(different)}")


def _layers(first: Layers, vision: Layers) -> Layers | dict[str, Layers]:
    """Of a model with one ladder, or of Qwen."""
    return {"llm": first, "vit": vision} if vision else first


def _form(options: Convert, checkpoint: Checkpoint) -> str:
    """The form that is asked for; without a word, MindSpeed-MM's for what is in it, else ours."""
    return options.to or ("mindspeed" if checkpoint.layout == "mindspeed" else "mm")
