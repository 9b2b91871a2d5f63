"""Imported once, by the server from which ranks are forked: it imports what the process that started it has imported.

The names lie in a file, one on each line, as they are more than an argument of a command can hold. The environment
names the file: `mm_parallel.testing.ranks` sets it.
"""

import contextlib
import os
from pathlib import Path

_file = Path(os.environ.get("MM_PARALLEL_PRELOAD", ""))
for _name in _file.read_text(encoding="utf-8").splitlines() if _file.is_file() else ():
    with contextlib.suppress(Exception):  # what cannot be imported here is left to the ranks
        __import__(_name)
