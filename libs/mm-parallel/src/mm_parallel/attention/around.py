"""What is to see calls of our attention ops, and nothing else: recompute, which keeps what they make.

A dispatch mode around a whole layer would see them, too, but also everything else, and what a mode watches is not
compiled.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_mode: ContextVar[TorchDispatchMode | None] = ContextVar("around our attention ops", default=None)


class Around:
    """Within, in this thread, every attention op is called under the mode. May be entered again when it is left."""

    def __init__(self, mode: TorchDispatchMode) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        self._token = _mode.set(self.mode)

    def __exit__(self, *_: object) -> None:
        _mode.reset(self._token)


def call(op: Callable, *args: Any) -> Any:
    mode = _mode.get()
    if mode is None:
        return op(*args)
    with mode:
        return op(*args)
