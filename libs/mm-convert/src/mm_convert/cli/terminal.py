"""What programs print: no text in it commands a terminal, and no terminal ends a program."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

# Controls (C0 without tab and newline, DEL, C1), separators of lines, what turns the direction of text, half characters
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_OF_BARS = re.compile("\r|(\x1b\\[A)+$")
_NAME = 255  # bytes of a name, on all usual file systems
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)  # the reader of a pipe has ended, or a terminal was closed


def escape(text: str) -> str:
    """The text with all that a terminal would obey instead of show as `\\x1b` or `\\u202e`; lines stay lines."""
    return COMMANDS.sub(_spell, text)


def one_line(said: object) -> str:
    """A message on one line, whatever stands in the names of files that it holds."""
    return escape(explain(said)).replace("\n", "\\n")


def explain(said: object) -> str:
    """A message, or that of an error; of a name that no file can have, in words that say which it is."""
    if not isinstance(said, OSError) or said.errno != errno.ENAMETOOLONG or said.filename is None:
        return str(said)
    path = os.fsdecode(said.filename)
    name = max(path.split(os.sep), key=lambda part: len(os.fsencode(part)))
    size, whole = len(os.fsencode(name)), len(os.fsencode(path))
    if size > _NAME:
        return f"{name[:40]}… is a name of {size} bytes, and a file's has at most {_NAME}: is it meant to be a path?"
    return f"{path[:40]}… is a path of {whole:,} bytes, more than the system takes: give a shorter one"


def _spell(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


@contextmanager
def escaped_output() -> Iterator[None]:
    """In this block sys.stdout and sys.stderr show names of files and captions as they are, and obey none of them.

    A `main` runs in it: also what libraries print, warn and log there is escaped, and a traceback. A character that a
    stream cannot encode is spelled. Where nobody reads any more (`| head`, a closed terminal), what is printed is
    dropped, and the work goes on.
    """
    with ExitStack() as stack:
        # Of a stream that was closed when the program began:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        streams = [_Escaped(stream or nowhere) for stream in (sys.stdout, sys.stderr)]
        stack.enter_context(redirect_stdout(streams[0]))  # type: ignore[type-var]
        stack.enter_context(redirect_stderr(streams[1]))  # type: ignore[type-var]
        try:
            yield
        except SystemExit as stop:
            if isinstance(stop.code, str):  # Python prints it when the block is left
                raise SystemExit(escape(stop.code)) from None
            raise
        except Exception as error:
            traceback.print_exc()
            raise SystemExit(1) from error
        finally:
            for stream in streams:
                stream.flush()


class _Escaped:
    """A text stream that escapes what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        # Of bars, on a terminal only: one begins its line anew, several move up; in a name it would hide what is there.
        moves = _OF_BARS.match(text) if self._stream.isatty() else None
        start = moves[0] if moves else ""
        encoding = self._stream.encoding or "utf-8"
        shown = start + escape(text[len(start) :]).encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._stream.write(shown)
        except OSError as error:
            self._drop(error)
        return len(text)

    def paint(self, colour: int) -> None:
        """What is written from now on is in a colour (of "select graphic rendition": 32 is green, 0 ends it)."""
        self._stream.write(f"\x1b[{colour}m")

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Let all that is still to come go nowhere, and what is waiting to be written, too."""
        if error.errno not in _GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
