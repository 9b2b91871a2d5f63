"""The commands of `mm-convert`: which there are, under which names and spellings of options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mm_convert.cli import plain
from mm_convert.cli.arguments import nearest, parse
from mm_convert.guides import converters as general
from mm_convert.guides import converters_lora as adapters
from mm_convert.guides import converters_qwen as qwen


@dataclass(frozen=True)
class Command:
    """`options`: the dataclass of its options; `aliases`: other spellings of them."""

    options: type
    action: Callable[[Any], None]
    aliases: Mapping[str, str] = field(default_factory=dict)


_PP = {alias: "cfg.target_parallel_config.pp_layers" for alias in ("pp_layers", "cfg.pp_layers")}
_TP = {alias: "cfg.target_parallel_config.tp_size" for alias in ("tp_size", "cfg.tp_size")}
_HF = {"cfg.hf_path": "cfg.hf_dir"}


def _wan_like(family: str, to: str) -> dict[str, Command]:
    return {
        "hf_to_mm": Command(general.HfToMM, partial(general.hf_to_mm, family), _PP),
        "mm_to_hf": Command(general.MMToHf, partial(general.mm_to_hf, family, to=to), _HF),
        "resplit": Command(general.Resplit, partial(general.resplit, family), _PP),
        "mm_to_dcp": Command(general.MMToDcp, partial(general.mm_to_dcp, family)),
        "dcp_to_mm": Command(general.Resplit, partial(general.resplit, family), _PP),
        "layerzero_to_mm": Command(general.LayerZeroToMM, partial(general.layerzero_to_mm, family), _PP),
    }


CONVERTERS: dict[str, dict[str, Command]] = {
    "WanConverter": {
        **_wan_like("wan", to="diffusers"),
        "merge_lora_to_base": Command(adapters.MergeLora, partial(adapters.merge_lora, "wan"), _PP),
        "lora_hf_to_mm": Command(adapters.LoraToMM, partial(adapters.lora_to_mm, "wan")),
        "lora_mm_to_hf": Command(adapters.LoraToHF, partial(adapters.lora_to_hf, "wan")),
    },
    "VACEConverter": {
        **_wan_like("vace", to="original"),
        "hf_diffusers_to_mm": Command(general.HfToMM, partial(general.hf_to_mm, "vace"), _PP),
        "mm_to_hf_diffusers": Command(general.MMToHf, partial(general.mm_to_hf, "vace", to="diffusers"), _HF),
    },
    "OpenSoraPlanConverter": {
        "hf_to_mm": Command(general.HfToMMTensorParallel, partial(general.hf_to_mm, "opensoraplan"), _TP),
        "mm_to_hf": Command(general.MMToHf, partial(general.mm_to_hf, "opensoraplan", to="original"), _HF),
        "resplit": Command(general.ResplitTensorParallel, partial(general.resplit, "opensoraplan"), _TP),
        "vae_convert": Command(general.VaeConvert, general.vae_convert),
    },
    "Qwen2_5_VLConverter": {
        "hf_to_mm": Command(qwen.QwenHfToMM, qwen.hf_to_mm),
        "mm_to_hf": Command(qwen.QwenMMToHf, qwen.mm_to_hf),
        "resplit": Command(qwen.QwenResplit, qwen.resplit),
    },
}

PLAIN: dict[str, Command] = {
    "inspect": Command(plain.Inspect, plain.run_inspect),
    "diff": Command(plain.Diff, plain.run_diff),
    "convert": Command(plain.Convert, plain.run_convert),
}


def run(argv: list[str]) -> None:
    """Run the command at the head of `argv`; SystemExit(2) for one that does not exist."""
    name, rest = argv[0], argv[1:]
    if name in PLAIN:
        run_command(PLAIN[name], [name], rest)
        return
    if name not in CONVERTERS:
        _unknown(name, [*PLAIN, *CONVERTERS])
    if name == "OpenSoraPlanConverter":
        rest = _without_version(rest)
    methods = CONVERTERS[name]
    if not rest or rest[0] in ("-h", "--help"):
        print(f"usage: mm-convert {name} METHOD [options]        (… METHOD --help says more)\n")
        for method, command in methods.items():
            print(f"  {method:<20} {(command.options.__doc__ or '').splitlines()[0]}")
        sys.exit(0 if rest else 2)
    if rest[0] not in methods:
        _unknown(f"{name} {rest[0]}", [f"{name} {method}" for method in methods])
    run_command(methods[rest[0]], [name, rest[0]], rest[1:])


def run_command(command: Command, words: Sequence[str], argv: Sequence[str], prog: str = "mm-convert") -> None:
    """Parse the options of one command, and do it."""
    argv = with_canonical_names(argv, command.aliases)
    asked_for = os.environ.get("JSONARGPARSE_DEFAULT_ENV", "").lower() == "true"  # as for MindSpeed-MM's tools
    environment = f"MM_CONVERT_{'__'.join(word.upper() for word in words)}__" if asked_for else ""
    command.action(parse(command.options, argv, prog=" ".join([prog, *words]), environment=environment))


def with_canonical_names(argv: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
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


def _without_version(argv: list[str]) -> list[str]:
    """MindSpeed-MM's converter has a --version before its command; of it, this one knows v1.2."""
    if not argv or argv[0].partition("=")[0] != "--version":
        return argv
    version, rest = (argv[0].partition("=")[2], argv[1:]) if "=" in argv[0] else ("".join(argv[1:2]), argv[2:])
    if version != "v1.2":
        sys.stderr.write(f"mm-convert: error: --version {version}: only v1.2 of Open-Sora-Plan is known\n")
        sys.exit(2)
    return rest


def _unknown(said: str, known: Sequence[str]) -> None:
    sys.stderr.write(f"mm-convert: error: unknown command {said}{nearest(said, known)}\n")
    sys.stderr.write(f"(there are: {', '.join(known)})\n")
    sys.exit(2)
