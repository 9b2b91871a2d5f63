"""Which samples of a manifest suit a geometry, as far as that shows early; and the report of those that do not.

Nothing is left out in silence: every dropped sample has a reason, and the report counts them. Annotations are often
wrong (sizes before rotation, lengths of another cut), so none is left out for what its annotation says: the file is
asked, and believed.

Differences to MindSpeed-MM: missing files are found here, not in the middle of a run. Short clips are dropped by rule,
not by chance. Shapes with few samples are kept, see `mm_data.order`; there all with fewer than four global batches are
dropped, so that a set of ten clips ends in an obscure error.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from mm_data.files import find_fault, shorten
from mm_data.geometry import Geometry, Unfit, clip_length, output_size
from mm_data.images import SUFFIXES
from mm_data.layout import check_control, check_least, geometry_of, lay_out
from mm_data.manifest import Sample
from mm_data.nearest import Neighbours
from mm_data.video import PICTURE


@dataclass(frozen=True)
class Selection:
    """Samples that can be used as far as is known yet, and the others, each with its reason."""

    kept: list[Sample]
    dropped: list[tuple[Sample, Unfit]]
    geometry: Geometry

    @property
    def counts(self) -> dict[str, int]:
        """Dropped samples by kind of reason, most frequent first."""
        return dict(Counter(reason.kind for _, reason in self.dropped).most_common())

    @property
    def short(self) -> dict[str, int]:
        """Length of the clip, by id, of every kept video that has fewer frames than the geometry's num_frames."""
        if self.geometry.rule == "vace":
            return {}  # there a clip's length also depends on its size, which annotations of VACE do not give
        videos = [sample for sample in self.kept if not _is_named_picture(sample)]
        found = {}
        for sample in videos:
            geometry = geometry_of(sample, self.geometry)
            available = _available(sample, geometry)
            if available is not None and (length := clip_length(available, geometry)) < geometry.num_frames:
                found[sample.id] = length
        return found

    def __str__(self) -> str:
        total, short = len(self.kept) + len(self.dropped), self.short
        lines = [f"{total} sample{'s' * (total != 1)}, {len(self.kept)} kept, {len(self.dropped)} dropped"]
        if pictures := sum(map(_is_named_picture, self.kept)):
            lines.append(f"  kept as clips of one frame, being pictures: {pictures}")
        for kind, count in self.counts.items():
            sample, reason = next(pair for pair in self.dropped if pair[1].kind == kind)
            lines.append(f"  {kind}: {count}, e.g. {shorten(sample.id)}: {shorten(reason.detail, 500)}")
        if short:
            least = min(short, key=short.__getitem__)
            asked = geometry_of(next(one for one in self.kept if one.id == least), self.geometry).num_frames
            lines.append(
                f"  kept, but shorter than num_frames={asked}: {len(short)}, the shortest gives a "
                f"clip of {short[least]}: {shorten(least)}; a larger min_frames leaves them out"
            )
        return "\n".join(line.replace("\n", "\\n") for line in lines)


def check_samples(samples: Sequence[Sample], geometry: Geometry, threads: int = 8) -> list[Sample | Unfit]:
    """Each sample, or why it does not suit `geometry`. Files are looked at `threads` at a time.

    A sample whose annotation says that it does not suit comes back with the facts of its file, where these do. What an
    annotation leaves out is not judged here but at decoding. A file that is not there is named with what is most like
    it in its folder; nothing is put in its place.

    Reasons are those of `KINDS`. Of the files of a VACE sample all must be there. Raises ValueError for a size or a
    length that a set asks for and that cannot be.
    """

    for sample in samples:
        geometry_of(sample, geometry)  # a mistake of a set is none of its samples'
    neighbours = Neighbours()

    def check(sample: Sample) -> Sample | Unfit:
        try:
            return _check(sample, geometry, neighbours)
        except Unfit as reason:
            return Unfit(reason.kind, reason.detail)  # without the traceback, which holds on to what was looked at

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(check, samples))


def select(samples: Sequence[Sample], geometry: Geometry, checked: Sequence[Sample | Unfit] | None = None) -> Selection:
    """Split samples by whether they suit `geometry`, see `check_samples`.

    `checked` is what that gave for these samples and this geometry, where processes shared the work.
    """
    checked = check_samples(samples, geometry) if checked is None else checked
    pairs = list(zip(samples, checked, strict=True))
    return Selection(
        kept=[found for _, found in pairs if isinstance(found, Sample)],
        dropped=[(sample, found) for sample, found in pairs if isinstance(found, Unfit)],
        geometry=geometry,
    )


def for_task(samples: Sequence[Sample], controls: bool) -> list[Sample]:
    """The samples with what a task reads: without sources, masks and references where it reads no `controls`."""
    return list(samples) if controls else [replace(sample, control=None) for sample in samples]


def _check(sample: Sample, geometry: Geometry, neighbours: Neighbours) -> Sample:
    for file in sample.files:
        if fault := find_fault(file):
            if os.path.exists(file):
                raise Unfit("no_file", fault)
            raise Unfit("missing_file", f"{fault}{neighbours.describe(file)}")
    check_control(sample)
    if not sample.captions:
        raise Unfit("no_caption", "cap is empty or absent")
    for caption in sample.captions:
        if not _is_text(caption):
            raise Unfit("bad_caption", f"cap holds half a character (a lone surrogate): {shorten(caption)}")
    if geometry.rule == "vace":
        return sample
    try:
        _check_claims(sample, geometry_of(sample, geometry))
    except Unfit as claimed:
        return _look(sample, geometry, claimed)
    return sample


def _is_text(caption: str) -> bool:
    try:
        caption.encode()
    except UnicodeEncodeError:  # JSON can say "\ud83d", of which no encoder makes anything
        return False
    return True


def _check_claims(sample: Sample, geometry: Geometry) -> None:
    """Unfit for what the annotation says."""
    if sample.height is not None and sample.width is not None:
        output_size(sample.height, sample.width, geometry)
    is_still = _is_named_picture(sample)
    frames = 1 if is_still else _available(sample, geometry)
    if frames is not None:
        length = 1 if is_still else clip_length(frames, geometry)
        check_least(sample.path, length, geometry, is_still)


def _look(sample: Sample, geometry: Geometry, claimed: Unfit) -> Sample:
    """The sample with the facts of its file, in place of those of its annotation. Unfit where these do not suit."""
    try:
        video = lay_out(sample, geometry).video
    except Unfit:
        raise
    except Exception as error:  # damaged as well, in whatever way
        raise Unfit(claimed.kind, f"{claimed.detail} (and the file does not say: {error})") from error
    frames = None if video.container == PICTURE else video.num_frames  # no length is asked of a picture
    return replace(sample, num_frames=frames, fps=video.fps, height=video.height, width=video.width)


def _is_named_picture(sample: Sample) -> bool:
    """By its name alone: the other files are looked into at decoding."""
    return sample.path.suffix.lower() in SUFFIXES


def _available(sample: Sample, geometry: Geometry) -> int | None:
    """Frames to choose from after cutting and resampling, as far as the annotation says."""
    frames = sample.cut[1] - sample.cut[0] if sample.cut else sample.num_frames
    if frames is None:
        return None
    slower = geometry.fps / sample.fps if geometry.fps and sample.fps and geometry.fps < sample.fps else 1.0
    return max(1, round(frames * slower))
