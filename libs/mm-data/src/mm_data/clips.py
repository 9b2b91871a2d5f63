"""Raw clips, by index: what training reads when it encodes as it goes.

The same samples in the same order, the same frames and captions as from a feature cache extracted from the same list.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

from mm_data.batch import Pick
from mm_data.captions import OWN, Captions
from mm_data.datasets import Clip, VideoDataset, describe
from mm_data.geometry import Geometry
from mm_data.images import read_image
from mm_data.layout import lay_out
from mm_data.manifest import Sample, list_files
from mm_data.sets import portions_of, weights_of


class ClipShape(NamedTuple):
    """Frames, height and width of a clip in pixels, and how many reference pictures go with it."""

    frames: int
    height: int
    width: int
    references: int


@dataclass(frozen=True)
class ClipBatch:
    """A micro batch to be encoded. Its latents have one shape; the clips need not, as references count as frames."""

    clips: list[Clip]
    captions: list[str]  # the one to show of each clip's; empty where it was dropped
    ids: list[str]
    epochs: list[int]


def survey(
    samples: Sequence[Sample],
    geometry: Geometry,
    *,
    threads: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[ClipShape | str]:
    """The shape of every sample's clip, or the reason why it has none.

    An extraction would find the same, but for damage in the middle of a video: videos are not decoded here. The files
    are asked, not the annotations, `threads` at a time. `progress` is called with the number of samples done.
    """

    def look(sample: Sample) -> ClipShape | str:
        try:
            layout = lay_out(sample, geometry)
            references = sample.control.references if sample.control else ()
            for reference in references:
                read_image(reference)
        except Exception as error:
            return describe(error, sample)
        return ClipShape(layout.length, *layout.size, len(references))

    found = []
    with ThreadPoolExecutor(threads) as pool:
        for shape in pool.map(look, samples):
            found.append(shape)
            if progress:
                progress(len(found))
    return found


class ClipDataset:
    """Stands in for a `FeatureDataset`: `build_loader` gives the same stream of samples, as `ClipBatch`es.

    `ids`, and `buckets` (the shapes of the latents), list the usable samples in the order given; `unusable` has the
    others, each with its reason. `latent_shape(frames, height, width)` is the shape C F H W that the encoder makes of a
    clip; a reference picture adds one latent frame. `portions` says how often samples are shown, as their sets say, of
    which the usable samples count. `captions` says which caption a batch shows. `path` names the list
    in messages. `found` is what `survey` gave for these samples and this geometry, where processes shared that work.

    Raises ValueError where no sample can be used, or one has no caption to show; and, naming the sample, when the
    stream comes to a video that is damaged. (An extraction would have left it out.)
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        geometry: Geometry,
        seed: int = 0,
        *,
        latent_shape: Callable[[int, int, int], tuple[int, ...]],
        path: str | Path,
        captions: Captions = OWN,
        found: Sequence[ClipShape | str] | None = None,
        threads: int = 8,
        progress: Callable[[int], None] | None = None,
        backend: Literal["pyav", "decord"] = "pyav",
    ):
        self.path = Path(path)
        self.captions = captions
        found = survey(samples, geometry, threads=threads, progress=progress) if found is None else found
        pairs = list(zip(samples, found, strict=True))
        self.unusable = [(sample, reason) for sample, reason in pairs if isinstance(reason, str)]
        usable = [(sample, shape) for sample, shape in pairs if not isinstance(shape, str)]
        if not usable:
            reason = f", e.g. {self.unusable[0][0].id}: {self.unusable[0][1]}" if self.unusable else ""
            raise ValueError(f"{self.path}: none of its {len(pairs)} samples can be used{reason}")
        self.videos = VideoDataset([sample for sample, _ in usable], geometry, seed, backend=backend)
        self.ids = [sample.id for sample, _ in usable]
        captions.check(self.path, self.ids, [len(sample.captions) for sample, _ in usable], has_empty_text=True)
        self.portions = portions_of(sample.set for sample, _ in usable)
        self.clip_shapes = [shape for _, shape in usable]
        self.buckets = []
        for frames, height, width, references in self.clip_shapes:
            channels, latent_frames, *size = latent_shape(frames, height, width)
            self.buckets.append((channels, latent_frames + references, *size))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sets(self) -> list[tuple[int, Fraction]]:
        """As `mm_data.order` takes them."""
        return weights_of(self.portions)

    @property
    def files(self) -> dict[str, Path]:
        """What samples are read from, by path: the list, or those of a folder, and every video, mask and picture."""
        return {
            str(file): file
            for file in (*list_files(self.path), *(f for sample in self.videos.samples for f in sample.files))
        }

    @property
    def all_captions(self) -> list[tuple[str, ...]]:
        """Of every sample."""
        return [sample.captions for sample in self.videos.samples]

    def __getitem__(self, index: int) -> Clip:
        clip = self.videos[index]
        shape = ClipShape(*clip["video"].shape[1:], len(clip.get("references", ())))
        if shape != self.clip_shapes[index]:
            raise ValueError(
                f"sample {self.ids[index]} was changed while it was in use: it gave a clip of "
                f"{self.clip_shapes[index]}, now of {shape}"
            )
        return clip

    def batch(self, picks: Sequence[Pick]) -> ClipBatch:
        clips = [self[pick.index] for pick in picks]
        return ClipBatch(
            clips=clips,
            captions=[self._caption(clip, pick.epoch) for clip, pick in zip(clips, picks, strict=True)],
            ids=[clip["id"] for clip in clips],
            epochs=[pick.epoch for pick in picks],
        )

    def _caption(self, clip: Clip, epoch: int) -> str:
        chosen = self.captions.choose(len(clip["captions"]), epoch, clip["id"])
        return "" if chosen is None else clip["captions"][chosen]
