"""Prompts to embeddings: UMT5."""

import html
import re
import warnings
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mm_models.encoders.loading import identity, load_strictly, load_tokenizer
from mm_models.folder import check_weights, part_of, read_count


class TextEncoder:
    """UMT5 from `text_encoder/` and `tokenizer/` of a diffusers directory."""

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_length: int = 512,
    ) -> None:
        from transformers import UMT5Config, UMT5EncoderModel

        weights, words = part_of(path, "text_encoder"), part_of(path, "tokenizer")
        self.device, self.max_length = torch.device(device), max_length
        check_weights(weights)
        vocabulary = read_count(weights / "config.json", "vocab_size", UMT5Config.vocab_size)
        self.tokenizer = load_tokenizer(words, vocabulary)
        self.model = load_strictly(UMT5EncoderModel, weights, dtype).to(self.device)
        self.identity = identity([weights, words], {"dtype": str(dtype), "max_length": max_length})

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights to a device, and what is encoded from then on is made there. Returns itself."""
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One tensor S D per prompt, S its true number of tokens with the end mark.

        Prompts go through one by one, without padding: so an encoding depends on its prompt alone, to the last bit. A
        prompt of more than `max_length` tokens is cut, with a warning.
        """
        encoded = []
        for prompt in prompts:
            tokens = self.tokenizer(clean(prompt)).input_ids
            if len(tokens) > self.max_length:
                warnings.warn(
                    f"a prompt of {len(tokens)} tokens was cut to {self.max_length}: {prompt[:60]!r}…", stacklevel=3
                )
                tokens = self.tokenizer(clean(prompt), truncation=True, max_length=self.max_length).input_ids
            encoded.append(self.model(torch.tensor([tokens], device=self.device)).last_hidden_state[0])
        return encoded


def clean(prompt: str) -> str:
    """A prompt as the Wan pipelines clean it: broken unicode mended, HTML entities read, white space collapsed."""
    import ftfy

    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", prompt).strip()
