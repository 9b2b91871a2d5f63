"""What files hold, by their sizes and a part of their bytes: cheap where hashing all of them would take hours.

Time stamps say nothing: they are kept by `cp -p` and `rsync -a`, and differ between the disks of two hosts.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mm_data.files import open_file

_BLOCK = 4096  # bytes read at each place
_PLACES = 16384  # of all files together: 64 MiB
_FILES = 4096  # of which bytes are read; of more, every so manieth
_THREADS = 16


def identify_file(path: str | Path, places: int = 4096) -> str:
    """Size of a file and a hash of what stands at so many places of it, evenly spaced; of all, where it is smaller.

    Raises as `open_file`.
    """
    digest = hashlib.sha256()
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= places * _BLOCK:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for place in range(places):
                file.seek((size - _BLOCK) * place // max(1, places - 1))
                digest.update(file.read(_BLOCK))
    return f"{size:,} bytes, {digest.hexdigest()[:16]}"


def identify_files(files: Mapping[str, Path]) -> dict[str, str]:
    """The identity of each file, by its name here. At most 64 MiB are read, of thousands of files, at a few seconds.

    Of more than 4,096 files, the bytes of every so manieth are looked at, and of the others the sizes. A file that is
    not there is `missing`.
    """
    places = min(max(_PLACES // max(1, len(files)), 4), 4096)
    every = -(-len(files) // _FILES)

    def identify(numbered: tuple[int, Path]) -> str:
        number, path = numbered
        try:
            return f"{path.stat().st_size:,} bytes" if number % every else identify_file(path, places)
        except FileNotFoundError:
            return "missing"

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(identify, enumerate(files.values())), strict=True))


def files_below(folder: Path) -> dict[str, Path]:
    """The files of a folder and of those in it, by their path from there, without hidden ones; a file by its name."""
    if folder.is_file():
        return {folder.name: folder}
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in found}
    return {str(name): path for path, name in names.items() if not any(part.startswith(".") for part in name.parts)}
