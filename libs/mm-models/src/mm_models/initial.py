"""The weights a model starts from when it is not given any: one rule per parameter name, as its authors published.

A parameter depends on (seed, name) alone, so every rank can draw its own part of a model that fits on none of them.
"""

from collections.abc import Sequence
from hashlib import blake2b
from math import sqrt

import torch
from torch import Tensor, nn


def initial(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The starting value of one parameter: float32, on the CPU.

    Linears and the patch embedding are Xavier-uniform, text and time embedding N(0, 0.02), modulation tables
    N(0, 1)/√dim; biases, positions and the last projection are zero, norms one. Adapters start as peft's do: A random,
    B zero.
    """
    key = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "big") >> 1)
    weight = torch.empty(tuple(shape), device="cpu")
    if ".lora_A." in name:
        return nn.init.kaiming_uniform_(weight, a=sqrt(5), generator=generator)
    if name.endswith((".bias", ".emb_pos", "head.head.weight")) or ".lora_B." in name:
        return weight.zero_()
    if name.endswith("modulation"):
        return weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    if weight.ndim == 1:  # the weight of a norm
        return weight.fill_(1)
    if name.startswith(("text_embedding.", "time_embedding.")):
        return weight.normal_(0, 0.02, generator=generator)
    nn.init.xavier_uniform_(weight.flatten(1), generator=generator)
    return weight
