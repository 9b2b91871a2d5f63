"""Where the lists of a manifest are, and their entries as they are written.

`mm_data.manifest` says what may stand in an entry.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mm_data.files import json_error, parse_json, parse_json_at, read_lines, read_text, shorten, show, skip_space

ANNOTATION = "annotation.json"  # the list of a folder, as MindSpeed-MM's guide names it
LONGEST = 4096  # bytes of a path, of Linux


@dataclass(frozen=True)
class Annotation:
    """A list of samples, and where the paths in it begin: in `folder`; where it is one of a folder of lists, `top`,
    perhaps there.
    """

    file: Path
    folder: Path
    top: Path | None = None

    def find(self, name: str, where: str) -> Path:
        """The path that an entry names. Raises ValueError, after `where`, for one that could be either of two files."""
        beside = self.folder / name
        if self.top is None or self.top is self.folder or (below := self.top / name) == beside:
            return beside
        found = [path for path in (beside, below) if os.path.exists(path)]
        if len(found) == 2 and not os.path.samefile(*found):
            raise ValueError(
                f"{where}: {show(name)} may be {beside} or {below}, which are two files: keep one, or name it by its "
                "absolute path"
            )
        if found:
            return found[0]
        # Neither is there. The one that has a folder can be told what lies in it that is like it.
        return below if os.path.isdir(below.parent) and not os.path.isdir(beside.parent) else beside

    def identify(self, name: str, path: Path) -> str:
        """What to call a sample: as it is written, or of a folder of lists by the path from there; by the whole path
        where that lies elsewhere.
        """
        return name if self.top is None else os.path.abspath(path).removeprefix(self._above)

    @cached_property
    def _above(self) -> str:
        return os.path.join(os.path.abspath(self.top), "")


def has_lists(folder: Path) -> bool:
    """Whether a folder, or one of those in it, has an annotation.json."""
    return bool(_in_folder(folder))


def _in_folder(path: Path) -> list[Annotation]:
    below = sorted((entry.is_symlink(), path / entry.name) for entry in os.scandir(path) if entry.is_dir())
    once = {os.path.realpath(folder): folder for folder in [*(folder for _, folder in reversed(below)), path]}
    folders = [path, *sorted(set(once.values()) - {path})]
    return [Annotation(folder / ANNOTATION, folder, path) for folder in folders if _exists(folder / ANNOTATION)]


def find_annotations(path: str | Path) -> list[Annotation]:
    """The lists of a manifest, in the order in which they are read: that of a folder, then those of the folders in it.
    A folder to which links lead as well is read once.

    Raises ValueError for what is no manifest. Of a data.txt the lines are read, of the others nothing.
    """
    path = Path(path)
    if os.path.isdir(path):
        if found := _in_folder(path):
            return found
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".txt", ".json", ".jsonl"))
        hint = (
            f"did you mean {path / inside[0]}?"
            if inside
            else "write a data.json that lists its videos with their captions, or put a .txt beside each"
        )
        raise ValueError(f"{path} is a folder without {ANNOTATION}, and so are those in it: {hint}")
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist: give a data.txt, data.json, .jsonl or sets.toml, or a folder")
    if path.suffix == ".txt":
        return [Annotation(file, folder) for folder, file in _read_sets(path)]
    if path.suffix in (".json", ".jsonl"):
        return [Annotation(path, path.parent)]
    raise ValueError(
        f"{path}: a manifest is a .txt, .json, .jsonl or .toml file, not {path.suffix or 'one without a suffix'}"
    )


def _exists(path: Path) -> bool:
    """ValueError for a link to nothing, which is not the same as no list; OSError where the system does not say."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there: mend the link, or remove it")
    return True


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


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, object) of each sample; `where` names file and position for messages."""
    if path.suffix == ".jsonl":
        for number, line in read_lines(path):
            if line.strip():
                yield f"{path}, line {number}", parse_json(line, path, number, DECODER)
        return
    text = read_text(path)
    place = skip_space(text, 0)
    if not text.startswith("[", place):
        found = parse_json(text, path, decoder=DECODER)
        raise ValueError(f"{path}: expected a list of objects, found {type(found).__name__}")
    place = skip_space(text, place + 1)
    number = 0
    while not (number == 0 and text.startswith("]", place)):  # one by one: they take ten times the memory of the text
        record, end = parse_json_at(text, place, path, decoder=DECODER)
        yield f"{path}, sample {number}", record
        number, place = number + 1, skip_space(text, end)
        if not text.startswith(",", place):
            break
        place = skip_space(text, place + 1)
    if not text.startswith("]", place):
        raise json_error(path, json.JSONDecodeError("Expecting ',' or ']'", text, place), 1)
    if (rest := skip_space(text, place + 1)) < len(text):
        raise json_error(path, json.JSONDecodeError("Extra data", text, rest), 1)


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


DECODER = json.JSONDecoder(
    parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_constant, object_pairs_hook=_parse_object
)
