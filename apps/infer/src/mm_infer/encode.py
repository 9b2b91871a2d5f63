"""The encoders of a pipeline, of which the large ones are in memory only while they encode."""

import gc
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from mm_infer.conditions import conditions, images
from mm_infer.config import Options
from mm_infer.inputs import Given
from mm_models.encoders import ImageEncoder, TextEncoder, VideoVAE
from mm_models.wan import WanConfig


class Encoders:
    """Text, CLIP and VAE of a diffusers directory, for one model. What was encoded is remembered, on the CPU."""

    def __init__(self, path: Path, config: WanConfig, device: torch.device, dtype: torch.dtype, tiling: bool) -> None:
        self.path, self.config = path, config
        self.device, self.dtype, self.tiling = device, dtype, tiling
        self._texts: dict[str, Tensor] = {}  # S D
        self._seen: dict[bytes, Tensor] = {}  # 1 S D, by the hash of the pixels

    @cached_property
    def vae(self) -> VideoVAE:
        """It stays, as it is also what decodes."""
        return VideoVAE(self.path, self.device, torch.float32, tiling=self.tiling)

    def texts(self, prompts: Sequence[str]) -> list[Tensor]:
        """S D each; the text encoder is gone again afterwards."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            encoder = TextEncoder(self.path, self.device, self.dtype, self.config.text_tokens)
            encoded = encoder.encode(new)  # one by one, so that an encoding depends on its prompt alone
            self._texts |= {prompt: text.cpu() for prompt, text in zip(new, encoded, strict=True)}
            del encoder, encoded
            self._free()
        return [self._texts[prompt] for prompt in prompts]

    def see(self, pictures: Sequence[Tensor], crop: bool = False) -> list[Tensor]:
        """1 S D of CLIP for each 1 3 H W in [-1, 1]; CLIP is gone again afterwards."""
        keys = [sha256(one.numpy().tobytes() + str((one.shape, crop)).encode()).digest() for one in pictures]
        new = {key: one for key, one in zip(keys, pictures, strict=True) if key not in self._seen}
        if new:
            encoder = ImageEncoder(self.path, self.device)
            self._seen |= {key: encoder.encode(one, crop).cpu() for key, one in new.items()}
            del encoder
            self._free()
        return [self._seen[key] for key in keys]

    def see_all(self, videos: Sequence[tuple[Given, Options]]) -> None:
        """`see` for several videos, so that CLIP is loaded once."""
        if self.config.image_dim is not None:
            for crop in {options.clip_crop for _, options in videos}:  # one command has one
                self.see([one for given, options in videos for one in images(given, options)], crop)

    def conditions(self, given: Given, options: Options) -> dict[str, Tensor]:
        """On the device; see `mm_infer.conditions`."""
        made = conditions(self.config, given, options, self.vae, self.see)
        return {name: tensor.to(self.device) for name, tensor in made.items()}

    def _free(self) -> None:
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
