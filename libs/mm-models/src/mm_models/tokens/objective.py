"""Predicting the next token: what a language model is trained to do, on packs of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from mm_models.layers import Sequence as Tokens
from mm_models.objective import Generators
from mm_models.tokens.head import IGNORED

Average = Literal["token", "micro_batch", "sample"]
"""What counts alike in the loss of a step."""


@dataclass(frozen=True)
class NextToken:
    """An `mm_models.objective.Objective`. A batch is one pack: conversations behind each other, in one row.

    Tensors: input_ids 1 L; labels 1 L, what each token must predict, or `IGNORED`; position_ids 1 3 L; segments
    1 S+1, where the conversations part, from 0 to the end of the last (what follows is padding); pixel_values 1 N P and
    grid_thw 1 M 3, of all images and videos.
    """

    average: Average = "token"
    """token: every label token of a step counts alike. micro_batch: the mean over the label tokens of each
    conversation, then the mean over all conversations, as MindSpeed-MM does with one conversation in a micro-batch; one
    without labels counts as 0 (there it is NaN). sample: the same, but one without labels does not count.
    """
    task: str = "chat"
    host: tuple[str, ...] = ("segments", "grid_thw")
    """Tensors that stay on the host: the model asks for their values before it computes."""

    @property
    def stored(self) -> Mapping[str, int]:
        return {}

    @property
    def points(self) -> Sequence[Any]:
        return (0,)

    def draw(self, tensors: Mapping[str, Tensor], generators: Generators) -> None:
        """Nothing is left to chance."""

    def draw_at(self, tensors: Mapping[str, Tensor], points: Sequence[Any], generators: Generators) -> None:
        """Nothing is left to chance."""

    def inputs(self, tensors: Mapping[str, Tensor], drawn: None = None) -> dict[str, Any]:
        """input_ids 1 L, position_ids 3 1 L, pixel_values N P, grid_thw (M tuples of 3), sequence, labels 1 L."""
        bounds, tokens = _bounds(tensors), tensors["input_ids"].shape[1]
        bounds = bounds if bounds[-1] == tokens else (*bounds, tokens)  # padding attends to itself
        return {
            "input_ids": tensors["input_ids"],
            "position_ids": tensors["position_ids"].transpose(0, 1),
            "pixel_values": tensors["pixel_values"][0],
            "grid_thw": tuple(map(tuple, tensors["grid_thw"][0].tolist())),  # facts, which a pipeline knows beforehand
            "sequence": Tokens(tokens, causal=True, segments=bounds if len(bounds) > 2 else None),
            "labels": tensors["labels"],
        }

    def weigh(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """S: the weight of each conversation."""
        counts = _label_counts(tensors)
        if self.average == "token":
            return counts.float()
        return torch.ones_like(counts).float() if self.average == "micro_batch" else counts.clamp(max=1).float()

    def losses(self, output: Tensor, tensors: Mapping[str, Tensor], drawn: None = None) -> Tensor:
        """output: 1 L, the loss of each token. Returns S: those of the conversations, times their weights."""
        parts = [output[0, start:stop].sum() for start, stop in pairwise(_bounds(tensors))]
        losses = torch.stack(parts) if parts else output[0, :0]  # a pack without conversations has a gradient: zero
        if self.average == "token":
            return losses
        return losses / _label_counts(tensors).clamp(min=1).to(losses)

    def count(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Tokens of the conversations, those of them that are trained, tokens of padding, and patches of images."""
        tokens = int(tensors["segments"][0, -1])
        return {
            "tokens": tokens,
            "padding": tensors["input_ids"].shape[1] - tokens,
            "label_tokens": int((tensors["labels"] != IGNORED).sum()),
            "patches": tensors["pixel_values"].shape[1],
        }

    def describe(self) -> str:
        per = {"token": "label token", "micro_batch": "conversation", "sample": "conversation that has labels"}
        return f"next token, every {per[self.average]} counts alike"


def _bounds(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Where the conversations of a pack part: 0 … the end of the last."""
    return tuple(tensors["segments"][0].tolist())


def _label_counts(tensors: Mapping[str, Tensor]) -> Tensor:
    """S: how many label tokens each conversation has."""
    labels = tensors["labels"][0] != IGNORED
    counts = [labels[start:stop].sum() for start, stop in pairwise(_bounds(tensors))]
    return torch.stack(counts) if counts else labels.new_zeros(0, dtype=torch.long)
