"""Lists of videos and captions: data.txt, data.json and .jsonl, as in MindSpeed-MM's guides.

    data.txt     one data set per line: `folder,annotation`; lines that begin with # are skipped
    data.json    a list of objects; or data.jsonl, one object per line:
                 {"path": "videos/1.mp4", "cap": "a cat", "num_frames": 81, "fps": 24, "resolution": {"height": 480,
                 "width": 832}, "cut": [0, 81]}

Only `path` is required here. `cap` may be a list, of which training draws one. Other tools call it `caption`, `text` or
`prompt`, and so may a list. Facts that are absent are read from the file when it is decoded.

Numbers may be as pandas writes them: 48.0 is 48, and NaN is absent, as null is. So are counts, sizes and rates below 1,
which OpenCV gives where it knows none.

A sample of VACE has `video` in place of `path`, and beside it, each of them absent or null where there is none:

                 {"video": "videos/1.mp4", "cap": "a cat", "src_video": "src_videos/1.mp4",
                 "src_video_mask": "src_video_mask/1.mp4", "src_ref_images": ["src_ref_images/1.jpg"]}
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mm_data.files import (
    Content,
    json_error,
    parse_json,
    parse_json_at,
    read_lines,
    read_text,
    shorten,
    show,
    skip_space,
)


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
    """One video and its captions. The facts are what the annotation claims; None where it says nothing. `cut` is
    [first, last) in frames.
    """

    id: str  # the path as written, made unique: names the sample in messages, and seeds its draws in training
    path: Path
    captions: tuple[str, ...] = ()
    num_frames: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    cut: tuple[int, int] | None = None
    control: Control | None = None  # of a VACE sample; without source, mask and references all is to be made up
    contents: tuple[Content, ...] | None = None  # of `files`, in their order, once a plan has read them

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
LONGEST = 4096  # bytes of a path, of Linux


@dataclass(frozen=True)
class Unread:
    """A number of JSON that no machine number holds, as it is written: Infinity, 1e400, or thousands of digits."""

    text: str

    def __repr__(self) -> str:
        return shorten(self.text, 40)


def _parse_int(text: str) -> int | Unread:
    return int(text) if len(text) < 100 else Unread(text)  # Python reads no more than 4,300 digits


def _parse_float(text: str) -> float | Unread:
    return value if math.isfinite(value := float(text)) else Unread(text)


def _parse_constant(name: str) -> Unread | None:
    """`name`: NaN, Infinity or -Infinity, which JSON does not have, and Python and pandas write."""
    return None if name == "NaN" else Unread(name)


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """ValueError for a key that is there twice: the second would replace the first unsaid."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {show(twice)} twice: keep the one that is meant")
    return found


_DECODER = json.JSONDecoder(
    parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_constant, object_pairs_hook=_parse_object
)


def read_manifest(path: str | Path) -> list[Sample]:
    """All samples of a data.txt, data.json or .jsonl, in order.

    Paths in an annotation belong to its folder: the one named beside it in data.txt, else its own.

    Raises ValueError, naming file and line, for what cannot be understood, and for a list without samples. Videos are
    not opened, nor looked for.
    """
    path = Path(path)
    if os.path.isdir(path):
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".txt", ".json", ".jsonl"))
        hint = (
            f"did you mean {path / inside[0]}?"
            if inside
            else "write a data.json that lists its videos with their captions"
        )
        raise ValueError(f"{path} is a folder, not a manifest: {hint}")
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist: give a data.txt, data.json or .jsonl")
    if path.suffix == ".txt":
        sets = _read_sets(path)
    elif path.suffix in (".json", ".jsonl"):
        sets = [(path.parent, path)]
    else:
        raise ValueError(
            f"{path}: a manifest is a .txt, .json or .jsonl file, not {path.suffix or 'one without a suffix'}"
        )
    names = _Names()
    samples: list[Sample] = []
    for folder, annotation in sets:
        before = len(samples)
        for where, record in _read_records(annotation):
            samples.append(_sample(record, folder, where, names))
        if len(samples) == before:
            raise ValueError(f"{annotation} lists no samples")
    return samples


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


def _read_sets(path: Path) -> list[tuple[Path, Path]]:
    """(folder, annotation) of each line. A path may hold commas: the line is cut at the comma that leaves two
    existing paths.
    """
    sets = []
    for number, line in read_lines(path):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        shown = show(line)
        if len(line) > 2 * LONGEST:
            raise ValueError(
                f"{path}, line {number}: {shown} has {len(line):,} characters, more than two paths have; each line is "
                "`folder,annotation`"
            )
        parts = line.split(",")
        pairs = [(_find(",".join(parts[:i]), path), _find(",".join(parts[i:]), path)) for i in range(1, len(parts))]
        if not pairs:
            raise ValueError(
                f"{path}, line {number}: {shown} has no comma; each line is `folder,annotation`, "
                "e.g. `/data/cats,/data/cats/data.json`"
            )
        good = [(folder, file) for folder, file in pairs if os.path.isdir(folder) and os.path.isfile(file)]
        if len(good) != 1:
            tried = "; ".join(
                f"{shorten(str(folder))} is {'a' if os.path.isdir(folder) else 'no'} folder, "
                f"{shorten(str(file))} is {'a' if os.path.isfile(file) else 'no'} file"
                for folder, file in (good or pairs)[:4]
            )
            why = (
                "can be read in more than one way"
                if good
                else "does not name a folder and an annotation file that exist"
            )
            raise ValueError(f"{path}, line {number}: {shown} {why}: {tried}")
        sets += good
    if not sets:
        raise ValueError(f"{path} lists no data sets: each line is `folder,annotation`")
    return sets


def _find(text: str, manifest: Path) -> Path:
    """Relative paths are looked for where the command runs, as MindSpeed-MM does, and then beside data.txt."""
    found = Path(os.path.expanduser(text.strip()))
    beside = manifest.parent / found
    return found if os.path.exists(found) or not os.path.exists(beside) else beside


def _read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, object) of each sample; `where` names file and position for messages."""
    if path.suffix == ".jsonl":
        for number, line in read_lines(path):
            if line.strip():
                yield f"{path}, line {number}", parse_json(line, path, number, _DECODER)
        return
    text = read_text(path)
    place = skip_space(text, 0)
    if not text.startswith("[", place):
        found = parse_json(text, path, decoder=_DECODER)
        raise ValueError(f"{path}: expected a list of objects, found {type(found).__name__}")
    place = skip_space(text, place + 1)
    number = 0
    while not (number == 0 and text.startswith("]", place)):  # one by one: they take ten times the memory of the text
        record, end = parse_json_at(text, place, path, decoder=_DECODER)
        yield f"{path}, sample {number}", record
        number, place = number + 1, skip_space(text, end)
        if not text.startswith(",", place):
            break
        place = skip_space(text, place + 1)
    if not text.startswith("]", place):
        raise json_error(path, json.JSONDecodeError("Expecting ',' or ']'", text, place), 1)
    if (rest := skip_space(text, place + 1)) < len(text):
        raise json_error(path, json.JSONDecodeError("Extra data", text, rest), 1)


def _sample(record: Any, folder: Path, where: str, names: _Names) -> Sample:
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
    control = _control(get, folder, where)
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
    cut = _cut(get("cut", list), where)
    return Sample(
        id=names.own(name if cut is None else f"{name}[{cut[0]}:{cut[1]}]"),
        path=folder / name,
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


def _control(get: Callable[..., Any], folder: Path, where: str) -> Control:
    """`get` reads a key of the record."""
    references = get("src_ref_images", (str, list), [])
    references = [references] if isinstance(references, str) else references
    if not all(isinstance(reference, str) and reference for reference in references):
        raise ValueError(f"{where}: src_ref_images is {show(references)}; it must be a list of paths, or null")
    source, mask = get("src_video", str), get("src_video_mask", str)
    return Control(
        source=folder / source if source else None,
        mask=folder / mask if mask else None,
        references=tuple(folder / reference for reference in references),
    )
