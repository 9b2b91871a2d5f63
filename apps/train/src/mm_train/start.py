"""What a model begins with: which of its parameters are trained, and where the value of each comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

from mm_convert import Checkpoint, expert_of, open_checkpoint, open_experts
from mm_models.initial import control_from, initial
from mm_models.layers import cast_weights
from mm_models.wan import WanConfig


def freeze(model: nn.Module, trained: Sequence[str], dtype: torch.dtype) -> None:
    """Leaves only the parameters that a pattern names to be trained; the others need no float32 masters.

    ValueError for a pattern that names none.
    """
    frozen = dict(model.named_parameters())
    for pattern in trained:
        named = [name for name in model.state_dict() if fnmatch(name, pattern)]
        if not named:
            firsts = dict.fromkeys(name.partition(".")[0] + ".*" for name in model.state_dict())
            raise ValueError(f"--trained {pattern!r} names no parameter; there are {', '.join(firsts)}")
        for name in named:
            frozen.pop(name, None)
    wide = {name: p.dtype for name, p in model.named_parameters()}
    cast_weights(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in frozen
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wide[name])


class Start(Mapping[str, Tensor]):
    """Every parameter by name, read or drawn when it is asked for.

    Adapter matrices are fresh, the layers they wrap keep their published name in the file. So is a control ladder on
    the weights of a Wan without one (`mm_models.initial.control_from`).
    """

    def __init__(self, model: nn.Module, weights: str, expert: str | None, seed: int):
        self.seed, self.vace_layers = seed, model.config.vace_layers
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.file = None if weights == "random" else _open(Path(weights), expert, model.config)
        self.adapters = {name for name in self.shapes if ".lora_" in name}
        self.published = {name.replace(".base_layer.", "."): name for name in self.shapes if name not in self.adapters}
        there = list(self.file or self.published)
        control = {name for name in self.published if name.startswith("vace_")}
        self.made = control if control and not control & set(there) else set()
        self.names = [*self.adapters, *(self.published.get(n, n) for n in (*there, *self.made))]

    def check_open(self, model: nn.Module) -> None:
        """Raise ValueError if a projection that begins at zero stays frozen: nothing could learn through it."""
        zero = {name for name in self.made if name.endswith("after_proj.weight")}
        if self.file is None:
            zero |= {n for n in self.published if n.endswith(("after_proj.weight", "head.head.weight"))}
        frozen = {name.replace(".base_layer.", ".") for name, p in model.named_parameters() if not p.requires_grad}
        if shut := sorted(zero & frozen):
            control = shut[0].startswith("vace_")
            why = "a control ladder on the weights of a plain Wan" if control and self.file else "a fresh model"
            raise ValueError(
                f"{shut[0]} of {why} begins at zero and would stay so, as it is not trained: nothing could be learned "
                "through it. Train it first (--trained), or give --weights in which it has learned"
            )

    def __getitem__(self, name: str) -> Tensor:
        if name in self.adapters:
            return initial(name, self.shapes[name], self.seed)
        published = name.replace(".base_layer.", ".")
        if published in self.made:
            return control_from(self._base, self.vace_layers, published, self.shapes[name])
        return self._base(published)

    def _base(self, published: str) -> Tensor:
        if self.file is None:
            return initial(published, self.shapes[self.published[published]], self.seed)
        return self.file[published]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _open(path: Path, expert: str | None, wanted: WanConfig) -> Checkpoint:
    """The checkpoint, if what its files say of the model is what is wanted; not all of it shows in names and shapes."""
    if (path / "checkpoints").is_dir() and (path / "metrics.jsonl").is_file():
        raise ValueError(f"--weights {path} is a run: its weights are in {path / 'weights'} when it has finished")
    of_folder = expert_of(path)
    if expert and of_folder and of_folder != expert:
        raise ValueError(
            f"--weights {path} is the expert for {of_folder} noise, and --expert is {expert}: give the other"
        )
    if expert and (pair := open_experts(path)):
        path = pair.high if expert == "high" else pair.low
    file = open_checkpoint(path)
    said = {k: tuple(v) if isinstance(v, list) else v for k, v in file.config.items()}
    other = [f"{k} {v} (asked for: {getattr(wanted, k)})" for k, v in said.items() if v != getattr(wanted, k, v)]
    if other:
        raise ValueError(f"--weights {path} is another architecture: {', '.join(other)}")
    return file
