"""What a model is trained to do: the one seam between a family and all that trains, validates and measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Generators = Callable[[int, str], "torch.Generator"]
"""(number of a sample in its batch, purpose) -> a fresh CPU generator; it depends on the sample, not on its place."""


class Objective(Protocol):
    """One for each (family, task). `tensors` are those of a batch by name, as the data set stores them."""

    task: str

    @property
    def host(self) -> Sequence[str]:
        """Names of tensors that stay on the host, as their values are asked for before anything is computed."""

    @property
    def stored(self) -> Mapping[str, int]:
        """What a sample must hold: names, and the size by which each is known (channels, rows, or a width)."""

    @property
    def points(self) -> Sequence[Any]:
        """The fixed points at which validation measures a sample, each by itself."""

    def draw(self, tensors: Mapping[str, Tensor], generators: Generators) -> Any:
        """All that chance decides for a batch, e.g. timesteps and noise."""

    def draw_at(self, tensors: Mapping[str, Tensor], points: Sequence[Any], generators: Generators) -> Any:
        """The same at a given point for each sample."""

    def inputs(self, tensors: Mapping[str, Tensor], drawn: Any) -> dict[str, Any]:
        """The model's arguments, by name."""

    def weigh(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """B: the weight of each sample in the loss of its step. 1, or its number of label tokens."""

    def losses(self, output: Tensor, tensors: Mapping[str, Tensor], drawn: Any) -> Tensor:
        """B, float32: the loss of each sample, already multiplied by its weight."""

    def count(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        """What there is to count in a batch besides its samples, by the names of metrics.jsonl."""

    def describe(self) -> str:
        """What is trained on, besides the task, in words for the reader of a log."""
