"""The validation set of a run on conversations."""

from __future__ import annotations

from typing import NamedTuple

from mm_data import Pick
from mm_data.conversation_dataset import ConversationDataset, Pack
from mm_models.processors import Processing
from mm_train.config import Config
from mm_train.conversations import Refusals, describe_refused, open_conversations, open_processing


class HeldOut(NamedTuple):
    """Conversations that are not trained, by the same processing as those that are."""

    data: ConversationDataset
    processing: Processing
    refusals: Refusals
    """Of those that turn out to be broken when they are measured."""

    def packs(self, most: int) -> list[Pack]:
        """The first `most` of them, for one rank. ValueError where none of these can be used."""
        picks = [Pick(i, 0) for i in range(min(len(self.data.ids), most))]
        packs = self.data.plan(picks, 1)[0]
        if not any(pack.picks for pack in packs):
            self.refusals.tell()
            raise ValueError(
                f"--validation.conversations: not one of the first {len(picks)} can be used, "
                f"{describe_refused(self.data.ledger)}: mend them, or raise --validation.max_samples"
            )
        return packs


def open_held_out(config: Config) -> HeldOut | None:
    """What --validation.conversations names. ValueError where none of it can be used."""
    listed, flag = config.validation.conversations, "--validation.conversations"
    if not listed:
        return None
    processing = open_processing(config)
    data = open_conversations(config, listed, flag, processing, "validation-", pad=False)
    return HeldOut(data, processing, Refusals(data.ledger, config.run_dir / "validation-failures.jsonl"))
