"""The videos that a command asks for: prompts, images and videos from flags, or from files with one line for each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_convert import read_text
from mm_infer.config import Config

SOURCES = ("image", "video", "mask", "references")


@dataclass(frozen=True)
class Request:
    """One video: its prompt, and what else it is made from, by the names of `mm_infer.inputs.Given`."""

    prompt: str
    given: dict[str, Any]


def read_requests(config: Config) -> list[Request]:
    """The videos asked for, in order. What a flag says goes with every line of the files.

    Raises ValueError for files of different lengths or without a line, OSError for one that cannot be read.
    """
    files = {"prompt": config.prompt_file} | {name: getattr(config, f"{name}_file") for name in SOURCES}
    columns = {name: _lines(file) for name, file in files.items() if file is not None}
    lengths = {str(files[name]): len(lines) for name, lines in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{file} has {count}" for file, count in lengths.items())
        raise ValueError(f"the files must have a line for each video, all as many: {counts}")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] or [{}]
    return [Request(row.pop("prompt", config.prompt), _given(config, row)) for row in rows]


def _given(config: Config, row: dict[str, str]) -> dict[str, Any]:
    """Of a line, or of the flag."""
    given: dict[str, Any] = {name: getattr(config, name) for name in (*SOURCES, "last_image")}
    given |= {name: Path(line) for name, line in row.items()}
    if "image" in row:
        images = _several(row["image"])
        if len(images) > 2 or (len(images) == 2 and config.last_image is not None):
            raise ValueError(f"{config.image_file}: {row['image']!r}: one image, or the first and the last")
        given["image"], given["last_image"] = (*images, config.last_image)[:2]
    references = row.get("references", config.references) or []
    given["references"] = tuple(references if isinstance(references, list) else _several(str(references)))
    return {name: value for name, value in given.items() if value}


def _several(line: str) -> list[Path]:
    """Paths with commas between them; a file whose own name has a comma is one. ValueError for commas alone."""
    if Path(line).exists():
        return [Path(line)]
    paths = [Path(part.strip()) for part in line.split(",") if part.strip()]
    if not paths:
        raise ValueError(f"{line!r} names no file: paths stand with commas between them")
    return paths


def _lines(file: Path) -> list[str]:
    """ValueError for a file that is empty or no UTF-8 text."""
    text = read_text(file)
    # Not splitlines, which would also cut at U+2028 and U+0085, inside what an editor shows as one line.
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no lines: it should have one for each video")
    return lines
