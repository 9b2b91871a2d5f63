"""Which files weights are made of."""

from __future__ import annotations

import os
from pathlib import Path

from mm_convert.lora.reading import find_halves
from mm_convert.read.experts import FILE, open_experts
from mm_convert.read.source import find
from mm_convert.store.dcp import INDEX
from mm_convert.store.mm import MANIFEST

_BESIDE = ("config.json", "adapter_config.json", MANIFEST, INDEX)  # they say how the tensors are to be taken


def weight_files(path: str | Path) -> dict[str, Path]:
    """The files that opening a model, an adapter, or two experts of either, at a path reads: by their path from there.

    Raises ValueError where nothing can be read.
    """
    path = Path(path)
    pair = open_experts(path) if path.is_dir() else None
    files: list[Path] = [path / FILE] if pair and (path / FILE).is_file() else []
    for folder in (pair.high, pair.low) if pair else (*find_halves(path).values(),) or (path,):
        source = find(folder)
        files += source.files
        files += [file for file in (source.folder / name for name in _BESIDE) if file.is_file()]
    start = path if path.is_dir() else path.parent
    return {os.path.relpath(file, start): file for file in dict.fromkeys(files)}
