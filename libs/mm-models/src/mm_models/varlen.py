"""Attention of packed samples by CUDA's flash kernel. Its import brings torch's compiler, so it is imported late."""

from inspect import signature
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mm_models.layers import Sequence

SHARED_HEADS = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""How `varlen_attn` is told that k and v may have fewer heads. Releases that cannot be told hand all on to flash, which
takes them.
"""


def attend(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    """All packed samples of all rows in one call, which reads their ends on the device.

    q B L H h, k and v B L K h -> B L H h; see `mm_models.layers.core`.
    """
    rows, ends = q.shape[0], sequence.segments
    longest = max(b - a for a, b in pairwise(ends))
    ends = torch.tensor([0, *(row * sequence.tokens + end for row in range(rows) for end in ends[1:])])
    ends = ends.to(q.device, torch.int32, non_blocking=True)
    window = (-1, 0 if sequence.causal else -1)
    dim, missing = q.shape[-1], -q.shape[-1] % 8  # it wants whole 8s
    flat = ((F.pad(x, (0, missing)) if missing else x).flatten(0, 1).contiguous() for x in (q, k, v))
    out = varlen_attn(*flat, ends, ends, longest, longest, scale=dim**-0.5, window_size=window, **SHARED_HEADS)
    return out.narrow(-1, 0, dim).unflatten(0, (rows, -1))
