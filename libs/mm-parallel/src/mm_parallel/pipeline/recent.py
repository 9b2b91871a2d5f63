"""What was asked for last, kept."""

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The `size` values by name that were asked for last."""

    def __init__(self, size: int) -> None:
        self.size, self.values = size, {}

    def get(self, name: str, make: Callable[[], Value]) -> Value:
        """The value, made where it is not there."""
        value = self.values.pop(name) if name in self.values else make()
        self.values[name] = value  # the newest is last
        if len(self.values) > self.size:
            del self.values[next(iter(self.values))]
        return value
