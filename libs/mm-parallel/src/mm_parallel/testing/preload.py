"""Imported once, by the server from which ranks are forked: it imports what the process that started it has imported.

The names lie in a file, as they are more than an argument of a command can hold.
"""

import contextlib
import os
from pathlib import Path

NAMES = "MM_PARALLEL_PRELOAD"
"""The environment variable that names the file, a name on each line."""

_file = Path(os.environ.get(NAMES, ""))
for _name in _file.read_text().splitlines() if _file.is_file() else ():
    with contextlib.suppress(Exception):  # what cannot be imported here is left to the ranks
        __import__(_name)
