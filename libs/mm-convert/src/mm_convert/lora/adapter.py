"""An adapter: for each module a pair of factors and their strength; of some parameters the whole difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_convert.families.family import Family
from mm_convert.tensors.mapping import Tensors
from mm_convert.tensors.views import LazyTensor


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight: alpha/rank · B A."""

    a: LazyTensor  # rank x in; behind that the kernel, of a convolution
    b: LazyTensor  # out x rank; behind that ones, of a convolution
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.b.shape[0], *self.a.shape[1:])


@dataclass(eq=False)
class Adapter(Tensors):
    """An adapter on disk, also as a mapping to tensors: `blocks.0.self_attn.q.lora_A.weight`, with our names. What it
    adds whole, to `head.head.bias` or `blocks.0.modulation`, is a mapping of its own: `differences`.
    """

    family: Family
    format: str  # as found: "peft", "diffusers", "comfyui", "kohya", "diffsynth", "mindspeed"
    dialect: str  # of its names, as found
    modules: dict[str, LowRank]  # by our names, without `.weight`
    base: str = ""  # the model it is for, where the file says so
    dropout: float = 0.0  # on the input of A in training, where the file says so
    notes: tuple[str, ...] = ()
    expert: str = ""  # "low", where the names say that it is for low noise
    differences: Tensors = field(default_factory=lambda: Tensors({}))  # what is added whole, by our parameters
    trained_on: Mapping[str, str] = field(default_factory=dict)  # facts of its base, see `mm_convert.lora.base`

    def __post_init__(self) -> None:
        factors = {f"{name}.lora_A.weight": module.a for name, module in self.modules.items()}
        factors |= {f"{name}.lora_B.weight": module.b for name, module in self.modules.items()}
        super().__init__(factors)

    @property
    def rank(self) -> int | None:
        """Of all modules; None where they differ."""
        return _only({module.rank for module in self.modules.values()})

    @property
    def alpha(self) -> float | None:
        """Of all modules; None where they differ."""
        return _only({module.alpha for module in self.modules.values()})

    @property
    def alphas(self) -> dict[str, float]:
        """Of each module."""
        return {name: module.alpha for name, module in self.modules.items()}


def _only(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else None
