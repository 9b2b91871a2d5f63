"""What our own layout has besides its tensors: a config.json with format and version, and a manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT, VERSION = "mm", 1  # of our own config.json
FOLDER = "mm"  # our files, in a folder that holds published ones too
MANIFEST = "mm_convert.json"  # beside every output: where it comes from, and what reading it back may need to know


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error


def as_json(content: Mapping[str, Any]) -> bytes:
    """A JSON file: keys sorted, so that the same content is the same bytes; in ASCII, which any terminal shows."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
