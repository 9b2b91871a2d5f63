"""The commands of `mm-convert`: which there are, how their words are read; those that only read."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mm_convert.cli.arguments import nearest, parse
from mm_convert.cli.convert import convert
from mm_convert.cli.options import POSITIONAL, Convert, Form, read
from mm_convert.cli.terminal import one_line
from mm_convert.guides.table import CONVERTERS, Command, Flag
from mm_convert.read.inspection import diff, inspect, inspect_adapter, inspect_pair


@dataclass
class Inspect:
    """Say what a checkpoint is, from its headers alone."""

    path: Path = field(metadata=POSITIONAL)
    "a folder of the hub, ours, a MindSpeed-MM tree, torch DCP, one .safetensors or .pt file; LoRA; a pair of experts"


@dataclass
class Diff:
    """Say how two checkpoints differ, whatever their forms: names, shapes, dtypes, largest difference per tensor."""

    a: Path = field(metadata=POSITIONAL)
    "a whole model, in any form"
    b: Path = field(metadata=POSITIONAL)
    "a whole model, in any form"


def run_inspect(options: Inspect) -> None:
    """Print what lies at a path: a pair of experts, an adapter or a model."""
    print(inspect_pair(options.path) or inspect_adapter(options.path) or inspect(options.path))


def run_diff(options: Diff) -> None:
    """Exit code 1 where the two differ."""
    compared = differing = 0
    for difference in diff(options.a, options.b):
        compared += 1
        if difference:
            differing += 1
            print(one_line(f"{difference.name}: {difference.what}"), flush=True)  # a large model takes minutes
    print(f"{compared} tensors, " + (f"{differing} differ" if differing else "all equal"))
    sys.exit(1 if differing else 0)


CONVERT = Command(
    "Rewrite a checkpoint, or a LoRA adapter, under other names and in other files; tensors keep their bytes.",
    (
        *(Flag("source"), Flag("target"), Flag("to", hint=Form), Flag("shard_gb")),
        *(Flag("pp_layers"), Flag("vit_pp_layers"), Flag("tp_size"), Flag("boundary")),
        *(Flag("lora"), Flag("lora_alpha")),
    ),
)
READING = {"inspect": (Inspect, run_inspect), "diff": (Diff, run_diff)}


def run(argv: list[str]) -> None:
    """Run the command at the head of `argv`; SystemExit(2) for one that does not exist."""
    name, rest = argv[0], argv[1:]
    if name in READING:
        options, action = READING[name]
        action(parse(options, rest, prog=f"mm-convert {name}", environment=_environment([name])))
    elif name == "convert":
        _convert(CONVERT, [name], rest)
    elif name in CONVERTERS:
        _run_converter(name, rest)
    else:
        _refuse_unknown(name, [*READING, "convert", *CONVERTERS])


def _run_converter(name: str, argv: list[str]) -> None:
    """One of MindSpeed-MM's: its method, and that one's options."""
    methods = CONVERTERS[name]
    argv = _drop_version(argv) if name == "OpenSoraPlanConverter" else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: mm-convert {name} METHOD [options]        (… METHOD --help says more)\n")
        for method, command in methods.items():
            print(f"  {method:<20} {command.help}")
        sys.exit(0 if argv else 2)
    if argv[0] not in methods:
        _refuse_unknown(f"{name} {argv[0]}", [f"{name} {method}" for method in methods])
    _convert(methods[argv[0]], [name, argv[0]], argv[1:])


def _convert(command: Command, words: Sequence[str], argv: Sequence[str]) -> None:
    argv = replace_aliases(argv, {other: flag.name for flag in command.flags for other in flag.also})
    convert(read(command, argv, Convert, prog=" ".join(["mm-convert", *words]), environment=_environment(words)))


def _environment(words: Sequence[str]) -> str:
    """What environment variables with options begin with, if they are asked for as of MindSpeed-MM's tools."""
    asked_for = os.environ.get("JSONARGPARSE_DEFAULT_ENV", "").lower() == "true"
    return f"MM_CONVERT_{'__'.join(word.upper() for word in words)}__" if asked_for else ""


def replace_aliases(argv: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """The arguments with every other spelling of an option replaced by its name."""
    result = []
    for word in argv:
        flag, equals, value = word.partition("=")
        name = aliases.get(flag.removeprefix("--")) if flag.startswith("--") else None
        result.append(f"--{name}{equals}{value}" if name else word)
    for name in set(aliases.values()):
        if sum(word.partition("=")[0] == f"--{name}" for word in result) > 1:
            sys.stderr.write(f"mm-convert: error: --{name} is given twice, under two spellings or one\n")
            sys.exit(2)
    return result


def _drop_version(argv: list[str]) -> list[str]:
    """MindSpeed-MM's converter has a --version before its command; of it, this one knows v1.2."""
    if not argv or argv[0].partition("=")[0] != "--version":
        return argv
    version, rest = (argv[0].partition("=")[2], argv[1:]) if "=" in argv[0] else ("".join(argv[1:2]), argv[2:])
    if version != "v1.2":
        sys.stderr.write(f"mm-convert: error: --version {version}: only v1.2 of Open-Sora-Plan is known\n")
        sys.exit(2)
    return rest


def _refuse_unknown(said: str, known: Sequence[str]) -> None:
    sys.stderr.write(f"mm-convert: error: unknown command {said}{nearest(said, known)}\n")
    sys.stderr.write(f"(there are: {', '.join(known)})\n")
    sys.exit(2)
