"""Every process of the tests computes on one thread.

OpenMP's threads spin while they wait, so beside one other busy process two of them take ten times as long as one.
"""

import os

import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take a minute go first, or a worker would be left alone with one of them in the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
