"""What a loader asks of a data set, and what training gets: named tensors of some samples."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Pick(NamedTuple):
    """A sample to show, and how often all samples of its bucket have been shown before."""

    index: int
    epoch: int


@dataclass(frozen=True)
class Batch:
    """A micro batch. Draws for its samples (timestep, noise) belong to (seed, epochs[i], ids[i]).

    The tensors have the samples as their first dimension, of packed samples the pack, which is one. The data set names
    them, see its `batch`.
    """

    tensors: dict[str, Tensor]
    ids: list[str]
    epochs: list[int]


def pad_texts(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Encoded captions, S D each, as the tensors of a batch: `text` B S D, S of the longest and zeros past the end of
    the others, and `text_mask` B S bool, True where there is a token.
    """
    lengths = torch.tensor([len(text) for text in texts])
    text = pad_sequence(list(texts), batch_first=True)
    return {"text": text, "text_mask": torch.arange(text.shape[1]) < lengths[:, None]}


Made = TypeVar("Made", covariant=True)


class BatchDataset(Protocol[Made]):
    """Samples that a loader can put into batches, whatever they are made of.

    `ids[i]` is unique: draws for a sample belong to it. `buckets[i]` is a key of the data set's choice: all samples of
    one step have the same, e.g. the shape of their latents. `batch` is called from several threads at once.

    Where some samples are shown more often than others, it also has `sets`: (number of samples, weight) of each, in the
    order of the samples, see `Order`.
    """

    ids: Sequence[str]
    buckets: Sequence[Hashable]

    def batch(self, picks: Sequence[Pick]) -> Made:
        """The micro batch of these samples, which are of one bucket: a `Batch`, or what the data set makes."""
        ...


@runtime_checkable
class PackedDataset(BatchDataset[Made], Protocol[Made]):
    """A data set that says itself which samples of a step go together, in as many micro batches as they need.

    `plan` gives, for each rank and each of its micro
    batches, the arguments of `batch`: alike whoever asks, and as many micro batches for every rank.
    """

    sets: Sequence[tuple[int, float]]

    def plan(self, picks: Sequence[Pick], dp_size: int) -> Sequence[Sequence[tuple[Any, ...]]]: ...
