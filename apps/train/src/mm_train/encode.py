"""Clips to features: the same for extraction and for training straight from videos, so both give the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_data import Clip, Geometry, Selection
from mm_models.diffusion.objective import Pixels
from mm_models.families import family_of
from mm_models.family import AskedTiling, Task
from mm_train.ranks import say


class Encoders:
    """The encoders of a model for one task. `identity` changes with whatever decides the features of a clip."""

    def __init__(
        self,
        path: Path,
        model: Any,
        task: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        tiling: AskedTiling = None,
    ):
        """Args:
        path: diffusers directory with the folders that the model's family names (`Family.encoders`).
        model: the model's configuration.
        dtype: of the text encoder; the others run in float32.
        tiling: of the VAE; None: what is usual for the family, true: the tiles of training.

        Raises ValueError if they are not what the model was made for.
        """
        family = family_of(model)
        family.video.fit(model, path)
        self.path = path
        self.multiples, self.task = family.video.multiples(model, path), family.task(model, task)
        self.conditioning = family.video.conditioning(model, task)
        self.codec = family.video.codec(path, device=device, tiling=family.video.choose_tiling(tiling, "training"))
        self.folders = family.video.encoders(model)
        sees = "image_encoder" in self.folders
        self.image = family.video.image_encoder(path, device=device) if sees else None
        self.text = family.video.text_encoder(model, path, device=device, dtype=dtype)
        self.parts = [part for part in (self.codec, self.text, self.image) if part is not None]
        # tasks without conditions of their own are trained on the same features
        named = [task] if self.conditioning.stored else []
        self.identity = " ".join([*(part.identity for part in self.parts), *named])

    @cached_property
    def empty_text(self) -> Tensor:
        """The encoding S D of the empty prompt, on the CPU: what text dropout trains on."""
        text = self.text.encode([""])[0].cpu()
        self._check_finite("the empty prompt", {"text": text})
        return text

    def to(self, device: torch.device) -> None:
        """Move all of them, e.g. to the host while the model trains."""
        for part in self.parts:
            part.to(device)

    def fit_geometry(self, geometry: Geometry) -> Geometry:
        """See `fit_geometry`."""
        return fit_geometry(geometry, self.multiples, self.task)

    @torch.no_grad()
    def encode(self, clips: Sequence[Clip]) -> list[dict[str, Tensor]]:
        """Features of clips of one shape, by the names of the cache: latents, a text for each caption, conditions.

        Raises FloatingPointError for NaN and infinity, which nobody would find out before they are trained on.
        """
        video = self._stack([clip["video"] for clip in clips])
        latents = self.codec.encode(video)
        conditions: Sequence[dict[str, Tensor]] = [{} for _ in clips]
        if self.conditioning.stored:
            see = self.image.encode if self.image else None
            conditions = self.conditioning.encode(self._pixels(video, clips), self.codec.encode, see)
        features = [self.conditioning.to_store(*one) for one in zip(latents, conditions, strict=True)]
        for one, clip in zip(features, clips, strict=True):
            one |= {f"text.{i}": text for i, text in enumerate(self.text.encode(list(clip["captions"])))}
            self._check_finite(clip["id"], one)
        return features

    def _check_finite(self, what: str, features: Mapping[str, Tensor]) -> None:
        for name, tensor in features.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{what}: {name} came out as NaN or infinite: look at the weights in {self.path}"
                )

    def _pixels(self, video: Tensor, clips: Sequence[Clip]) -> Pixels:
        """What the clips would be made from: their own first and last frames; source, mask and references if read."""
        pixels = Pixels(tuple(video.shape[2:]), image=video[:, :, 0], last_image=video[:, :, -1])
        if not self.task.reads_control:
            return pixels
        return replace(
            pixels,
            # without a source video all is grey and all of it changes
            video=self._stack([clip.get("source", torch.zeros_like(clip["video"])) for clip in clips]),
            mask=self._stack([clip.get("mask", torch.ones_like(clip["video"][:1])) for clip in clips]),
            references=[[image.to(self.codec.device) for image in clip.get("references", ())] for clip in clips],
        )

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).to(self.codec.device)


def fit_geometry(geometry: Geometry, multiples: tuple[int, int, int], task: Task) -> Geometry:
    """The geometry with strides that leave whole tokens, and as many frames as the task needs. Raises ValueError where
    its size or length does not.

    multiples: frames per latent frame, rows and columns of pixels per token.
    """
    frames, *sides = multiples
    least = max(geometry.least_frames, task.least_frames)
    if geometry.num_frames < task.least_frames:
        raise ValueError(
            f"num_frames={geometry.num_frames}: task {task.name} needs clips of at least {task.least_frames} frames"
        )
    try:
        strides = {"stride": lcm(geometry.stride, *sides), "time_stride": lcm(geometry.time_stride, frames)}
        return replace(geometry, **strides, least_frames=least)
    except ValueError as error:
        raise ValueError(
            f"{error} (the VAE packs {frames} frames after the first; a token takes {'x'.join(map(str, sides))} "
            f"pixels, so sizes are multiples of {lcm(*sides)})"
        ) from None


def tell_short(selection: Selection, task: Task) -> None:
    """Say why a task has left clips out, where it was the task."""
    if task.least_frames > 1 and selection.counts.get("too_short"):
        least = f"task {task.name} needs clips of at least {task.least_frames} frames"
        say(f"{least}: pictures and shorter ones are left out")
