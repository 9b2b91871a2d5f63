"""Which caption of a sample is shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_data import random


@dataclass(frozen=True)
class Captions:
    """In every epoch a sample shows one of its captions, or with probability `dropout` the empty prompt.

    The draw belongs to (`seed`, epoch, sample id). With `first`, nothing is drawn: it is always the first caption, as
    validation wants it. Raises ValueError for a dropout that is no probability.
    """

    seed: int = 0
    dropout: float = 0.0
    first: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"text dropout {self.dropout} must be a probability, 0 to 1")

    def check(self, path: Path, ids: Sequence[str], counts: Sequence[int], has_empty_text: bool) -> None:
        """Raise ValueError where the samples of `path`, with `counts` captions each, lack what may be drawn."""
        if self.dropout and not has_empty_text:
            raise ValueError(
                f"text dropout {self.dropout} needs the encoding of the empty prompt, which {path} does not hold: use "
                "text dropout 0, or extract again"
            )
        if self.dropout < 1 and 0 in counts:
            raise ValueError(f"{path}: sample {ids[counts.index(0)]} has no caption")

    def choose(self, count: int, epoch: int, sample_id: str) -> int | None:
        """The number of the caption to show, of `count`; None for the empty prompt."""
        if self.first:
            return 0
        draw = (self.seed, epoch, sample_id)
        if random.uniform(*draw, "caption_drop") < self.dropout:
            return None
        return random.integer(count, *draw, "caption")


OWN = Captions()  # the default: always one of its own
