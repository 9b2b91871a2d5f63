"""What files hold, by their sizes and a part of their bytes: cheap where hashing all of them would take hours.

Time stamps say nothing: they are kept by `cp -p` and `rsync -a`, and differ between the disks of two hosts.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mm_data.files import identify_file

_PLACES = 16384  # of 4 KiB, of all files together
_FILES = 4096  # of which bytes are read; of more, every so manieth
_THREADS = 16


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
