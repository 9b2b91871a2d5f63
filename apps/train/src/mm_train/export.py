"""Turn a training checkpoint into weights that can be used: ``python -m mm_train.export run/checkpoints/step-00000500
--output W``.

Reads one tensor at a time and needs no process group, whatever layout the checkpoint was trained in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mm_convert import open_dcp, save_checkpoint, save_lora, write_experts
from mm_convert.cli.arguments import parse, read_config
from mm_convert.cli.terminal import escaped_output, one_line
from mm_convert.lora.base import describe_content
from mm_data.chat_options import save_options
from mm_models import build
from mm_train.adapter import describe_base
from mm_train.command import run_alone
from mm_train.config import Config
from mm_train.objective import architecture, expert_boundary
from mm_train.resume import latest, read_progress

if TYPE_CHECKING:  # torch takes seconds, a missing path should not
    from torch import Tensor

    from mm_train.start import Start


@dataclass
class ExportConfig:
    """Write the weights of a training checkpoint in the form that is usual for the model; those of a LoRA run as an
    adapter, as peft writes it.
    """

    checkpoint: Path = field(metadata={"positional": True})
    """Directory run/checkpoints/step-…, or the run itself for its newest."""
    output: Path
    """Directory to write."""
    expert: Literal["high", "low"] | None = None
    """Of a run of both experts, which one."""
    ema: bool = False
    """The moving average instead of the last weights."""
    merge: bool = False
    """Of a LoRA run: the weights that it started from, with the adapters in them."""
    to: str | None = None
    """mm, our own form, or one that others read, as for mm-convert; by default what is usual for the model: mm for
    videos, transformers (a folder of the hub, with processor and tokenizer) for conversations.
    """
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of all weights; by default as they were trained, in float32, and in a form that others read as they were computed
    with (--dtype of the run).
    """
    overwrite: bool = False


class Below(Mapping):
    """The tensors whose names begin with a prefix, without it."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str):
        self.tensors, self.prefix = tensors, prefix

    def meta(self, name: str) -> Tensor:
        return self.tensors.meta(self.prefix + name)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.tensors if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Filled(Mapping):
    """The tensors that were trained, and for all others those that the run started from."""

    def __init__(self, trained: Mapping[str, Tensor], start: Start):
        self.trained, self.start = trained, start

    def meta(self, name: str) -> Tensor:
        return self.trained.meta(name) if name in self.trained else self.start[name].to("meta")

    def __getitem__(self, name: str) -> Tensor:
        return self.trained[name] if name in self.trained else self.start[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.start)

    def __len__(self) -> int:
        return len(self.start)


class Merged(Mapping):
    """The tensors that the run started from, with the trained adapters in them, each in the dtype that it has there."""

    def __init__(self, trained: Mapping[str, Tensor], start: Start, scale: float):
        self.trained, self.start, self.scale = trained, start, scale

    def meta(self, name: str) -> Tensor:
        return self.start[name].to("meta")

    def __getitem__(self, name: str) -> Tensor:
        weight = self.start[name]
        a, b = (f"{name.removesuffix('.weight')}.lora_{letter}.default.weight" for letter in "AB")
        if a not in self.trained:
            return weight
        return weight.float().addmm(self.trained[b], self.trained[a], alpha=self.scale).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.start)

    def __len__(self) -> int:
        return len(self.start)


def export(
    checkpoint: Path,
    output: Path,
    ema: bool = False,
    overwrite: bool = False,
    to: str | None = None,
    dtype: str | None = None,
    merge: bool = False,
    expert: str | None = None,
) -> Path:
    """Write the weights of `checkpoint` to the directory `output` and return it. See `ExportConfig`."""
    if not checkpoint.is_dir():
        what = "is not a directory" if checkpoint.exists() else "does not exist"
        raise ValueError(f"{checkpoint} {what}: name a run, or one of its checkpoints/step-…")
    if experts := [name for name in ("high", "low", "both") if (checkpoint / name / "checkpoints").is_dir()]:
        raise ValueError(
            f"{checkpoint} holds runs of experts: name {' or '.join(str(checkpoint / n) for n in experts)}"
        )
    if (checkpoint / "checkpoints").is_dir():
        checkpoint = checkpoint / "checkpoints"
    checkpoint = latest(checkpoint) or checkpoint
    if not (checkpoint / "progress.json").is_file():
        raise ValueError(f"{checkpoint} is not a complete training checkpoint: it has no progress.json")
    config = read_config(Config, checkpoint / "config.toml")
    if ema and not config.optim.ema:
        raise ValueError(f"{checkpoint} holds no moving average (the run kept no --optim.ema)")
    tensors: Mapping[str, Tensor] = open_dcp(checkpoint, "ema" if ema else "model")
    if (config.expert == "both") != (expert is not None):
        what = "both experts: give --expert high or low" if expert is None else "one model: leave out --expert"
        raise ValueError(f"{checkpoint} holds {what}")
    run = config
    if expert is not None:
        config, tensors = replace(config, expert=expert), Below(tensors, f"{expert}.")
    if merge and not config.lora.rank:
        raise ValueError(f"{checkpoint} holds no adapters (the run had no --lora.rank): leave out --merge")
    if config.lora.rank and not merge:
        if to or dtype:
            raise ValueError(
                f"{checkpoint} holds adapters, which are written as peft writes them: leave out --to and --dtype, or "
                "give --merge true for whole weights; mm-convert turns adapters into other forms"
            )
        more = {"dropout": config.lora.dropout, "base": Path(config.weights), "overwrite": overwrite}
        save_lora(
            output, tensors, config.lora.alpha, trained_on=_describe_base(config, tensors, run, checkpoint), **more
        )
        return _keep_options(config, output)
    from mm_train.contents import check_base  # torch, only now
    from mm_train.conversations import find_processor
    from mm_train.start import Start

    family, _ = architecture(config)
    model = build(config.model, device="meta", **config.architecture)
    whole = tensors
    if config.has_frozen:
        check_base(run, read_progress(checkpoint), checkpoint)
        start = Start(model, config)
        scale = config.lora.alpha / max(1, config.lora.rank)
        whole = Merged(tensors, start, scale) if merge else Filled(tensors, start)
    form, more = to or family.exported, {}
    if form != "mm":
        dtype = dtype or config.dtype
    if family.chat and form != "mm":
        more = {"published": find_processor(config, family.chat), "copies": family.chat.files}
    fields = family.describe(model.config)
    save_checkpoint(output, whole, fields, to=form, dtype=dtype, overwrite=overwrite, **more)
    return _keep_options(config, output)


def _describe_base(config: Config, tensors: Mapping[str, Tensor], run: Config, checkpoint: Path) -> dict[str, str]:
    """What the adapters were trained on; its content where the weights are still there, and still the same."""
    from mm_train.contents import check_base  # torch, only now
    from mm_train.start import open_base

    facts = describe_base(config)
    if not Path(config.weights).exists():
        return facts
    try:
        check_base(run, read_progress(checkpoint), checkpoint)
        base = open_base(config, architecture(config)[1])
    except ValueError:
        return facts
    modules = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    return facts | describe_content(base.tensors, modules)


def _keep_options(config: Config, output: Path) -> Path:
    """Weights that answer say how they were asked, so that mm_infer.chat asks them alike."""
    if architecture(config)[0].chat:
        save_options(output, config.data.chat)
    return output


def export_final(config: Config, checkpoint: Path, leader: bool) -> Path:
    """What a finished run leaves: `weights/` (or `adapter/`), and `-ema` beside it where an average was kept. Those of
    two experts lie beside each other in it.

    The first rank writes, the others are done: they do not wait, as that could take longer than any timeout.
    """
    output = config.artifact
    averaged = (False, True) if config.optim.ema else (False,)
    for ema in averaged if leader else ():
        target = output.with_name(f"{output.name}-ema") if ema else output
        if not config.expert:
            export(checkpoint, target, ema=ema, overwrite=True)
            continue
        folders = write_experts(target, expert_boundary(config))  # both experts are one artifact
        for one in config.trainees:
            own = one.expert if config.expert == "both" else None
            export(checkpoint, folders[one.expert], ema=ema, overwrite=True, expert=own)
    return output


@escaped_output()
def main(argv: list[str] | None = None) -> None:
    def work() -> None:
        config = parse(ExportConfig, argv, prog="python -m mm_train.export")
        asked = (config.checkpoint, config.output, config.ema, config.overwrite, config.to, config.dtype)
        print(one_line(export(*asked, merge=config.merge, expert=config.expert)))

    run_alone(work)


if __name__ == "__main__":
    main()
