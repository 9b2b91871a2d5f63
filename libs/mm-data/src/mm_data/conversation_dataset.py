"""Conversations as a data set: lazily encoded, packed by a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from mm_data.batch import Batch, Pick
from mm_data.conversations import Conversations, Ledger
from mm_data.processing import Cost, Flops, Processing

TooLong = Literal["drop", "refuse", "drop_turns", "shrink"]


DEFAULT_COST = Flops()


class Pack(NamedTuple):
    """A micro-batch as it is planned: the arguments of `ConversationDataset.batch`."""

    picks: tuple[Pick, ...]
    length: int | None = None  # tokens to pad to; None: not padded


class ConversationDataset:
    """Conversations that can be used, in packs. See `build_loader`, which asks `plan`.

    `ids` are those of the usable conversations, `identity` is that of the stream of samples: a resume must find it
    unchanged. The stream does not depend on `max_tokens` where nothing is too long; `identity` does not hold it.
    """

    def __init__(
        self,
        conversations: Conversations,
        processing: Processing,
        *,
        max_tokens: int,
        max_patches: int,
        too_long: TooLong = "drop",
        packing: bool = True,
        pad: bool = False,
        cost: Cost = DEFAULT_COST,
        survey: bool = True,
        survey_file: Path | None = None,
        part: tuple[int, int] = (0, 1),
        exchange: Callable[[object], Sequence[object]] = lambda part: [part],
        ledger: Ledger | None = None,
        decode_timeout: float | None = 120.0,
        threads: int = 8,
        say: Callable[[int, int], None] | None = None,
    ):
        """
        max_tokens, max_patches: of a conversation, and of a pack.
        pad: all packs of a rank's step get one length, as a pipeline needs; the padding is one more segment.
        survey: look at all conversations now; False: at each when it comes, and what is refused then is left out.
        survey_file: where the findings are kept, and taken from if data and processing are the same.
        part, exchange: which of how many parts this process surveys, and how the findings of all are put together:
        given one's own it returns those of all parts, in order (`all_gather_object`).
        ledger: gets what cannot be used.
        decode_timeout: seconds after which a conversation that is not decoded stops the training, by name.
        """
        raise NotImplementedError

    ids: Sequence[str]
    buckets: Sequence[int]
    identity: str
    ledger: Ledger

    def plan(self, picks: Sequence[Pick], dp_size: int) -> list[list[Pack]]:
        """The packs of a step, [rank][micro-batch]: alike on all ranks, and as many for each."""
        raise NotImplementedError

    def batch(self, picks: Sequence[Pick], length: int | None = None) -> Batch:
        """A pack: B = 1. Its tensors are

        input_ids, labels: 1 L; position_ids: 1 3 L; pixel_values: 1 N C; grid_thw: 1 M 3; segments: 1 S+1, from 0 to
        L, where conversations part. `ids` and `epochs` are those of the conversations that are in it: what turns out
        to be broken is left out, and goes into the ledger. L, N and S may be 0.
        """
        raise NotImplementedError
