"""A tiny VAE, text encoder and tokenizer with random weights, in the real classes and files: to test with, here and
elsewhere.
"""

from pathlib import Path
from typing import Any

import torch


def tiny_encoders(text_dim: int = 32, seed: int = 0) -> dict[str, Any]:
    """`tokenizer`, `text_encoder` (text_dim wide) and `vae` (16 channels, 4x8x8) of a Wan2.1 pipeline."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    text = UMT5Config(vocab_size=259, d_model=text_dim, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    return {"tokenizer": byte_tokenizer(), "text_encoder": UMT5EncoderModel(text).eval(), "vae": vae.eval()}


def write_encoders(path: Path | str, text_dim: int = 32, seed: int = 0) -> Path:
    """The same as a diffusers directory: vae/, text_encoder/, tokenizer/."""
    for name, part in tiny_encoders(text_dim, seed).items():
        part.save_pretrained(Path(path) / name)
    return Path(path)


def byte_tokenizer():
    """One token per byte and an end mark, so that every prompt has its own ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
