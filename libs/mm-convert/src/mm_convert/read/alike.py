"""Whether what lies in the two folders of a pair of experts is a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm_convert.lora.adapter import Adapter
from mm_convert.read.experts import Pair

if TYPE_CHECKING:
    from mm_convert.read.checkpoint import Checkpoint


def refuse_unlike(pair: Pair, high: Checkpoint | Adapter, low: Checkpoint | Adapter) -> None:
    """Raises ValueError, with the numbers, for two that are not of one kind and architecture."""
    if isinstance(high, Adapter) != isinstance(low, Adapter):
        raise ValueError(mixed(pair))
    if isinstance(high, Adapter) or isinstance(low, Adapter):
        return  # one may stand beside other linears than the other
    if high.family != low.family:
        raise ValueError(f"{pair.high} is a checkpoint of {high.family} and {pair.low} of {low.family}: no pair")
    apart = [field for field in high.config if high.config[field] != low.config.get(field)]
    if apart:
        values = ", ".join(f"{field} {high.config[field]} and {low.config.get(field)}" for field in apart)
        raise ValueError(f"{pair.high} and {pair.low} are no pair: they have {values}")


def mixed(pair: Pair) -> str:
    """What is said of one model and one adapter."""
    return f"of {pair.high} and {pair.low}, one is a whole model and the other a LoRA adapter: no pair"
