"""Lists of videos and captions: data.txt, data.json and .jsonl, as in MindSpeed-MM's guides.

    data.txt     one data set per line: `folder,annotation`; lines that begin with # are skipped
    data.json    a list of objects; or data.jsonl, one object per line:
                 {"path": "videos/1.mp4", "cap": "a cat", "num_frames": 81, "fps": 24, "resolution": {"height": 480,
                 "width": 832}, "cut": [0, 81]}

Only `path` is required here. `cap` may be a list, of which training draws one. Facts that are absent are read from the
file when it is decoded.

A sample of VACE has `video` in place of `path`, and beside it, each of them absent or null where there is none:

                 {"video": "videos/1.mp4", "cap": "a cat", "src_video": "src_videos/1.mp4",
                 "src_video_mask": "src_video_mask/1.mp4", "src_ref_images": ["src_ref_images/1.jpg"]}
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mm_data.files import Content


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


def read_manifest(path: str | Path) -> list[Sample]:
    """All samples of a data.txt, data.json or .jsonl, in order.

    Paths in an annotation belong to its folder: the one named beside it in data.txt, else its own.

    Raises ValueError, naming file and line, for what cannot be understood, and for a list without samples. Videos are
    not opened, nor looked for.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".txt", ".json", ".jsonl"))
        hint = (
            f"did you mean {path / inside[0]}?"
            if inside
            else "write a data.json that lists its videos with their captions"
        )
        raise ValueError(f"{path} is a folder, not a manifest: {hint}")
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a data.txt, data.json or .jsonl")
    if path.suffix == ".txt":
        sets = _read_sets(path)
    elif path.suffix in (".json", ".jsonl"):
        sets = [(path.parent, path)]
    else:
        raise ValueError(
            f"{path}: a manifest is a .txt, .json or .jsonl file, not {path.suffix or 'one without a suffix'}"
        )
    count: Counter[str] = Counter()
    samples = []
    for folder, annotation in sets:
        records = _read_records(annotation)
        if not records:
            raise ValueError(f"{annotation} lists no samples")
        for where, record in records:
            samples.append(_sample(record, folder, where, count))
    return samples


def _read_sets(path: Path) -> list[tuple[Path, Path]]:
    """(folder, annotation) of each line. A path may hold commas: the line is cut at the comma that leaves two
    existing paths.
    """
    sets = []
    for number, line in enumerate(_read_lines(path), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        parts = line.split(",")
        pairs = [(_find(",".join(parts[:i]), path), _find(",".join(parts[i:]), path)) for i in range(1, len(parts))]
        if not pairs:
            raise ValueError(
                f"{path}, line {number}: {line!r} has no comma; each line is `folder,annotation`, "
                "e.g. `/data/cats,/data/cats/data.json`"
            )
        good = [(folder, annotation) for folder, annotation in pairs if folder.is_dir() and annotation.is_file()]
        if len(good) != 1:
            tried = "; ".join(
                f"{folder} is {'a' if folder.is_dir() else 'no'} folder, "
                f"{annotation} is {'a' if annotation.is_file() else 'no'} file"
                for folder, annotation in (good or pairs)
            )
            why = (
                "can be read in more than one way"
                if good
                else "does not name a folder and an annotation file that exist"
            )
            raise ValueError(f"{path}, line {number}: {line!r} {why}: {tried}")
        sets += good
    if not sets:
        raise ValueError(f"{path} lists no data sets: each line is `folder,annotation`")
    return sets


def _find(text: str, manifest: Path) -> Path:
    """Relative paths are looked for where the command runs, as MindSpeed-MM does, and then beside data.txt."""
    found = Path(text.strip()).expanduser()
    beside = manifest.parent / found
    return found if found.exists() or not beside.exists() else beside


def _read_records(path: Path) -> list[tuple[str, Any]]:
    """(where, object) of each sample; `where` names file and position for messages."""
    lines = _read_lines(path)
    if path.suffix == ".jsonl":
        return [(f"{path}, line {n}", _json(path, line, n)) for n, line in enumerate(lines, 1) if line.strip()]
    records = _json(path, "\n".join(lines), 1)
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of objects, found {type(records).__name__}")
    return [(f"{path}, sample {n}", record) for n, record in enumerate(records)]


def _read_lines(path: Path) -> list[str]:
    """Lines as an editor counts them: str.splitlines would also cut at U+2028 and U+0085, which captions may hold."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def _json(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {first_line + error.lineno - 1}: not JSON: {error.msg}") from error


def _sample(record: Any, folder: Path, where: str, count: Counter[str]) -> Sample:
    def get(name: str, kind: type | tuple[type, ...], default: Any = None, of: dict | None = None) -> Any:
        value = (record if of is None else of).get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{where}: {name} is {value!r}")
        return default if value is None else value

    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with path and cap, found {record!r}")
    for key in record:
        if key.startswith("src") and key not in CONTROL_KEYS:
            near = get_close_matches(key, CONTROL_KEYS, n=1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    path, video = get("path", str), get("video", str)
    if path and video:
        raise ValueError(f"{where}: both path ({path!r}) and video ({video!r}, of VACE): keep one of them")
    control = _control(get, folder, where)
    if path and control != Control():
        raise ValueError(
            f"{where}: the src_ keys belong to a sample of VACE: name its video {path!r} `video`, not path"
        )
    if not (name := path or video):
        raise ValueError(f"{where}: no path (of a plain sample) and no video (of VACE)")
    captions = get("cap", (str, list), [])
    captions = [captions] if isinstance(captions, str) else captions
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where}: cap is {captions!r}; it must be a string or a list of strings")
    fps = get("fps", (int, float))
    frames = get("num_frames", int)
    if frames is None and fps and (duration := get("duration", (int, float))):
        frames = round(fps * duration)
    resolution = get("resolution", dict, {})
    cut = get("cut", list)
    if cut is not None and (len(cut) != 2 or not all(isinstance(c, int) for c in cut) or not 0 <= cut[0] < cut[1]):
        raise ValueError(f"{where}: cut is {cut!r}; it must be [first, end) in frames with 0 <= first < end")
    file, name = name, name if cut is None else f"{name}[{cut[0]}:{cut[1]}]"
    count[name] += 1
    return Sample(
        id=name if count[name] == 1 else f"{name}#{count[name]}",
        path=folder / file,
        captions=tuple(caption for caption in captions if caption.strip()),
        num_frames=frames,
        fps=fps,
        height=get("height", int, of=resolution),
        width=get("width", int, of=resolution),
        cut=tuple(cut) if cut else None,
        control=control if video else None,
    )


def _control(get: Callable[..., Any], folder: Path, where: str) -> Control:
    """`get` reads a key of the record."""
    references = get("src_ref_images", (str, list), [])
    references = [references] if isinstance(references, str) else references
    if not all(isinstance(reference, str) and reference for reference in references):
        raise ValueError(f"{where}: src_ref_images is {references!r}; it must be a list of paths, or null")
    source, mask = get("src_video", str), get("src_video_mask", str)
    return Control(
        source=folder / source if source else None,
        mask=folder / mask if mask else None,
        references=tuple(folder / reference for reference in references),
    )
