"""Clips to features: the same for extraction and for training straight from videos, so both give the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import lcm
from pathlib import Path

import torch
from torch import Tensor

from mm_data import Clip, Geometry
from mm_models.encoders import ImageEncoder, TextEncoder, VideoVAE
from mm_models.wan import WanConfig
from mm_models.wan.conditions import CONDITION, Task, condition_video, encoded_control, stored, with_references


class Encoders:
    """The encoders of a model for one task. `identity` changes with whatever decides the features of a clip."""

    def __init__(
        self,
        path: Path,
        model: WanConfig,
        task: Task,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        tiling: bool = False,
    ):
        """Args:
        path: diffusers directory with vae/, text_encoder/, tokenizer/, and image_encoder/ where the model has CLIP.
        dtype: of the text encoder; the others run in float32.

        Raises ValueError if they are not what the model was made for.
        """
        self.model, self.task = model, task
        self.conditions = stored(model, task)
        self.vae = VideoVAE(path, device=device, tiling=tiling)
        self.image = ImageEncoder(path, device=device) if "image" in self.conditions else None
        self.text = TextEncoder(path, device=device, dtype=dtype)
        parts = [part for part in (self.vae, self.text, self.image) if part is not None]
        # t2v and ti2v are trained on the same features
        self.identity = " ".join([*(part.identity for part in parts), *([task] if self.conditions else [])])
        self._check_fit(path)

    @cached_property
    def empty_text(self) -> Tensor:
        """The encoding S D of the empty prompt, on the CPU: what text dropout trains on."""
        return self.text.encode([""])[0].cpu()

    def to(self, device: torch.device) -> None:
        """Move all of them, e.g. to the host while the model trains."""
        for part in (self.vae, self.text, self.image):
            if part is not None:
                part.to(device)

    def fitted(self, geometry: Geometry) -> Geometry:
        """The geometry with a stride that leaves whole tokens. Raises ValueError where its size or length does not."""
        rows = self.vae.stride[1] * self.model.patch_size[1]
        try:
            return replace(geometry, stride=lcm(geometry.stride, rows))
        except ValueError as error:
            raise ValueError(
                f"{error} (the VAE packs {self.vae.stride[1]}x{self.vae.stride[2]} pixels, and the model takes "
                f"{self.model.patch_size[1]}x{self.model.patch_size[2]} of these: sizes are multiples of {rows})"
            ) from None

    @torch.no_grad()
    def encode(self, clips: Sequence[Clip]) -> list[dict[str, Tensor]]:
        """Features of clips of one shape, by the names of the cache: latents, a text for each caption, conditions."""
        video = self._stacked([clip["video"] for clip in clips])
        features = [{"latents": latents} for latents in self.vae.encode(video)]
        if self.task in CONDITION:
            self._add_images(features, video)
        if "control" in self.conditions:
            self._add_control(features, clips)
        for one, clip in zip(features, clips, strict=True):
            one |= {f"text.{i}": text for i, text in enumerate(self.text.encode(list(clip["captions"])))}
        return features

    def _add_images(self, features: list[dict[str, Tensor]], video: Tensor) -> None:
        """The clip's own first frame, and for flf2v its last, as the images that it is made from."""
        given = [video[:, :, 0], video[:, :, -1]] if self.task == "flf2v" else [video[:, :, 0]]
        conditions = self.vae.encode(condition_video(video.shape[2], *given))
        for one, condition in zip(features, conditions, strict=True):
            one[CONDITION[self.task]] = condition
        if self.image is not None:
            tokens = torch.cat([self.image.encode(images) for images in given], dim=1)
            for one, image in zip(features, tokens, strict=True):
                one["image"] = image

    def _add_control(self, features: list[dict[str, Tensor]], clips: Sequence[Clip]) -> None:
        """VACE's conditions. References are kept clean, before the control and before the latents."""
        # without a source video all is grey and all of it changes
        source = self._stacked([clip.get("source", torch.zeros_like(clip["video"])) for clip in clips])
        mask = self._stacked([clip.get("mask", torch.ones_like(clip["video"][:1])) for clip in clips])
        control, folded = encoded_control(self.vae.encode, source, mask)
        for number, (one, clip) in enumerate(zip(features, clips, strict=True)):
            # one by one: in one video, the VAE would pack four of them into a latent frame
            references = [self.vae.encode(self._stacked([image])[:, :, None]) for image in clip.get("references", ())]
            row = slice(number, number + 1)
            whole, whole_mask = with_references(control[row], folded[row], references)
            one["latents"] = torch.cat([*references, one["latents"][None]], dim=2)[0]
            one["control"] = whole[0]
            one["control_mask"] = (whole_mask[0] * 255).round().byte()

    def _stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).to(self.vae.device)

    def _check_fit(self, path: Path) -> None:
        wanted = {"video channels": self.model.out_channels, "text width": self.model.text_dim}
        found = {"video channels": self.vae.mean.numel(), "text width": self.text.model.config.d_model}
        if self.image is not None:
            wanted["CLIP width"], found["CLIP width"] = self.model.image_dim, self.image.model.config.hidden_size
        wrong = [f"{name} {found[name]} instead of {size}" for name, size in wanted.items() if found[name] != size]
        if wrong:
            raise ValueError(
                f"{path} holds the encoders of another model ({', '.join(wrong)}): give the directory that this model "
                "was published with"
            )
