"""Lists of videos, pictures and captions: data.txt, data.json and .jsonl, as in MindSpeed-MM's guides, and folders.

    sets.toml    several of the following, and how often each is shown, see `mm_data.sets`
    data.txt     one data set per line: `folder,annotation`; lines that begin with # are skipped
    data.json    a list of objects; or data.jsonl, one object per line:
                 {"path": "videos/1.mp4", "cap": "a cat", "num_frames": 81, "fps": 24, "resolution": {"height": 480,
                 "width": 832}, "cut": [0, 81]}
    a folder     with an annotation.json in it, in each of its folders, or in both: lists as data.json is one; without
                 any, of clips and pictures with a text beside each, see `mm_data.folders`

Only `path` is required here. `cap` may be a list, of which training draws one. Other tools call it `caption`, `text` or
`prompt`, and so may a list. Facts that are absent are read from the file when it is decoded.

Open-Sora-Plan writes `duration` (seconds) in place of `num_frames`; the lists of its version 1.1 have `frame_idx`,
"0:65", where `cut` would be [0, 65]: the first frame, and the one after the last.

Numbers may be as pandas writes them: 48.0 is 48, and NaN is absent, as null is. So are counts, sizes and rates below 1,
which OpenCV gives where it knows none.

A sample of VACE has `video` in place of `path`, and beside it, each of them absent or null where there is none:

                 {"video": "videos/1.mp4", "cap": "a cat", "src_video": "src_videos/1.mp4",
                 "src_video_mask": "src_video_mask/1.mp4", "src_ref_images": ["src_ref_images/1.jpg"]}
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mm_data.annotations import ANNOTATION, Annotation, find_annotations, has_lists, read_records
from mm_data.files import Content, shorten, show
from mm_data.folders import has_media, read_folder
from mm_data.sets import SampleSet, is_sets_file, read_sets


@dataclass(frozen=True)
class Control:
    """What VACE reads besides the caption: a source video to follow or to edit, a mask video of where it changes
    (white), and reference pictures. Frame n of source and mask belongs to frame n of the sample's video.
    """

    source: Path | None = None
    mask: Path | None = None
    references: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One video or picture and its captions. The facts are what the annotation claims; None where it says nothing.
    `cut` is [first, end) in frames of the file.
    """

    id: str  # the path as written (in a folder of lists: from there), made unique: names it, and seeds its draws
    path: Path
    captions: tuple[str, ...] = ()
    num_frames: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    cut: tuple[int, int] | None = None
    control: Control | None = None  # of a VACE sample; without source, mask and references all is to be made up
    contents: tuple[Content, ...] | None = None  # of `files`, in their order, once a plan has read them
    set: SampleSet | None = None  # of a file of sets, the one it belongs to
    size: tuple[int, int] | None = None  # height and width of the clip, where its set says so

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the sample is made from: the video, then source, mask and references where it has them."""
        if self.control is None:
            return (self.path,)
        given = (self.control.source, self.control.mask, *self.control.references)
        return (self.path, *(path for path in given if path is not None))


CONTROL_KEYS = ("src_video", "src_video_mask", "src_ref_images")
# MindSpeed-MM's name, and those in the lists of musubi-tuner, VideoX-Fun and the hub, and DiffSynth
CAPTION_KEYS = ("cap", "caption", "text", "prompt")
LARGEST = 2**63  # of any number of frames, pixels, seconds


def _warn(note: str) -> None:
    warnings.warn(note, stacklevel=3)


def read_manifest(path: str | Path, say: Callable[[str], None] = _warn, caption: str | None = None) -> list[Sample]:
    """All samples of a file of sets, of a list, or of a folder of lists or of clips and pictures, in order.

    Paths in an annotation belong to its folder: the one named beside it in data.txt, else its own. Those in the
    annotations of a folder belong to the folder of the annotation or to the one given, wherever the file is.

    A file that two annotations of a folder name is one sample, with the captions of both. A file that two sets name is
    a sample of each. `say` is called with a line that counts them, and with one for what is not read.

    caption: of samples without one, where their set says nothing else. None leaves them without in a list, and refuses
    them in a folder of clips and pictures.

    Raises ValueError, naming file and line, for what cannot be understood, for a path that may mean two files, and for
    a list without samples. Videos are not opened.
    """
    path = Path(path)
    if not is_sets_file(path):
        return _add_captions(_read_one(path, say, caption), caption, "")
    samples: list[Sample] = []
    names = _Names()
    for one in read_sets(path):
        said = one.caption if one.caption is not None else caption
        for sample in _add_captions(_read_one(one.path, say, said), said, one.caption_prefix):
            for size in one.sizes or (None,):
                name = f"{one.prefix}{sample.id}" + (f"@{size[0]}x{size[1]}" if size and len(one.sizes) > 1 else "")
                samples.append(replace(sample, id=names.own(name), set=one, size=size))
    _tell_shared(path, samples, say)
    return samples


def list_files(path: Path) -> list[Path]:
    """The lists of a manifest, as far as it has any. Raises ValueError for what is no manifest; no sample is read."""
    if not is_sets_file(path):
        return _lists(path)
    return [file for one in read_sets(path) for file in _lists(one.path)]


def _lists(path: Path) -> list[Path]:
    return [] if _is_media_folder(path) else [one.file for one in find_annotations(path)]


def _is_media_folder(path: Path) -> bool:
    return path.is_dir() and not has_lists(path) and has_media(path)


def _read_one(path: Path, say: Callable[[str], None], caption: str | None) -> list[Sample]:
    """The samples of anything but a file of sets."""
    if _is_media_folder(path):
        return [Sample(found.name, found.path, (found.caption,)) for found in read_folder(path, say, caption)]
    samples = _Samples()
    for annotation in find_annotations(path):
        before = samples.read
        for where, record in read_records(annotation.file):
            samples.add(_sample(record, annotation, where), annotation)
        if samples.read == before:
            raise ValueError(f"{annotation.file} lists no samples")
    for note in samples.notes():
        say(f"{path}: {note}")
    return samples.all


def _add_captions(samples: list[Sample], caption: str | None, prefix: str) -> list[Sample]:
    """With the caption of those that have none, and what stands before every caption."""
    if caption is not None:
        samples = [sample if sample.captions else replace(sample, captions=(caption,)) for sample in samples]
    if prefix:
        samples = [replace(one, captions=tuple(f"{prefix}{caption}" for caption in one.captions)) for one in samples]
    return samples


def _tell_shared(path: Path, samples: list[Sample], say: Callable[[str], None]) -> None:
    """Of files that several sets name, how many there are."""
    sets: dict[tuple, dict[int, str]] = {}
    for sample in samples:
        sets.setdefault((os.path.realpath(sample.path), sample.cut), {}).setdefault(sample.set.number, sample.set.name)
    shared = {file: names for (file, _), names in sets.items() if len(names) > 1}
    if shared:
        first = shorten(next(iter(shared)), 200)
        most = Counter(" and ".join(names.values()) for names in shared.values()).most_common(1)[0][0]
        say(
            f"{path}: {len(shared):,} file{'s are' if len(shared) > 1 else ' is'} in several sets, e.g. {first} "
            f"(most in {shorten(most, 200)}): each set shows them"
        )


class _Samples:
    """Those of several lists. Within one list, and without a folder of lists, every entry is a sample of its own."""

    def __init__(self) -> None:
        self.all: list[Sample] = []
        self.read = 0
        self.names = _Names()
        self.listed: dict[tuple, tuple[Path, list[int]]] = {}  # by file and cut: the first list, its samples
        self.repeated: list[str] = []
        self.joined: list[str] = []

    def add(self, sample: Sample, annotation: Annotation) -> None:
        self.read += 1
        if annotation.top is not None:
            key = (sample.id, sample.cut, sample.control)  # the path in its shortest form is in the id
            file, places = self.listed.setdefault(key, (annotation.file, []))
            if file != annotation.file:
                self._join(sample, places)
                return
            places.append(len(self.all))
        name = self.names.own(sample.id)
        self.all.append(sample if name == sample.id else replace(sample, id=name))

    def _join(self, sample: Sample, places: list[int]) -> None:
        """Give the first of the samples the captions that none of them has."""
        first = self.all[places[0]]
        known = {caption for place in places for caption in self.all[place].captions}
        new = tuple(caption for caption in sample.captions if caption not in known)
        if new:
            self.all[places[0]] = replace(first, captions=(*first.captions, *new))
        (self.joined if new else self.repeated).append(first.id)

    def notes(self) -> Iterator[str]:
        for names, what in (
            (self.repeated, "the same captions: each counts once"),
            (self.joined, "other captions: each counts once and has the captions of both, of which one is drawn"),
        ):
            if names:
                count = f"{len(names):,} {'entries name files' if len(names) > 1 else 'entry names a file'}"
                yield f"{count} that another {ANNOTATION} lists too, e.g. {shorten(names[0])}, with {what}"


_KINDS = {str: "text", list: "a list", dict: 'an object, as {"height": 480, "width": 832}'}


class _Names:
    """Makes every name its own: the second `a.mp4` is `a.mp4#2`, unless a file is called so."""

    def __init__(self) -> None:
        self.given: dict[str, int] = {}  # name -> the last number that was tried for it

    def own(self, name: str) -> str:
        count, unique = self.given.get(name, 0) + 1, name
        if count > 1:
            while (unique := f"{name}#{count}") in self.given:
                count += 1
            self.given[unique] = 1
        self.given[name] = count
        return unique


def _sample(record: Any, annotation: Annotation, where: str) -> Sample:
    def get(name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = record.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            said = " or ".join(_KINDS[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{where}: {name} is {show(value)}; it must be {said}")
        return default if value is None else value

    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with path and cap, found {show(record)}")
    for key in record:
        if key.startswith("src") and key not in CONTROL_KEYS:
            near = get_close_matches(key[:80], CONTROL_KEYS, n=1)
            raise ValueError(f"{where}: unknown key {show(key)}" + (f", did you mean {near[0]!r}?" if near else ""))
    path, video = get("path", str), get("video", str)
    if path and video:
        raise ValueError(f"{where}: both path ({show(path)}) and video ({show(video)}, of VACE): keep one of them")
    control = _control(get, annotation, where)
    if path and control != Control():
        raise ValueError(
            f"{where}: the src_ keys belong to a sample of VACE: name its video {show(path)} `video`, not path"
        )
    if not (name := path or video):
        raise ValueError(f"{where}: no path (of a plain sample) and no video (of VACE)")
    fps, duration = (_number(record.get(key), key, where) for key in ("fps", "duration"))
    frames = _count(record.get("num_frames"), "num_frames", where)
    if frames is None and fps and duration:
        frames = max(1, round(fps * duration))
    resolution = get("resolution", dict, {})
    cut, frames_of_file = _cut(get("cut", list), where), _frame_idx(get("frame_idx", str), where)
    if cut and frames_of_file and cut != frames_of_file:
        raise ValueError(f"{where}: cut is {show(record['cut'])} and frame_idx {show(record['frame_idx'])}: keep one")
    cut, file = cut or frames_of_file, annotation.find(name, where)
    shown = annotation.identify(name, file)
    return Sample(
        id=shown if cut is None else f"{shown}[{cut[0]}:{cut[1]}]",
        path=file,
        captions=_captions(record, where),
        num_frames=frames,
        fps=fps,
        height=_count(resolution.get("height"), "height", where),
        width=_count(resolution.get("width"), "width", where),
        cut=cut,
        control=control if video else None,
    )


def _number(value: Any, name: str, where: str) -> float | None:
    """None where the list says nothing, or gives the zero or less of a tool that knows nothing."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST:
        raise ValueError(f"{where}: {name} is {show(value)}, which is no number that it can be")
    return value if value > 0 else None


def _count(value: Any, name: str, where: str) -> int | None:
    number = _number(value, name, where)
    if number is None:
        return None
    if number != int(number):
        raise ValueError(f"{where}: {name} is {show(value)}; it must be a whole number")
    return int(number)


def _cut(value: list | None, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    whole = [one for one in value if isinstance(one, int | float) and not isinstance(one, bool) and one == int(one)]
    if len(value) != 2 or len(whole) != 2 or not 0 <= whole[0] < whole[1] <= LARGEST:
        raise ValueError(f"{where}: cut is {show(value)}; it must be [first, end) in frames with 0 <= first < end")
    return int(whole[0]), int(whole[1])


def _frame_idx(value: str | None, where: str) -> tuple[int, int] | None:
    """As `cut`, in the words of Open-Sora-Plan 1.1."""
    if value is None:
        return None
    first, _, end = value.partition(":")
    if not all(number.isdecimal() and len(number) < 20 for number in (first, end)):
        raise ValueError(f"{where}: frame_idx is {show(value)}; it must be first:end in frames, as 0:65")
    if not int(first) < int(end) <= LARGEST:
        raise ValueError(f"{where}: frame_idx is {show(value)}; it must be first:end in frames with first < end")
    return int(first), int(end)


def _captions(record: dict, where: str) -> tuple[str, ...]:
    """Those that are not blank, under whichever key they stand."""
    found = {}
    for key in CAPTION_KEYS:
        value = record.get(key)
        captions = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"{where}: {key} is {show(value)}; it must be a string or a list of strings")
        if shown := tuple(caption for caption in captions if caption.strip()):
            found[key] = shown
    if len(set(found.values())) > 1:
        told = " and ".join(f"{key} ({show(captions[0])})" for key, captions in found.items())
        raise ValueError(f"{where}: both {told}: keep the one that is the caption")
    return next(iter(found.values()), ())


def _control(get: Callable[..., Any], annotation: Annotation, where: str) -> Control:
    """`get` reads a key of the record."""
    references = get("src_ref_images", (str, list), [])
    references = [references] if isinstance(references, str) else references
    if not all(isinstance(reference, str) and reference for reference in references):
        raise ValueError(f"{where}: src_ref_images is {show(references)}; it must be a list of paths, or null")
    source, mask = get("src_video", str), get("src_video_mask", str)
    return Control(
        source=annotation.find(source, where) if source else None,
        mask=annotation.find(mask, where) if mask else None,
        references=tuple(annotation.find(reference, where) for reference in references),
    )
