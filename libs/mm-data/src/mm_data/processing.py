"""What makes tokens and pixels of conversations: the seam between files, which this library knows, and models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from mm_data.conversations import Conversation


class Size(NamedTuple):
    """What a conversation takes of a micro-batch."""

    tokens: int  # of text and of media
    patches: int  # of all its pictures and videos, as the vision tower reads them
    label_tokens: int | None = None  # tokens that are trained; None where that was not counted
    squares: int = 0  # the sum, over pictures and pairs of video frames, of (patches of one) ** 2


@dataclass(frozen=True)
class Encoded:
    """One conversation as tensors on the CPU. L tokens, N patches, M pictures and videos."""

    input_ids: Tensor  # L int64
    labels: Tensor  # L int64: labels[i] is what position i must predict, i.e. token i + 1; -100 where nothing
    position_ids: Tensor  # 3 L int64, beginning at 0
    pixel_values: Tensor  # N C float32, in the order of their tokens; 0 rows where there are none
    grid_thw: Tensor  # M 3 int64: patches in time, height and width


class Processing(Protocol):
    """The processing of one model. Its methods are called from several threads at once.

    All of them raise `Unusable` for a conversation that cannot be used, e.g. where a picture is missing or broken.
    """

    identity: str
    """Changes whenever the same conversation comes to give other tensors."""

    def measure(self, conversation: Conversation) -> Size:
        """What `encode` will take, from texts and the headers of files alone; `Media.max_pixels` counts."""
        ...

    def encode(self, conversation: Conversation) -> Encoded:
        """Its tensors. Decodes its media."""
        ...


Cost = Callable[[Size], float]
"""What a conversation costs in a forward and backward pass, in any unit."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of a conversation in a forward and backward pass: a `Cost`.

    The defaults are those of a language model of 3 billion parameters with a vision tower of 0.6 billion, all trained.
    """

    token: float = 1.9e10
    token_pair: float = 9e5  # of causal attention: tokens ** 2 / 2 pairs
    patch: float = 3.9e9
    patch_pair: float = 6.2e4  # of full attention within a picture or a pair of frames

    def __call__(self, size: Size) -> float:
        return (
            self.token * size.tokens
            + self.token_pair * (size.tokens * size.tokens / 2)
            + self.patch * size.patches
            + self.patch_pair * size.squares
        )
