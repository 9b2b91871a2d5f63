"""Every process of the tests computes on one thread.

OpenMP's threads spin while they wait, so beside one other busy process two of them take ten times as long as one.
"""

import gc
import os
from collections.abc import Iterator

import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported
# Inductor believes /proc/cpuinfo, and does not also build and load a program for each set of instructions: 10 s.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What the test files import is nobody's garbage: a collection need not look at it, nor while it is imported."""
    gc.disable()
    found = yield
    gc.freeze()
    gc.enable()
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take a minute go first, or a worker would be left alone with one of them in the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
