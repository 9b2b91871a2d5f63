"""Softmax attention: one op with many backends, and the same over a ring of ranks."""

import torch

from mm_parallel.attention.backends import BACKENDS as BACKENDS
from mm_parallel.attention.backends import PACKED as PACKED
from mm_parallel.attention.backends import Call as Call
from mm_parallel.attention.backends import choose as choose
from mm_parallel.attention.backends import pick as pick
from mm_parallel.attention.backends import refusal as refusal
from mm_parallel.attention.loading import activate as activate
from mm_parallel.attention.op import attention as attention
from mm_parallel.attention.op import core as core
from mm_parallel.attention.ring import ring_attention as ring_attention
from mm_parallel.attention.seam import choose_core as choose_core
from mm_parallel.attention.seam import describe_choice as describe_choice

KEPT = (torch.ops.mm_parallel.attention.default, torch.ops.mm_parallel.ring_attention.default)
"""What "everything but core attention" keeps: ops whose results recompute does not compute (or send) again."""
