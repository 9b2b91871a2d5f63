"""Configurations in which some names may be MindSpeed-MM's."""

import json
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from mm_train.guides.names import OURS, SECTIONS, Section, row_of
from mm_train.guides.translate import number, translate, translate_data, value_of


def from_guides(section: Section, given: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """One section of a configuration in which some names may be MindSpeed-MM's: all of it in ours, and notes.

    Names that are neither are kept, for the parser to complain of. Raises ValueError as `translate` does, and for a
    field that is given under both names.
    """
    own = {name: value for name, value in given.items() if name in OURS[section]}
    theirs = {name: value for name, value in given.items() if _is_theirs(section, name)}
    rest = {name: value for name, value in given.items() if name not in own and name not in theirs}
    if section == "data":
        found, notes = translate_data(theirs)
    else:
        known = _context_of(own, theirs)
        parallel, memory, notes = translate(known | theirs)
        found = parallel if section == "parallel" else memory
        if "context_parallel_size" in known:  # it was ours, under whichever of its three names
            found.pop("cp", None)
    for name in theirs:
        for field in row_of(name).ours:
            if field in own and field in found:
                raise ValueError(f"{section}.{name} and {section}.{field} are two names of one thing: give one of them")
    return found | own | rest, notes


def _context_of(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What their names must know of ours to be translated, under their names."""
    if not theirs:
        return {}
    known = {}
    values = {name: value_of(value) for name, value in own.items()}
    sizes = {n: number(f"parallel.{n}", values[n]) for n in ("cp", "ulysses", "ring") if values.get(n) is not None}
    if sizes:
        known["context_parallel_size"] = sizes.pop("cp", None) or prod(sizes.values())
    if isinstance(values.get("recompute"), int):
        known["recompute_num_layers"] = number("memory.recompute", values["recompute"], least=0)
    if values.get("but_attention") is not None:
        count = number("memory.but_attention", values["but_attention"], least=0)
        known["recompute_num_layers_skip_core_attention"] = count
    given = {row_of(name).guides for name in theirs}
    return {name: value for name, value in known.items() if name not in given}


def arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line with MindSpeed-MM's names under `--parallel.`, `--memory.` and `--data.` replaced by ours, and
    notes.

    Raises ValueError as `from_guides` does.
    """
    kept, sections = [], {section: {} for section in SECTIONS}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag = re.fullmatch(rf"--({'|'.join(SECTIONS)})\.([\w-]+)(?:=(.*))?", word, re.DOTALL)
        if flag is None:
            kept.append(word)
            continue
        section, name, value = flag.groups()
        if value is None:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        sections[section][name] = value
        if not _is_theirs(section, name):
            kept.append(f"--{section}.{name}={value}")
    notes = []
    for section, given in sections.items():
        ours, said = from_guides(section, given)
        kept += [f"--{section}.{name}={_text(value)}" for name, value in ours.items() if name not in given]
        notes += said
    return kept, notes


def _is_theirs(section: str, name: str) -> bool:
    row = row_of(name)
    return row is not None and row.section == section and name not in OURS[section]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
