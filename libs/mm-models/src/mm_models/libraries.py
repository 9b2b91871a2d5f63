"""The libraries of other makers that programs here run on, and whether they are as new as they must be.

The bounds are those of the `pyproject.toml` of these packages; a test compares them. This file imports none of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

NEEDED = {
    "torch": "2.11",
    "transformers": "4.57",
    "diffusers": "0.37",
    "peft": "0.17",
    "safetensors": "0.5",
    "av": "17.1",
    "pillow": "11",
}
"""Lowest releases."""
ADAPTER = "torch-npu"
"""Made for one minor release of torch each."""


def installed() -> dict[str, str]:
    """The releases that are installed, by name; without those that are not."""
    found = {}
    for name in (*NEEDED, ADAPTER):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_libraries(found: Mapping[str, str] | None = None) -> str:
    """Raise ValueError for libraries that are missing or too old, all of them named. Returns what there is.

    found: releases by name; None: those that are installed.
    """
    found = installed() if found is None else found
    wrong = [f"{name} is not installed ({lowest} or newer)" for name, lowest in NEEDED.items() if name not in found]
    wrong += [
        f"{name} {found[name]} is older than {lowest}"
        for name, lowest in NEEDED.items()
        if name in found and _number(found[name]) < _number(lowest)
    ]
    if wrong:
        asked = " ".join(f"'{name}>={NEEDED[name]}'" for name in NEEDED if any(name in text.split() for text in wrong))
        raise ValueError(f"{'; '.join(wrong)}: pip install {asked}")
    if ADAPTER in found and _number(found[ADAPTER])[:2] != _number(found["torch"])[:2]:
        major, minor = _number(found["torch"])[:2]
        raise ValueError(
            f"{ADAPTER} {found[ADAPTER]} is for another release of torch than {found['torch']}: install {ADAPTER} "
            f"{major}.{minor}, or the torch that it is made for"
        )
    return ", ".join(f"{name} {found[name]}" for name in found)


def _number(release: str) -> tuple[int, ...]:
    """`2.13.0rc1+cpu` -> 2, 13, 0."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", release)[0].split(".")))
