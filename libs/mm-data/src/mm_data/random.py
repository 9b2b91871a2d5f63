"""Draws that depend on what is drawn, never on who draws it.

Every random choice is a function of (seed, epoch, sample id, purpose): not of rank, worker, world size or the order of
calls. So a resumed run, or one on other hardware, makes the same choices. The tuple is hashed with blake2b; nothing
here keeps state.
"""

import hashlib
import json

import numpy as np
import torch


def _bits(*key: int | str) -> int:
    """128 bits that depend on every part of `key`; JSON keeps ("a", "bc") apart from ("ab", "c")."""
    return int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest(), "little")


def generator(seed: int, epoch: int, sample_id: str, purpose: str) -> torch.Generator:
    """A fresh CPU generator for one purpose of one sample, e.g. its noise."""
    return torch.Generator().manual_seed(_bits(seed, epoch, sample_id, purpose) >> 65)  # 63 bits: torch takes an int64


def uniform(seed: int, epoch: int, sample_id: str, purpose: str) -> float:
    """A float in [0, 1)."""
    return (_bits(seed, epoch, sample_id, purpose) >> 75) / 2**53


def integer(n: int, seed: int, epoch: int, sample_id: str, purpose: str) -> int:
    """An integer in [0, n); the bias of the modulus is below n / 2**128."""
    if n < 1:
        raise ValueError(f"cannot draw an integer below {n}: n must be at least 1")
    return _bits(seed, epoch, sample_id, purpose) % n


def permutation(n: int, seed: int, epoch: int, purpose: str) -> np.ndarray:
    """A permutation of range(n) as int64.

    Sorting raw Philox words, rather than numpy's or torch's own shuffle, because only the raw stream is promised to
    stay the same across releases.
    """
    return np.argsort(np.random.Philox(key=_bits(seed, epoch, purpose)).random_raw(n), kind="stable")
