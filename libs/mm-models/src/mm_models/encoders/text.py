"""Prompts to embeddings: UMT5 and mT5."""

import html
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mm_models.encoders.loading import identity, load_strictly, load_tokenizer
from mm_models.folder import check_weights, part_of, read_count


def clean(prompt: str) -> str:
    """A prompt as the Wan pipelines clean it: broken unicode mended, HTML entities read, white space collapsed."""
    import ftfy

    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", prompt).strip()


def open_tokenizer(path: Path | str, vocabulary: int | None = None) -> Any:
    """The tokenizer of a diffusers directory. ValueError for one that is damaged or not the text encoder's.

    vocabulary: rows of the embedding where the encoder's config.json does not say it; None: any.
    """
    weights, words = part_of(path, "text_encoder"), part_of(path, "tokenizer")
    return load_tokenizer(words, read_count(weights / "config.json", "vocab_size", vocabulary or sys.maxsize))


class TextEncoder:
    """UMT5 or mT5 from `text_encoder/` and `tokenizer/` of a diffusers directory.

    Args:
        path: the directory.
        max_length: most tokens of a prompt, with the end mark.
        kind: "umt5" has position biases in every layer, "mt5" in the first alone.
        cleaner: what is done to a prompt first; by default `clean`. Another is part of the encoder's identity.
    """

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_length: int = 512,
        kind: Literal["umt5", "mt5"] = "umt5",
        cleaner: Callable[[str], str] | None = None,
    ) -> None:
        from transformers import MT5EncoderModel, UMT5EncoderModel

        model = {"umt5": UMT5EncoderModel, "mt5": MT5EncoderModel}[kind]
        weights, words = part_of(path, "text_encoder"), part_of(path, "tokenizer")
        self.device, self.max_length, self.clean = torch.device(device), max_length, cleaner or clean
        check_weights(weights)
        self.tokenizer = open_tokenizer(path, model.config_class.vocab_size)
        self.model = load_strictly(model, weights, dtype).to(self.device)
        options = {"dtype": str(dtype), "max_length": max_length}
        if cleaner is not None:
            options["cleaner"] = f"{cleaner.__module__}.{cleaner.__qualname__}"
        self.identity = identity([weights, words], options)

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
            tokens = self.tokenizer(self.clean(prompt)).input_ids
            if len(tokens) > self.max_length:
                warnings.warn(
                    f"a prompt of {len(tokens)} tokens was cut to {self.max_length}: {prompt[:60]!r}…", stacklevel=3
                )
                tokens = self.tokenizer(self.clean(prompt), truncation=True, max_length=self.max_length).input_ids
            encoded.append(self.model(torch.tensor([tokens], device=self.device)).last_hidden_state[0])
        return encoded
