"""A folder of clips and pictures with a text of the same name beside each: its caption. No list is needed.

    portraits/1.mp4  portraits/1.txt      folders may lie in folders
    portraits/2.JPG  portraits/2.txt      capital letters of an extension do not count

A text is one caption, of one line or of several, without the white space around it. What has none is refused, unless a
caption is given for it. Whatever begins with a dot is left out, as are files of other kinds: `say` is told of them.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mm_data.files import read_text, shorten
from mm_data.images import SUFFIXES

PICTURES = SUFFIXES
VIDEOS = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"),
    *(".wmv", ".flv", ".ogv", ".3gp"),
)
CAPTION = ".txt"


class Captioned(NamedTuple):
    """A clip or a picture."""

    name: str  # its path from the folder that was given
    path: Path
    caption: str


def has_media(top: Path) -> bool:
    """Whether there is a clip or a picture in a folder, or in those in it. The first that is found decides."""
    return any(_is_medium(name) for _, names in _walk(top) for name in names if not _is_hidden(name))


def read_folder(top: Path, say: Callable[[str], None], caption: str | None = None) -> list[Captioned]:
    """All clips and pictures of a folder and of those in it, by folder and name.

    caption: of those that have no text beside them, or an empty one; None refuses them.

    Raises ValueError as `list_folder`, and for files without a caption, with their number and the first of them. `say`
    is called with a line for each kind of file that is not read.
    """
    found = list_folder(top, say)
    without = [one for one in found if not one.caption]
    if without and caption is None:
        raise ValueError(_describe_missing(top, without[0].path, len(without), len(found)))
    if without:
        say(
            f"{top}: {_count(len(without), 'file has', 'files have')} no text, e.g. {without[0].name}: "
            f"{caption!r} is taken as the caption"
        )
    return [one if one.caption else one._replace(caption=caption) for one in found]


def list_folder(top: Path, say: Callable[[str], None]) -> list[Captioned]:
    """The same, whether they have a caption or not: then it is empty.

    Raises ValueError for two files of one name (which would share a caption), and for a text that is not UTF-8.
    """
    media: dict[tuple[Path, str], list[str]] = {}
    texts: dict[tuple[Path, str], list[str]] = {}
    hidden, others = [], []
    for folder, names in _walk(top):
        for name in names:
            stem, suffix = os.path.splitext(name)
            if _is_hidden(name):
                hidden += [folder / name] if _is_medium(name) else []
            elif _is_medium(name):
                media.setdefault((folder, stem), []).append(name)
            elif suffix.lower() == CAPTION:
                texts.setdefault((folder, stem), []).append(name)
            else:
                others.append(folder / name)
    _refuse_two(top, media, "clips or pictures share a name, and so a caption", "rename one of them")
    _refuse_two(top, {key: names for key, names in texts.items() if key in media}, "captions share a name", "keep one")
    found = []
    for (folder, stem), [name] in media.items():
        text = read_text(folder / texts[folder, stem][0]).strip() if (folder, stem) in texts else ""
        found.append(Captioned(_below(top, folder / name), folder / name, text))
    orphans = [
        folder / name for (folder, stem), names in texts.items() if (folder, stem) not in media for name in names
    ]
    for paths, what in (
        (orphans, "without a clip or picture of the same name"),
        (hidden, "hidden by a dot"),
        (others, f"of other kinds ({_kinds(others)})"),
    ):
        if paths:
            say(f"{top}: not read: {_count(len(paths), 'file', 'files')} {what}, e.g. {_below(top, paths[0])}")
    return found


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the names of their files, in order. One that links lead to as well is read once, a hidden one not."""
    seen = {os.path.realpath(top)}

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        fresh = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(folder, name))
            if not _is_hidden(name) and real not in seen:
                seen.add(real)
                fresh.append(name)
        folders[:] = fresh
        yield Path(folder), sorted(names)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _is_medium(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in (*PICTURES, *VIDEOS)


def _below(top: Path, path: Path) -> str:
    return path.relative_to(top).as_posix()


def _count(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"


def _kinds(paths: list[Path]) -> str:
    """How many there are of each extension, the most frequent first."""
    counts = Counter(path.suffix.lower() or "no extension" for path in paths).most_common()
    said = [f"{shorten(kind, 20)}: {count:,}" for kind, count in counts[:4]]
    return ", ".join([*said, "…"] if len(counts) > 4 else said)


def _refuse_two(top: Path, found: dict[tuple[Path, str], list[str]], what: str, way_out: str) -> None:
    if twice := [(folder, names) for (folder, _), names in found.items() if len(names) > 1]:
        folder, names = twice[0]
        first = " and ".join(_below(top, folder / name) for name in names)
        raise ValueError(f"{top}: {_count(len(twice), 'time', 'times')} two {what}, e.g. {first}: {way_out}")


def _describe_missing(top: Path, first: Path, missing: int, total: int) -> str:
    lists = sorted(path for path in top.iterdir() if path.suffix in (".json", ".jsonl"))
    hint = f"; did you mean {lists[0]}? Else " if lists else ": "
    have = _count(total, "clip or picture has", "clips and pictures have")
    return (
        f"{top}: {missing:,} of {have} no caption, e.g. {_below(top, first)}{hint}write it into "
        f"{first.stem}{CAPTION} beside it (`python -m mm_infer.caption {top}` writes all of them), or say what "
        'stands for them: --data.caption "a photo", in a file of sets caption = "a photo"; "" is the empty prompt'
    )
