"""Videos as clips of pixels, by index."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from mm_data import random
from mm_data.files import file_stamp, fingerprint
from mm_data.geometry import Geometry, choose_frames, clip_rate, crop_box, output_size, resample
from mm_data.manifest import Sample
from mm_data.transforms import crop_resize, to_model_range
from mm_data.video import probe, read_video


class Clip(TypedDict):
    """One decoded sample."""

    id: str
    video: Tensor  # 3 F H W float32 in [-1, 1]
    captions: tuple[str, ...]
    fps: float  # of the clip, after resampling
    meta: dict  # JSON: where the clip comes from; what `FeatureCache.put` wants


@dataclass(frozen=True)
class Failure:
    """A sample that could not be made into a clip."""

    sample: Sample
    reason: str


class VideoDataset(Dataset):
    """Clips, decoded when asked for: `dataset[i]` is a Clip.

    Which frames a random window takes is drawn from `seed` and the content of the file, so equal files give equal clips
    under whatever name. With on_error="return" a sample that cannot be used is returned as a Failure; with "raise" it
    raises ValueError. For a DataLoader with worker processes, as decoding is work: give collate_fn=list.
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

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Clip | Failure:
        sample = self.samples[index]
        try:
            return self._decode(sample)
        except (ValueError, OSError, MemoryError) as error:
            if self.on_error == "return":
                return Failure(sample, str(error) or type(error).__name__)
            raise ValueError(f"sample {sample.id}: {error}") from error

    def _decode(self, sample: Sample) -> Clip:
        info = probe(sample.path)
        content = sample.content or fingerprint(sample.path)
        if content.stamp != file_stamp(sample.path):
            raise ValueError(f"{sample.path} was changed while it was in use")
        size = output_size(info.height, info.width, self.geometry, info.pixel_aspect)
        box = crop_box(info.height, info.width, size, info.pixel_aspect)
        first, end = sample.cut or (0, info.num_frames)
        if first >= info.num_frames or end > info.num_frames:
            raise ValueError(f"{sample.path} has {info.num_frames} frames: it cannot be cut to [{first}, {end})")
        shown = info.timestamps[first:end] - info.timestamps[first]
        name = f"{content.sha256}[{first}:{end}]"
        chosen = choose_frames(
            first + resample(shown, self.geometry.fps),
            self.geometry,
            lambda n: random.integer(n, self.seed, 0, name, "window"),
        )
        clip = read_video(info, chosen, backend=self.backend, each=lambda frame: crop_resize(frame, box, size))
        return Clip(
            id=sample.id,
            video=to_model_range(clip.frames),
            captions=sample.captions,
            fps=clip_rate(shown, self.geometry.fps) or info.fps,
            meta={
                "id": sample.id,
                "captions": list(sample.captions),
                "source": list(content.stamp),
                "sha256": content.sha256,
                "frames": chosen.tolist(),
            },
        )
