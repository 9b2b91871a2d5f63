"""Videos as clips of pixels, by index."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mm_data import random
from mm_data.files import Content, file_stamp, fingerprint, shorten
from mm_data.geometry import Geometry, crop_box
from mm_data.images import read_image
from mm_data.layout import Layout, geometry_of, lay_out
from mm_data.manifest import Control, Sample
from mm_data.transforms import crop_resize, pad_to, to_mask, to_model_range
from mm_data.video import VideoInfo, decoder_identity, read_video


class Clip(TypedDict):
    """One decoded sample."""

    id: str
    video: Tensor  # 3 F H W float32 in [-1, 1]
    captions: tuple[str, ...]
    fps: float  # of the clip, after resampling
    meta: dict  # JSON: where the clip comes from; what `FeatureCache.put` wants
    # of a VACE sample only:
    source: NotRequired[Tensor]  # 3 F H W in [-1, 1]; 0 where the sample has none
    mask: NotRequired[Tensor]  # 1 F H W in 0..1, 1 where pixels change; 1 where the sample has none
    references: NotRequired[list[Tensor]]  # 3 H W in [-1, 1] each, whole and padded with white


@dataclass(frozen=True)
class Failure:
    """A sample that could not be made into a clip."""

    sample: Sample
    reason: str


def describe(error: Exception, sample: Sample) -> str:
    """Why a sample cannot be used, after what went wrong with its files. Raises the error again where that is ours."""
    if isinstance(error, AssertionError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        raise error
    if isinstance(error, ValueError | OSError) and str(error):
        return str(error)
    files = ", ".join(shorten(str(file), 200) for file in sample.files)
    return f"{files}: damaged, or not what it seems ({type(error).__name__}: {shorten(str(error), 500)})"


class VideoDataset(Dataset):
    """Clips, decoded when asked for: `dataset[i]` is a Clip; of a VACE sample with source, mask and references.

    Which frames a random window takes is drawn from `seed` and the content of the file: equal files give equal clips
    under whatever name. With on_error="return" a sample that cannot be used is returned as a Failure; with "raise" it
    raises ValueError. Whatever goes wrong with a file is its own fault, out of whichever library it comes. Decoding is
    work: `decode` shares it out to processes.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        geometry: Geometry,
        seed: int = 0,
        *,
        on_error: Literal["raise", "return"] = "raise",
        backend: Literal["pyav", "decord"] = "pyav",
    ):
        self.samples = list(samples)
        self.geometry = geometry
        self.seed = seed
        self.on_error = on_error
        self.backend = backend
        self._hashed: dict[tuple[str, str], Content] = {}  # by stamp: a file of many cuts is hashed once

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Clip | Failure:
        sample = self.samples[index]
        try:
            return self._decode(sample)
        except Exception as error:
            reason = describe(error, sample)
            if self.on_error == "return":
                return Failure(sample, reason)
            raise ValueError(f"sample {sample.id}: {reason}") from error

    def _decode(self, sample: Sample) -> Clip:
        layout = lay_out(sample, self.geometry)
        contents = sample.contents or tuple(map(self._content, sample.files))
        for content, file in zip(contents, sample.files, strict=True):
            if content.stamp != file_stamp(file):
                raise ValueError(f"{file} was changed while it was in use")
        video, *rest = contents
        name = f"{video.sha256}[{layout.span[0]}:{layout.span[1]}]"
        chosen = layout.choose(
            geometry_of(sample, self.geometry), lambda n: random.integer(n, self.seed, 0, name, "window")
        )
        clip = Clip(
            id=sample.id,
            video=to_model_range(self._pixels(layout.video, chosen, layout.size)),
            captions=sample.captions,
            fps=layout.fps,
            meta={
                "id": sample.id,
                "captions": list(sample.captions),
                "source": list(video.stamp),
                "sha256": video.sha256,
                "frames": chosen.tolist(),
                "decoder": decoder_identity(self.backend),
            },
        )
        if notes := {note for info in (layout.video, *layout.control.values()) for note in info.notes}:
            clip["meta"]["notes"] = sorted(notes)
        if sample.control:
            self._add_control(clip, sample.control, layout, chosen)
            clip["meta"]["control"] = [[*content.stamp, content.sha256] for content in rest]
        return clip

    def _content(self, file: Path) -> Content:
        stamp = file_stamp(file)
        if stamp not in self._hashed:
            self._hashed[stamp] = fingerprint(file)
        return self._hashed[stamp]

    def _add_control(self, clip: Clip, control: Control, layout: Layout, chosen: np.ndarray) -> None:
        source, mask, still = layout.control.get("source"), layout.control.get("mask"), layout.still_mask
        clip["source"] = (
            to_model_range(self._pixels(source, chosen, layout.size)) if source else torch.zeros_like(clip["video"])
        )
        if mask:
            clip["mask"] = to_mask(self._pixels(mask, chosen, layout.size, grey=True))
        elif still is not None:
            fitted = crop_resize(still, crop_box(*still.shape[:2], layout.size), layout.size)
            clip["mask"] = to_mask(np.repeat(fitted[None], len(chosen), axis=0))
        else:
            clip["mask"] = torch.ones_like(clip["video"][:1])
        clip["references"] = [pad_to(read_image(path), layout.size) for path in control.references]

    def _pixels(self, info: VideoInfo, chosen: np.ndarray, size: tuple[int, int], grey: bool = False) -> np.ndarray:
        """F H W C uint8."""
        box = crop_box(info.height, info.width, size, info.pixel_aspect)
        return read_video(
            info, chosen, backend=self.backend, grey=grey, each=lambda frame: crop_resize(frame, box, size)
        ).frames
