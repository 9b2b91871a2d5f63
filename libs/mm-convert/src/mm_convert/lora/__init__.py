"""Low-rank adapters (LoRA): read from any of the formats in use, written in any, merged into their base.

W becomes W + alpha/rank · B A, with A (rank x in) and B (out x rank). No change of format touches the bytes of A and B.
"""
