"""Several sets of samples in one file, and how often each is shown.

    [[set]]
    path = "clips/portraits"              # a folder, a list, or features; relative to this file
    repeats = 3                           # each of its samples is shown 3 times in an epoch
    sizes = [[480, 832], [720, 1280]]     # height and width: a sample of each
    frames = 81                           # of a clip at most
    caption_prefix = "sks style, "        # before every caption
    caption = "a photo"                   # of samples without one

    [[set]]
    path = "images.json"
    weight = 0.2                          # a fifth of all samples that are shown are of this set

An epoch shows the sets without a weight, each sample `repeats` times, and so many of the others that these have their
share. Where all sets have a weight, an epoch is as many samples as there are. This file imports no torch.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

from mm_data.files import read_text, show

SUFFIX = ".toml"
MOST = 2**31  # of repeats, pixels, frames
OF_CLIPS = ("sizes", "frames", "caption", "caption_prefix")  # which features have been made with


@dataclass(frozen=True)
class SampleSet:
    """A set as its file says it."""

    path: Path
    name: str  # the path as written, and where it is there before, which time this is
    number: int = 0  # in the file, from 0
    prefix: str = ""  # of the ids of its samples: the folder, or that of the list, as it is written
    repeats: Fraction = Fraction(1)  # how often each of its samples is shown in an epoch
    weight: Fraction | None = None  # or: its share of all that is shown
    sizes: tuple[tuple[int, int], ...] = ()  # (height, width) of its clips, a sample for each; none: as all
    frames: int | None = None  # of its clips, at most; None: as all
    caption: str | None = None  # of samples that have none
    caption_prefix: str = ""


@dataclass(frozen=True)
class Portion:
    """Some samples of a data set, one after another, and how often each of them is shown in an epoch."""

    name: str
    samples: int
    times: Fraction = Fraction(1)

    @property
    def places(self) -> Fraction:
        """Of an epoch."""
        return self.samples * self.times


def is_sets_file(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def read_sets(path: Path, *, of_features: bool = False) -> list[SampleSet]:
    """The sets of a TOML file, in order. of_features: they are folders of features, made with sizes and captions.

    Raises ValueError, naming file and set, for what cannot be understood or does not go together, and for a path that
    is not there.
    """
    try:
        tables = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: tables nested too deep") from error
    for key in tables:
        if key != "set":
            raise ValueError(f"{path}: unknown key {show(key)}{_near(key, ['set'])}: it holds tables of [[set]]")
    listed = tables.get("set")
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise ValueError(f'{path} has no sets: write [[set]], and below it path = "…", for each')
    sets: list[SampleSet] = []
    for number, table in enumerate(listed):
        one = _read_set(table, path, number, of_features)
        times = 1 + sum(other.path == one.path for other in sets)
        sets.append(one if times == 1 else replace(one, name=f"{one.name} ({times})"))
    _check_weights(path, sets)
    return sets


def mix(sets: Sequence[tuple[SampleSet, Sequence[Portion]]]) -> list[Portion]:
    """The portions of all sets, in order, with how often a sample of each is shown in an epoch of all.

    The portions of a set, where it is made of several, keep their proportions. The share of sets without samples falls
    to the others.
    """
    filled = [(one, portions, sum(portion.places for portion in portions)) for one, portions in sets]
    filled = [(one, portions, places) for one, portions, places in filled if places]
    counted = sum(one.repeats * places for one, _, places in filled if one.weight is None)
    shares = sum((one.weight for one, _, _ in filled if one.weight is not None), Fraction(0))
    # All of an epoch; with weights alone they are shares of one another, as a set may be empty.
    epoch = counted / (1 - shares) if counted else sum(places for _, _, places in filled)
    mixed = []
    for one, portions, places in filled:
        share = one.weight if counted or one.weight is None else one.weight / shares
        times = one.repeats if share is None else share * epoch / places
        for portion in portions:
            name = f"{one.name}/{portion.name}" if portion.name else one.name
            mixed.append(Portion(name, portion.samples, portion.times * times))
    return mixed


def weights_of(portions: Sequence[Portion]) -> list[tuple[int, Fraction]]:
    """As `mm_data.order` takes them: none where all samples are shown alike."""
    return [(one.samples, one.times) for one in portions] if any(one.times != 1 for one in portions) else []


def portions_of(sets: Iterable[SampleSet | None]) -> list[Portion]:
    """Of samples, each with its set: those of one set are one after another. Without sets all are one portion."""
    filled = []
    for _, group in groupby(sets, key=lambda one: None if one is None else one.number):
        members = list(group)
        filled.append((members[0] or SampleSet(Path(), ""), [Portion("", len(members))]))
    return mix(filled)


def _read_set(table: Mapping[str, Any], file: Path, number: int, of_features: bool) -> SampleSet:
    named = table.get("path")
    where = f"{file}, set {number + 1}" + (f" ({show(named)})" if isinstance(named, str) else "")
    known = [one.name for one in fields(SampleSet) if one.name not in ("name", "number", "prefix")]
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {show(key)}{_near(key, known)}; there are {', '.join(known)}")
        if of_features and key in OF_CLIPS:
            raise ValueError(
                f"{where}: {key} is for clips, and features are made already: give it when extracting them"
            )
    if not isinstance(named, str) or not named:
        raise ValueError(f"{where}: path is {show(named)}; it must be a folder, a list, or features")
    path = file.parent / os.path.expanduser(named)
    if not os.path.exists(path):
        near = get_close_matches(path.name, os.listdir(path.parent), n=1) if os.path.isdir(path.parent) else []
        raise ValueError(f"{where}: {path} is not there" + (f", did you mean {near[0]}?" if near else ""))
    if is_sets_file(path):
        raise ValueError(f"{where}: {path} is a file of sets itself: write its sets here")
    if "repeats" in table and "weight" in table:
        raise ValueError(
            f"{where}: both repeats ({show(table['repeats'])}, how often each sample is shown in an epoch) and weight "
            f"({show(table['weight'])}, a share of all that is shown): keep one of them"
        )
    repeats, weight = (_number(table.get(key), key, where) for key in ("repeats", "weight"))
    if weight is not None and weight > 1:
        raise ValueError(
            f"{where}: weight is {show(table['weight'])}; it is a share of all that is shown, more than 0 and at most "
            "1: for how often each sample is shown, give repeats"
        )
    return SampleSet(
        path=path,
        name=named,
        number=number,
        prefix=_prefix(named if path.is_dir() else os.path.dirname(named)),
        repeats=repeats or Fraction(1),
        weight=weight,
        sizes=_sizes(table.get("sizes"), where),
        frames=None if table.get("frames") is None else _whole(table["frames"], "frames", where),
        caption=_text(table.get("caption"), "caption", where),
        caption_prefix=_text(table.get("caption_prefix"), "caption_prefix", where) or "",
    )


def _prefix(folder: str) -> str:
    plain = Path(os.path.normpath(folder)).as_posix() if folder else "."
    return "" if plain == "." else f"{plain.rstrip('/')}/"


def _check_weights(path: Path, sets: Sequence[SampleSet]) -> None:
    weights = [one.weight for one in sets if one.weight is not None]
    total = sum(weights, Fraction(0))
    said = " + ".join(f"{float(weight):g}" for weight in weights)
    if len(weights) == len(sets) and abs(total - 1) > Fraction(1, 1000):
        even = ", ".join(f"{float(weight / total):.3g}" for weight in weights)
        raise ValueError(
            f"{path}: all sets have a weight, and {said} is {float(total):g}, not 1: a weight is a share of all that "
            f"is shown. Give {even}, or leave out the weight of those that are shown whole"
        )
    if len(weights) < len(sets) and total >= 1:
        raise ValueError(
            f"{path}: the weights {said} are {float(total):g}, which leaves nothing to the sets without one: they must "
            "be less than 1 together"
        )


def _number(value: Any, name: str, where: str) -> Fraction | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
        raise ValueError(f"{where}: {name} is {show(value)}; it must be a number of more than 0")
    return Fraction(str(value))  # 0.2 is a fifth


def _whole(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise ValueError(f"{where}: {name} is {show(value)}; it must be a whole number from 1")
    return value


def _sizes(value: Any, where: str) -> tuple[tuple[int, int], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(isinstance(one, list) and len(one) == 2 for one in value):
        raise ValueError(f"{where}: sizes is {show(value)}; it must be [[height, width], …], as [[480, 832]]")
    sizes = tuple((_whole(one[0], "a height", where), _whole(one[1], "a width", where)) for one in value)
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"{where}: sizes has one of them twice: {show(value)}; to show samples often, give repeats")
    return sizes


def _text(value: Any, name: str, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {show(value)}; it must be text")
    return value


def _near(key: str, known: Sequence[str]) -> str:
    # What other trainers call it, then what is spelled alike.
    theirs = {"num_repeats": "repeats", "resolution": "sizes", "resolutions": "sizes", "folder_path": "path"}
    theirs |= {"video_directory": "path", "image_directory": "path", "num_frames": "frames", "target_frames": "frames"}
    theirs |= {"frame_buckets": "frames", "trigger_word": "caption_prefix", "default_caption": "caption"}
    theirs |= {"directory": "set", "datasets": "set", "sets": "set"}
    near = [theirs[key]] if theirs.get(key) in known else get_close_matches(key[:80], known, n=1)
    order = " (height first)" if near and "resolution" in key else ""  # elsewhere the width is
    return f", did you mean {near[0]!r}{order}?" if near else ""
