"""A rank that fails before it joins the others tells them why. Needs torch only then."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def absence_told() -> Iterator[None]:
    """Around what a program does before `mm_parallel.guard.join`: where that fails, the ranks that wait hear why.

    What it says on stderr is the reason, so let it say it in here. It is shown by the first rank alone; a rank that
    fails for a reason of its own shows that, too. Alone it does nothing.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not world.isdecimal() or int(world) < 2:
        yield
        return
    said = _Copy(sys.stderr if rank == "0" else None)
    try:
        with redirect_stderr(said):
            yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        reason = said.getvalue().strip().removeprefix(f"[rank {rank}] ") or f"{type(error).__name__}: {error}"
        from mm_parallel.guard.join import tell_absence  # torch, only now

        heard = tell_absence(reason, 5)
        if rank != "0" and heard != reason:
            sys.stderr.write(said.getvalue())
        if heard is None:
            tell_absence(reason, 55)
        raise


class _Copy(io.StringIO):
    """What is written here is shown there at once, too."""

    def __init__(self, shown: io.TextIOBase | None) -> None:
        super().__init__()
        self._shown = shown

    def write(self, text: str) -> int:
        if self._shown is not None:
            self._shown.write(text)
            self._shown.flush()
        return super().write(text)
