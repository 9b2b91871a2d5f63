"""The encoders of a pipeline, of which the large ones are in memory only while they encode."""

import gc
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from mm_infer.config import Options
from mm_infer.inputs import Given, frames_at_ends, to_pixels
from mm_infer.weights import Facts
from mm_models.diffusion.objective import Conditioning
from mm_models.encoders import Codec
from mm_models.family import AskedTiling


class Encoders:
    """The encoders of one model, in a diffusers directory. What was encoded is remembered, on the CPU."""

    def __init__(self, facts: Facts, device: torch.device, dtype: torch.dtype, tiling: AskedTiling) -> None:
        self.family, self.config, self.path = facts.family, facts.config, facts.repository
        self.device, self.dtype = device, dtype
        self.tiling = self.family.video.choose_tiling(tiling, "inference")
        self._texts: dict[str, Tensor] = {}  # S D
        self._seen: dict[bytes, Tensor] = {}  # 1 S D, by the hash of the pixels

    @cached_property
    def codec(self) -> Codec:
        """It stays, as it is also what decodes."""
        return self.family.video.codec(self.path, device=self.device, dtype=torch.float32, tiling=self.tiling)

    def texts(self, prompts: Sequence[str]) -> list[Tensor]:
        """S D each; the text encoder is gone again afterwards."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            encoder = self.family.video.text_encoder(self.config, self.path, device=self.device, dtype=self.dtype)
            encoded = encoder.encode(new)  # one by one, so that an encoding depends on its prompt alone
            self._texts |= {prompt: text.cpu() for prompt, text in zip(new, encoded, strict=True)}
            del encoder, encoded
            self._free()
        return [self._texts[prompt] for prompt in prompts]

    def see(self, images: Sequence[Tensor], crop: bool = False) -> list[Tensor]:
        """1 S D of the image encoder for each 1 3 H W in [-1, 1]; it is gone again afterwards."""
        keys = [sha256(one.numpy().tobytes() + str((one.shape, crop)).encode()).digest() for one in images]
        new = {key: one for key, one in zip(keys, images, strict=True) if key not in self._seen}
        if new:
            encoder = self.family.video.image_encoder(self.path, device=self.device)
            self._seen |= {key: encoder.encode(one, crop).cpu() for key, one in new.items()}
            del encoder
            self._free()
        return [self._seen[key] for key in keys]

    def see_all(self, videos: Sequence[tuple[Given, Options]]) -> None:
        """`see` for several videos, so that the image encoder is loaded once; nothing for models that have none."""
        if "image_encoder" in self.family.video.encoders(self.config):
            for crop in {options.clip_crop for _, options in videos}:  # one command has one
                ends = (frames_at_ends(given, options) for given, options in videos)
                self.see([image for pair in ends for image in pair if image is not None], crop)

    def conditions(self, conditioning: Conditioning, given: Given, options: Options) -> dict[str, Tensor]:
        """What one video is made from, as the model is told it: with a batch dim of 1, on the device."""

        def see(images: Tensor) -> Tensor:
            return self.see([images], options.clip_crop)[0]

        (made,) = conditioning.encode(to_pixels(given, options), self.codec.encode, see)
        return {name: tensor[None].to(self.device) for name, tensor in made.items()}

    def _free(self) -> None:
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
