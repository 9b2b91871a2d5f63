"""Which samples of a manifest suit a geometry, judged by what the annotation says; and the report of those that do not.

Nothing is left out in silence: every dropped sample has a reason, and the report counts them.

Differences to MindSpeed-MM: missing files are found here, not in the middle of a run. Short clips are dropped by rule,
not by chance. Shapes with few samples are kept, see `mm_data.order`; there all with fewer than four global batches are
dropped, so that a set of ten clips ends in an obscure error.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mm_data.geometry import Geometry, Unfit, clip_length, output_size
from mm_data.layout import check_control
from mm_data.manifest import Sample


@dataclass(frozen=True)
class Selection:
    """Samples that can be used as far as the annotation tells, and the others, each with its reason."""

    kept: list[Sample]
    dropped: list[tuple[Sample, Unfit]]
    geometry: Geometry

    @property
    def counts(self) -> dict[str, int]:
        """Dropped samples by kind of reason, most frequent first."""
        return dict(Counter(reason.kind for _, reason in self.dropped).most_common())

    @property
    def short(self) -> dict[str, int]:
        """Length of the clip, by id, of every kept sample that has fewer frames than the geometry's num_frames."""
        if self.geometry.rule == "vace":
            return {}  # there a clip's length also depends on its size, which annotations of VACE do not give
        available = {sample.id: _available(sample, self.geometry) for sample in self.kept}
        lengths = {name: clip_length(n, self.geometry) for name, n in available.items() if n is not None}
        return {name: length for name, length in lengths.items() if length < self.geometry.num_frames}

    def __str__(self) -> str:
        total, short = len(self.kept) + len(self.dropped), self.short
        lines = [f"{total} sample{'s' * (total != 1)}, {len(self.kept)} kept, {len(self.dropped)} dropped"]
        for kind, count in self.counts.items():
            sample, reason = next(pair for pair in self.dropped if pair[1].kind == kind)
            lines.append(f"  {kind}: {count}, e.g. {sample.id}: {reason.detail}")
        if short:
            least = min(short, key=short.__getitem__)
            lines.append(
                f"  kept, but shorter than num_frames={self.geometry.num_frames}: {len(short)}, the shortest gives a "
                f"clip of {short[least]}: {least}; a larger min_frames leaves them out"
            )
        return "\n".join(line.replace("\n", "\\n") for line in lines)


def select(samples: Sequence[Sample], geometry: Geometry) -> Selection:
    """Split samples by whether they suit `geometry`. What an annotation leaves out is not judged here but at decoding.

    Reasons: missing_file, mask_without_source, no_caption, no_resolution, resolution_too_small, aspect_mismatch,
    too_short. Of the files of a VACE sample all must be there.
    """
    kept, dropped = [], []
    for sample in samples:
        try:
            _check(sample, geometry)
            kept.append(sample)
        except Unfit as reason:
            dropped.append((sample, reason))
    return Selection(kept, dropped, geometry)


def for_task(samples: Sequence[Sample], controls: bool) -> list[Sample]:
    """The samples with what a task reads: without sources, masks and references where it reads no `controls`."""
    return list(samples) if controls else [replace(sample, control=None) for sample in samples]


def _check(sample: Sample, geometry: Geometry) -> None:
    for file in sample.files:
        if not file.is_file():
            raise Unfit("missing_file", f"{file} is {'a folder' if file.is_dir() else 'not there'}")
    check_control(sample)
    if not sample.captions:
        raise Unfit("no_caption", "cap is empty or absent")
    if geometry.rule == "vace":
        return
    if sample.height is not None and sample.width is not None:
        output_size(sample.height, sample.width, geometry)
    frames = _available(sample, geometry)
    if frames is not None:
        clip_length(frames, geometry)


def _available(sample: Sample, geometry: Geometry) -> int | None:
    """Frames to choose from after cutting and resampling, as far as the annotation says."""
    frames = sample.cut[1] - sample.cut[0] if sample.cut else sample.num_frames
    if frames is None:
        return None
    slower = geometry.fps / sample.fps if geometry.fps and sample.fps and geometry.fps < sample.fps else 1.0
    return max(1, round(frames * slower))
