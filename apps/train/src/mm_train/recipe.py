"""From the command line to a Config, by way of the recipe that it selects.

Layouts, memory and data may be given by MindSpeed-MM's names (`--parallel.pipeline_num_layers`), see
`mm_train.guides`.

Precedence: defaults of the dataclasses < ``recipes/<recipe>.toml`` < a data JSON of MindSpeed-MM among the
conversations < ``--config mine.toml`` < flags.
"""

from __future__ import annotations

import contextlib
import sys
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from mm_convert.cli.arguments import parse
from mm_convert.cli.terminal import one_line
from mm_convert.cli.toml import read_tables
from mm_convert.cli.values import check_value, read_text
from mm_data.conversations.mindspeed import is_data_json, read_data_json
from mm_models.families import suggest
from mm_train import guides
from mm_train.config import Config, Listed
from mm_train.conversations import split

RECIPES = Path(str(resources.files("mm_train") / "recipes"))

AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_config(
    argv: list[str] | None = None, config_class: type[AnyConfig] = Config, prog: str = "python -m mm_train"
) -> AnyConfig:
    """Config from the command line, its TOML file, and the recipe that either of them selects.

    config_class: Config, or what a program has that takes more flags than these; prog: its name.
    """
    notes: list[str] = []
    try:
        argv, said = guides.arguments(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        sys.exit(2)

    def reword(tables: dict[str, Any]) -> dict[str, Any]:
        for section in guides.SECTIONS:
            if isinstance(tables.get(section), dict):
                ours, more = guides.from_guides(section, tables[section])
                tables = tables | {section: ours}
                notes.extend(more)
        return tables

    try:
        of_data, more = _data_json(argv)
    except ValueError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        sys.exit(2)
    notes += more
    defaults = [_recipe(argv), of_data]
    config = parse(config_class, argv, prog=prog, description=config_class.__doc__, defaults=defaults, reword=reword)
    for note in dict.fromkeys(said + notes):
        print(f"note: {one_line(note)}", file=sys.stderr)
    return config


def _recipe(argv: list[str]) -> dict[str, Any]:
    """The recipe as it stands below files and flags. Features have a geometry of their own."""
    tables = find_recipe(argv)
    data = tables.get("data", {})
    of_files = [said for file in _files(argv) if isinstance(said := file.get("data"), dict)]
    features = [said["features"] for said in of_files if "features" in said] + _values(argv, "data.features")
    if features and features[-1] != "null":
        data.pop("geometry", None)
    return tables


def _data_json(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What the data JSON of MindSpeed-MM among the conversations says of anything else than which they are, if it is
    there, and notes. ValueError for one that cannot be followed.
    """
    of_files = [said for file in _files(argv) if isinstance(said := file.get("data"), dict)]
    listed: list[Listed] = []
    with contextlib.suppress(ValueError):  # `parse` says why
        listed += [check_value("", said["conversations"], Listed) for said in of_files if "conversations" in said]
        listed += [read_text("", text, Listed) for text in _values(argv, "data.conversations")]
    files = [word for word in split(listed[-1]) if is_data_json(word)] if listed else []
    if not files:
        return {}, []
    if len(files) > 1:
        raise ValueError(f"--data.conversations names two data JSONs, {' and '.join(files)}: give one of them")
    said = read_data_json(files[0])
    data = {"chat": dict(said.options)} | ({"processor": said.processor} if said.processor else {})
    validation = {"validation": {"conversations": files}} if said.validation else {}
    return {"data": data, **validation}, [f"{files[0]}: {note}" for note in said.notes]


def find_recipe(argv: list[str]) -> dict[str, Any]:
    """The tables of the recipe that a command line or its files select, by `recipe` or `model`; {} where there is none.

    It has to be known before the flags are parsed, as its values lie below theirs.
    """
    chosen: dict[str, str] = {}
    for written in _files(argv):
        chosen |= {k: v for k, v in written.items() if k in ("model", "recipe") and isinstance(v, str)}
    for flag in ("model", "recipe"):
        for value in _values(argv, flag):
            chosen[flag] = value
    known = sorted(p.stem for p in RECIPES.glob("*.toml"))
    recipe = chosen.get("recipe", "")
    if recipe and recipe not in known:
        said = f"unknown recipe '{recipe}'{suggest(recipe, known)}; there are {', '.join(known)}"
        sys.stderr.write(f"error: {one_line(said)}\n")
        sys.exit(2)
    name = recipe or chosen.get("model", "")
    return read_tables(RECIPES / f"{name}.toml") if name in known else {}


def _files(argv: list[str]) -> list[dict[str, Any]]:
    """The tables of the files that `--config` names. One that cannot be read is left out: `parse` says why."""
    read = []
    for file in _values(argv, "config"):
        with contextlib.suppress(ValueError):
            read.append(read_tables(Path(file)))
    return read


def _values(argv: list[str], flag: str) -> list[str]:
    """What follows `--flag`, each time it is given."""
    spaced = [value for word, value in pairwise(argv) if word == f"--{flag}"]
    return spaced + [word.partition("=")[2] for word in argv if word.startswith(f"--{flag}=")]
