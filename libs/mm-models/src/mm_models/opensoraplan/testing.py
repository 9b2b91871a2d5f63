"""A tiny VAE, text encoder and tokenizer with random weights, in the real classes and files: to test with, here and
elsewhere.
"""

from pathlib import Path
from typing import Any

import torch

from mm_models.opensoraplan.testing_vae import write_vae
from mm_models.testing import byte_tokenizer


def tiny_encoders(text_dim: int = 64, seed: int = 0) -> dict[str, Any]:
    """`tokenizer`, and `text_encoder`, an mT5 that is text_dim wide."""
    from transformers import MT5Config, MT5EncoderModel

    torch.manual_seed(seed)
    text = MT5Config(vocab_size=259, d_model=text_dim, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    return {"tokenizer": byte_tokenizer(), "text_encoder": MT5EncoderModel(text).eval()}


def write_encoders(path: Path | str, text_dim: int = 64, seed: int = 0) -> Path:
    """The same, and a VAE of 4 channels, as a diffusers directory: vae/, text_encoder/, tokenizer/."""
    for name, part in tiny_encoders(text_dim, seed).items():
        part.save_pretrained(Path(path) / name)
    write_vae(Path(path) / "vae", seed=seed)
    return Path(path)
