"""What our own layout has besides its tensors: a config.json with format and version, and a manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

FORMAT, VERSION = "mm", 1  # of our own config.json
FOLDER = "mm"  # our files, in a folder that holds published ones too
MANIFEST = "mm_convert.json"  # beside every output: where it comes from, and what reading it back may need to know

# Of a published model: their names say nothing, and the folder around them is the model's.
_PARTS = ("transformer", "transformer_2", "high_noise_model", "low_noise_model")


def name_of(path: str | Path) -> str:
    """What a model or an adapter at a path is called where others read it: its name, without the way to it.

    A `str` of the form ORGANISATION/NAME is a name already. In the hub's cache it is that of the repository; of a
    folder as transformer/ that of the one around it.
    """
    if isinstance(path, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", path):
        return path
    parts = [part for part in PureWindowsPath(path).parts if part.strip("\\/.")]  # either kind of slash
    for part in parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    return next((part for part in reversed(parts) if part not in _PARTS), parts[-1] if parts else "")


def as_json(content: Mapping[str, Any]) -> bytes:
    """A JSON file: keys sorted, so that the same content is the same bytes; in ASCII, which any terminal shows."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
