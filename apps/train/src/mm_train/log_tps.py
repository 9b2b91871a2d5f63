"""How many tokens a second were trained, counted as MindSpeed-MM's --log-tps does: to compare with its tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mm_data import Batch

MULTIPLE = 8  # to which it pads a conversation
FIRST, LAST = 51, 150  # the steps that its scripts take the mean of


class LogTps:
    """Times and lengths of steps. It counts a conversation with the padding that it would get there.

    There every micro-batch is one conversation, padded to a multiple of 8, and the padding counts as tokens. (To one
    without images it adds a white one, of a few tokens; these are not counted here.)
    """

    def __init__(self, global_batch: int):
        self.global_batch = global_batch
        self.steps: list[tuple[float, float]] = []  # seconds, tokens of all conversations

    @staticmethod
    def count(micro: Sequence[Batch]) -> float:
        """Tokens of this rank's conversations."""
        bounds = [batch.tensors["segments"][0].tolist() for batch in micro]
        lengths = [stop - start for some in bounds for start, stop in pairwise(some)]
        return float(sum(-(-length // MULTIPLE) * MULTIPLE for length in lengths))

    def add(self, seconds: float, tokens: float) -> None:
        """A step; tokens of all ranks."""
        self.steps.append((seconds, tokens))

    def summarize(self) -> str:
        """What its scripts print at the end, and over which steps."""
        steps, first = (self.steps[FIRST - 1 : LAST], FIRST) if len(self.steps) >= FIRST else (self.steps[1:], 2)
        if not steps:
            return "--log_tps: nothing to say of a single step, which makes more than it trains"
        seconds, tokens = (sum(column) / len(steps) for column in zip(*steps, strict=True))
        samples = self.global_batch / seconds
        per_sample = tokens / self.global_batch
        return "\n".join(
            (
                f"in MindSpeed-MM's way of counting (--log-tps), steps {first} to {first + len(steps) - 1} from here:",
                f"Elapsed Time Per iteration: {1000 * seconds:.1f}, Average Samples per Second: {samples:.3f}",
                f"tokens per sample: {per_sample:.6E}",
                f"Consumed Tokens per Second: {samples * per_sample:.3f}",
            )
        )
