"""Low-rank adapters (LoRA): read from any of the formats in use, written in any, merged into their base.

W becomes W + alpha/rank · B A, with A (rank x in) and B (out x rank). No change of format touches the bytes of A and B.
"""

from __future__ import annotations

from mm_convert.lora.adapter import Adapter, LowRank, read_lora
from mm_convert.lora.merging import merge
from mm_convert.lora.names import is_lora
from mm_convert.lora.writing import FILES, lora_tensors

__all__ = ["FILES", "Adapter", "LowRank", "is_lora", "lora_tensors", "merge", "read_lora"]
