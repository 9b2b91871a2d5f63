"""What every command that writes is asked for: one `Convert`, whatever the command calls its fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from mm_convert.cli.arguments import Option, options_of, parse_options
from mm_convert.guides.table import GROUPS, SAME, WRITING, Command, Flag

T = TypeVar("T")

Form = Literal["mm", "mindspeed", "dcp", "original", "diffusers", "transformers", "transformers-v5", "peft", "comfyui"]
_Layers = list[Annotated[int, ">= 0"]]
Layers = _Layers | list[_Layers]
POSITIONAL = {"positional": True}


@dataclass(kw_only=True)
class Convert:
    """Rewrite a checkpoint, or a LoRA adapter, under other names and in other files; tensors keep their bytes."""

    dtype: Literal["float32", "bfloat16", "float16", "fp8_scaled"] | None = None
    "of all floating-point tensors in the target (needs torch); fp8_scaled: only with --to comfyui; null: as they are"
    overwrite: bool = False
    "replace the target, if it holds a checkpoint and nothing else"
    dry_run: bool = False
    "only print what would be written: files, sizes, memory and disk"
    sha256: bool = False
    "record the sum of every written tensor in mm_convert.json"
    source: Path = field(metadata=POSITIONAL)
    "anything that inspect reads"
    target: Path = field(metadata=POSITIONAL)
    "folder to make; a name that ends in .safetensors or .pt makes one file"
    to: Form | None = "mm"
    "mm (ours), comfyui, mindspeed, dcp, or names: original, diffusers, transformers; LoRA: all but dcp and names"
    shard_gb: Annotated[float, "> 0"] | None = None
    "regroup into files of at most this many GB (10^9 bytes); null: keep the source's grouping"
    pp_layers: Layers = field(default_factory=list)
    "layers of each pipeline stage, flat or one list per virtual stage (for Qwen: language layers)"
    vit_pp_layers: Layers = field(default_factory=list)
    "for Qwen: vision layers of each pipeline stage"
    tp_size: Annotated[int, ">= 1"] = 1
    "number of tensor-parallel ranks"
    lora: Path | None = None
    "a LoRA adapter to merge into the source (needs torch); of two experts into both, or a pair of adapters"
    lora_alpha: Annotated[float, "!= 0"] | None = None
    "alpha of a LoRA adapter, if its file does not say it"
    boundary: Annotated[float, "> 0", "< 1"] | None = None
    "for two experts whose files do not say it: the noise level from which on the high-noise one generates"

    # What only commands of MindSpeed-MM's guides say.
    takes: Literal["anything", "model", "adapter"] = "anything"
    "what may lie at the source; anything: pairs of experts too"
    family: str = ""
    "the family that it must be of"
    published: bool = False
    "of a folder that was converted in place: its published files, not what was made of them"
    steps: bool = False
    "the source holds iter_*: one of them is meant"
    iteration: Annotated[int, ">= 0"] | None = None
    "which of the steps; null: the newest"
    part: str = "model"
    "of a training checkpoint, as in `open_checkpoint`"
    prefix: str = ""
    "what the names of the model begin with, as in `open_checkpoint`"
    source_pp_layers: Layers = field(default_factory=list)
    "how the source is said to be split; must agree with its files"
    source_vit_pp_layers: Layers = field(default_factory=list)
    "the same of vision layers"
    source_tp_size: Annotated[int, ">= 1"] = 1
    "the same of tensor-parallel ranks"
    like: Path | None = None
    "the published model, whose names, files and config.json the target gets"
    lora_rank: Annotated[int, ">= 1"] | None = None
    "rank of the adapter to merge; must agree with its factors"


def read(
    command: Command, argv: Sequence[str] | None, make: Callable[..., T], *, prog: str, environment: str = ""
) -> T:
    """Read a command line by its row of the table; `make` is called with the fields of `Convert` that it gives.

    `prog`, `environment` and errors are those of `parse`.
    """
    own = {option.name: option for option in options_of(Convert)}
    flags = {flag.name or flag.field: flag for flag in (*WRITING, *command.flags)}

    def made(values: Mapping[str, Any]) -> T:
        said = {flag.field: _meaning(flag, values[name]) for name, flag in flags.items()}
        return make(**command.fixed, **said)

    return parse_options(
        [_option(name, flag, own.get(flag.field)) for name, flag in flags.items()],
        made,
        argv,
        prog=prog,
        description=command.help,
        groups=GROUPS,
        environment=environment,
    )


def _option(name: str, flag: Flag, field: Option | None) -> Option:
    """A flag with what it leaves to the field of `Convert`."""
    if field is None:
        return Option(name, flag.hint, flag.default, flag.help)
    hint = field.hint if flag.hint is SAME else flag.hint
    default = field.default if flag.default is SAME else flag.default
    return Option(name, hint, default, flag.help or field.help, field.positional and not flag.name)


def _meaning(flag: Flag, value: Any) -> Any:
    return flag.means.get(value, value) if flag.means else value
