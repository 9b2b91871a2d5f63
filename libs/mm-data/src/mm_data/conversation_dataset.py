"""Conversations as a data set: encoded when their turn comes, in packs that a plan makes of each step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch

from mm_data.batch import Batch, Pick
from mm_data.conversations import Conversation, Conversations, Ledger, Turn, Unusable
from mm_data.files import shorten
from mm_data.identity import identify_files
from mm_data.lengths import Limits, TooLong
from mm_data.packing import plan
from mm_data.processing import Cost, Encoded, Flops, Processing
from mm_data.sizes import REFUSED, UNKNOWN, Exchange, Sizes, alone

DEFAULT_COST = Flops()
IGNORED = -100  # a label that is not trained


class Pack(NamedTuple):
    """A micro-batch as it is planned: the arguments of `ConversationDataset.batch`."""

    picks: tuple[Pick, ...]
    length: int | None = None  # tokens to pad to; None: not padded


class ConversationDataset:
    """Conversations in packs. `build_loader` asks `plan` for those of a step, and `batch` for each of its rank's.

    `ids` are those of the conversations that can be used: after a survey the others are in `ledger`. Without a survey
    all are in, and what cannot be used is left out of its step when its turn comes, by all ranks alike; then it is in
    the ledger. Either way a picture may turn out to be broken when it is decoded. Only the rank that decodes it knows:
    its pack is then smaller, perhaps empty, and all else is as planned. Nothing is ever put in the place of a
    conversation.

    Which conversations a step takes does not depend on `max_tokens`, `max_patches` and packing, only which of them can
    be used. `identity` is that of the stream: where it is unchanged, a resume goes on with the same conversations.
    (Without a survey it is that of the files alone, and what becomes of those that are too long is as the limits say.)
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
        exchange: Exchange = alone,
        ledger: Ledger | None = None,
        decode_timeout: float | None = 120.0,
        threads: int = 8,
        say: Callable[[int, int], None] | None = None,
    ):
        """
        max_tokens, max_patches: of a conversation, and of a pack. too_long: see `Limits`.
        packing: False gives every conversation a micro-batch of its own.
        pad: all packs of a rank's step get one length, as a pipeline needs.
        cost: by what ranks are balanced.
        survey: find all sizes now, from texts and headers; see `Sizes.survey` for `survey_file`, `part`, `exchange`,
        `threads` and `say`. False: find each when its turn comes.
        ledger: gets what cannot be used.
        decode_timeout: seconds after which a conversation that is not yet decoded stops the training, by name.

        Raises ValueError where too_long is "refuse" and a conversation is.
        """
        self.conversations, self.processing = conversations, processing
        self.limits = Limits(max_tokens, max_patches, too_long)
        self.packing, self.pad, self.cost = packing, pad, cost
        self.ledger = Ledger() if ledger is None else ledger
        self.decode_timeout, self.threads = decode_timeout, threads
        self.survey_file = survey_file if survey else None
        self.sizes = Sizes(conversations, processing, self.limits)
        if survey:
            refused = self.sizes.survey(file=survey_file, part=part, exchange=exchange, threads=threads, say=say)
            self._refuse(sorted(refused.items()))
        self.usable = self.sizes.usable if survey else np.arange(len(conversations))
        self._changed = np.flatnonzero(self.sizes.changed)  # before training looks for more
        self.ids: Sequence[str] = _Chosen(conversations.ids, self.usable)
        self.buckets: Sequence[int] = [0] * len(self.usable)
        self.sets = []
        for source, span in zip(conversations.sources, conversations.spans, strict=True):
            first, end = np.searchsorted(self.usable, (span.start, span.stop)).tolist()
            if end > first:
                self.sets.append((end - first, source.weight))

    def __len__(self) -> int:
        return len(self.usable)

    @cached_property
    def identity(self) -> str:
        """Changes when conversations or weights do; where a survey made some fit, when the limits do."""
        files = identify_files({str(source.path): Path(source.path) for source in self.conversations.sources})
        parts = [list(files.values()), self.sets, asdict(self.limits) if len(self._changed) else None]
        digest = hashlib.sha256(json.dumps(parts).encode())
        for indices in (self.usable, self._changed):
            digest.update(np.ascontiguousarray(indices, np.int64).tobytes())
        return digest.hexdigest()

    @property
    def notes(self) -> list[str]:
        """What a person should know before the first step, besides the ledger: how many were made to fit."""
        how = {"drop_turns": "their oldest questions are left out", "shrink": "their pictures are made smaller"}
        if not len(self._changed):
            return []
        return [
            f"{len(self._changed):,} of {len(self):,} conversations are too long for {self.limits.max_tokens:,} tokens "
            f"and {self.limits.max_patches:,} patches: {how[self.limits.too_long]}"
        ]

    def plan(self, picks: Sequence[Pick], dp_size: int) -> list[list[Pack]]:
        """The packs of a step, [rank][micro-batch]: alike whoever asks, and as many for each rank; see `packing.plan`.

        Without a survey, the sizes of these conversations are found first.
        """
        indices = [int(self.usable[pick.index]) for pick in picks]
        unknown = sorted({index for index in indices if self.sizes.tokens[index] == UNKNOWN})
        if unknown:
            self._refuse(list(self.sizes.look(unknown, self.threads)))
        kept = [i for i, index in enumerate(indices) if self.sizes.tokens[index] != REFUSED]
        sizes = [self.sizes[indices[i]] for i in kept]
        dealt = plan(sizes, dp_size, self.limits.max_tokens, self.limits.max_patches, self.cost, packing=self.packing)
        return [
            [Pack(tuple(picks[kept[i]] for i in pack), self._length(packs, sizes)) for pack in packs] for packs in dealt
        ]

    def batch(self, picks: Sequence[Pick], length: int | None = None) -> Batch:
        """A pack: B = 1. Its tensors are

        - input_ids, labels: 1 L int64; labels[i] is what position i must predict, -100 where nothing
        - position_ids: 1 3 L int64
        - pixel_values: 1 N C float32; grid_thw: 1 M 3 int64: of all pictures and videos, in the order of their tokens
        - segments: 1 S+1 int64: where its S conversations part, from 0 to the end of the last; padding follows

        `ids` and `epochs` are those of the conversations that are in it. L, N and S may be 0.

        Raises ValueError, naming the conversation, where decoding takes too long, or gives another size than its
        header did.
        """
        found = [(pick, self._encode(int(self.usable[pick.index]))) for pick in picks]
        packed = [(pick, encoded) for pick, encoded in found if encoded is not None]
        parts = [encoded for _, encoded in packed]
        lengths = [len(encoded.input_ids) for encoded in parts]
        if length is not None and sum(lengths) < length:
            parts.append(_padding(self._nothing, length - sum(lengths)))
        parts = parts or [_padding(self._nothing, 0)]
        return Batch(
            tensors={
                "input_ids": torch.cat([one.input_ids for one in parts])[None],
                "labels": torch.cat([one.labels for one in parts])[None],
                "position_ids": torch.cat([one.position_ids for one in parts], dim=1)[None],
                "pixel_values": torch.cat([one.pixel_values for one in parts])[None],
                "grid_thw": torch.cat([one.grid_thw for one in parts])[None],
                "segments": torch.tensor([[0, *np.cumsum(lengths, dtype=np.int64).tolist()]]),
            },
            ids=[self.ids[pick.index] for pick, _ in packed],
            epochs=[pick.epoch for pick, _ in packed],
        )

    def conversation(self, index: int) -> Conversation:
        """One of them, made to fit where it was too long. Raises Unusable."""
        return self._fitted(int(self.usable[index]))

    def _fitted(self, index: int) -> Conversation:
        as_it_is = self.sizes.tokens[index] >= 0 and not self.sizes.changed[index]
        return self.conversations[index] if as_it_is else self.sizes.fit(index).conversation

    def _refuse(self, refused: Sequence[tuple[int, Unusable]]) -> None:
        for index, error in refused:
            self.ledger.add(self.conversations.ids[index], error)
        too_long = [(index, error) for index, error in refused if error.reason == "too_long"]
        if too_long and self.limits.too_long == "refuse":
            first = "; ".join(f"{self.conversations.ids[index]} {error.text}" for index, error in too_long[:3])
            are = "conversations are" if len(too_long) > 1 else "conversation is"
            more = f", and {len(too_long) - 3:,} more" if len(too_long) > 3 else ""
            raise ValueError(
                f"{len(too_long):,} {are} too long: {first}{more}. Raise max_tokens or max_patches, or choose "
                "too_long: drop, drop_turns or shrink"
            )

    def _length(self, packs: Sequence[Sequence[int]], sizes: Sequence) -> int | None:
        return max(sum(sizes[i].tokens for i in pack) for pack in packs) if self.pad else None

    def _encode(self, index: int) -> Encoded | None:
        """None for what cannot be used after all.

        The sizes are not told: other ranks do not know it, and must plan alike when this conversation comes again.
        """
        is_known = self.sizes.tokens[index] >= 0
        try:
            conversation = self._fitted(index)
            encoded = self._decode(conversation)
        except Unusable as error:
            self._refuse([(index, error)])
            return None
        planned = int(self.sizes.tokens[index]), int(self.sizes.patches[index])
        found = len(encoded.input_ids), len(encoded.pixel_values)
        if is_known and found != planned:
            kept = f". If it was changed before this run, delete {self.survey_file}, so that all are looked at again"
            raise ValueError(
                f"{conversation.id} was changed while it was in use: it had {planned[0]:,} tokens and {planned[1]:,} "
                f"patches, now {found[0]:,} and {found[1]:,}{kept if self.survey_file else ''}"
            )
        return encoded

    def _decode(self, conversation: Conversation) -> Encoded:
        """In a thread of its own, which nobody waits for after `decode_timeout`."""
        if self.decode_timeout is None or not conversation.media:
            return self.processing.encode(conversation)
        result: Future[Encoded] = Future()

        def work() -> None:
            try:
                result.set_result(self.processing.encode(conversation))
            except BaseException as error:
                result.set_exception(error)

        Thread(target=work, name="mm_data decode", daemon=True).start()
        try:
            return result.result(self.decode_timeout)
        except TimeoutError:
            if result.done():  # it was raised by the processing
                raise
            files = ", ".join(shorten(media.path, 200) for media in conversation.media)
            raise ValueError(
                f"{conversation.id} is not decoded after {self.decode_timeout:g} seconds: {files}. Is the disk busy or "
                "gone? Raise decode_timeout, or take it out of the list"
            ) from None

    @cached_property
    def _nothing(self) -> Encoded:
        """A text, of which the padding is made, and the width of pixels is known."""
        return self.processing.encode(Conversation("", (Turn("user", ("?",)), Turn("assistant", (".",)))))


def _padding(text: Encoded, tokens: int) -> Encoded:
    """Repeats the first token of a text, which is of no picture."""
    return Encoded(
        input_ids=text.input_ids[:1].expand(tokens),
        labels=text.labels.new_full((tokens,), IGNORED),
        position_ids=torch.arange(tokens).expand(3, tokens),
        pixel_values=text.pixel_values[:0],
        grid_thw=text.grid_thw[:0],
    )


class _Chosen(Sequence[str]):
    """Some of many ids, which are made when they are asked for."""

    def __init__(self, ids: Sequence[str], indices: np.ndarray):
        self.all, self.indices = ids, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> str:
        return self.all[int(self.indices[index])]
