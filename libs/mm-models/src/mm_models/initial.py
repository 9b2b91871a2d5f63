"""What is drawn by seed and name, so that all ranks draw the same: first values of parameters, whatever the family."""

from collections.abc import Sequence
from hashlib import blake2b
from math import sqrt

import torch
from torch import Tensor, nn


def generator(seed: int, name: str) -> torch.Generator:
    """A fresh CPU generator that depends on the seed and on the whole name, e.g. of a parameter."""
    key = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(key, "big") >> 1)


def initial_adapter(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The first value of a LoRA matrix, as peft's: A random, B zero. float32, on the CPU."""
    weight = torch.zeros(tuple(shape), device="cpu")
    if ".lora_A." in name:
        nn.init.kaiming_uniform_(weight, a=sqrt(5), generator=generator(seed, name))
    return weight
