"""Every field of every command refuses what it does not take, by name, before anything is loaded.

The wrong values are made from the dataclasses. A new field is tried without a word here; a number without limits fails.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest

from mm_convert import cli
from mm_convert.cli.arguments import Option, options_of
from mm_convert.cli.commands import CONVERT, READING
from mm_convert.cli.options import Convert, _option
from mm_convert.cli.values import Kind, check_config, check_value, kinds_of
from mm_convert.guides.table import CONVERTERS, WRITING
from mm_infer import caption, chat
from mm_infer.__main__ import main as infer
from mm_infer.config import Config as InferConfig
from mm_infer.page import __main__ as page
from mm_models.families import FAMILIES
from mm_train import doctor, export, extract
from mm_train.__main__ import main as train
from mm_train.config import Config
from mm_train.doctor import DoctorConfig
from mm_train.export import ExportConfig
from mm_train.extract import ExtractConfig
from mm_train.page import __main__ as runs

MODEL = "wan2.1-t2v-1.3b"
TEXTS = [
    "",
    "x",
    "1.5",
    "-7",
    "0",
    "true",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1" + "0" * 30,
    "0x10",
    "1_",
    "~",
    "[",
    "[]",
    "[x]",
    "{}",
    "{",
]
VALUES = [
    '""',
    '"x"',
    "1.5",
    "-7",
    "0",
    "true",
    "1" + "0" * 30,
    "nan",
    "inf",
    "1979-05-27",
    "[]",
    "[[]]",
    "[true]",
    '["x"]',
    "{ a = 1 }",
]

OF_TRAINING = {option.name for option in options_of(Config)}  # tried once

Main = Callable[[list[str]], None]


def row_of(command) -> list[Option]:
    own = {option.name: option for option in options_of(Convert)}
    return [_option(flag.name or flag.field, flag, own.get(flag.field)) for flag in (*WRITING, *command.flags)]


def commands() -> Iterator[tuple[str, Main, list[Option]]]:
    """(what it is called, how it is started, its options)"""
    yield "mm_train", train, list(options_of(Config))
    yield "mm_train.doctor", doctor.main, [one for one in options_of(DoctorConfig) if one.name not in OF_TRAINING]
    yield "mm_train.extract", extract.main, list(options_of(ExtractConfig))
    yield "mm_train.export", export.main, list(options_of(ExportConfig))
    yield "mm_infer", infer, list(options_of(InferConfig))
    yield "mm_infer.chat", chat.main, list(options_of(chat.Config))
    yield "mm_infer.page", page.main, list(options_of(page.Serving))  # all else is mm_infer's, or mm_infer.chat's
    yield "mm_train.page", runs.main, [one for one in options_of(runs.Config) if not one.positional]
    yield "mm_infer.caption", caption.main, list(options_of(caption.Config))
    rows = {("convert",): CONVERT} | {
        (name, method): row for name, methods in CONVERTERS.items() for method, row in methods.items()
    }
    for words, row in rows.items():
        yield " ".join(words), lambda argv, words=words: cli.main([*words, *argv]), row_of(row)
    for name, (options, _) in READING.items():
        yield name, lambda argv, name=name: cli.main([name, *argv]), list(options_of(options))


COMMANDS = {name: (main, options) for name, main, options in commands()}


# --- what a type takes, said once more and otherwise than the programs do


def takes(kind: Kind, value: Any, typed: bool) -> bool:
    """Whether a value is of this kind; typed: it is the text of a flag."""
    hint, origin, inside = kind.hint, typing.get_origin(kind.hint), typing.get_args(kind.hint)
    if origin is Literal:
        return value in map(str, inside) if typed else any(value is one or value == one for one in inside)
    if origin in (list, tuple):
        items = re.findall(r"[^\[\], ]+", value) if typed else value
        if not (re.fullmatch(r"\[[^\[\]]*\]", value) if typed else isinstance(value, list)):
            return typed and value.startswith("[[") and value.endswith("]]")
        many = len(items) if origin is list or inside[1:] == (...,) else len(inside)
        return len(items) == many and all(any(takes(one, item, typed) for one in kinds_of(inside[0])) for item in items)
    if origin is dict:
        return value.startswith("{") and value.endswith("}") if typed else isinstance(value, dict)
    if hint is type(None):
        return value == "null"
    if hint in (str, Path):
        return isinstance(value, str) and (hint is str or value != "")
    if hint is bool:
        return value in ("true", "false") if typed else isinstance(value, bool)
    number = r"[+-]?\d+" if hint is int else r"[+-]?\d+(\.\d+)?(e\d\d?)?"
    if not re.fullmatch(number, value if typed else repr(value)):
        return False
    fits = hint is float or len(str(value)) < 20
    return fits and all(eval(f"{value} {limit.sign} {limit.bound}") for limit in kind.limits)


def outside(hint: Any) -> list[str]:
    """Numbers beyond the limits, and items beyond theirs in lists."""
    found = []
    for kind in kinds_of(hint):
        inside = [part for part in typing.get_args(kind.hint) if part is not ...]
        for limit in kind.limits:
            step = {">=": -1, ">": 0, "<=": 1, "<": 0, "!=": 0}[limit.sign]
            found += [str(int(limit.bound) + step), str(int(limit.bound) + 1000 * step)]
        if typing.get_origin(kind.hint) in (list, tuple):
            items = [*outside(inside[0]), "nan", "true", '"x"']
            found += [f"[{', '.join([item] * (len(inside) if len(inside) > 1 else 2))}]" for item in items]
    return found


def wrong(option: Option) -> tuple[list[str], list[str]]:
    """Texts for a flag, and values for TOML, that an option does not take."""
    kinds = list(kinds_of(option.hint))
    texts = dict.fromkeys([*TEXTS, *outside(option.hint)])
    values = dict.fromkeys([*VALUES, *outside(option.hint)])
    return (
        [text for text in texts if not any(takes(kind, text.replace('"', ""), True) for kind in kinds)],
        [text for text in values if not any(takes(kind, tomllib.loads(f"a = {text}")["a"], False) for kind in kinds)],
    )


def numbers(hint: Any) -> Iterator[Kind]:
    for kind in kinds_of(hint):
        if kind.hint in (int, float):
            yield kind
        for inner in typing.get_args(kind.hint) if typing.get_origin(kind.hint) in (list, tuple, dict) else ():
            yield from numbers(inner) if inner is not ... else ()


# --- the tests


def refusal(main: Main, argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2, (argv, stop.value.code, error)
    assert error.count("\n") == 1, (argv, error)
    return error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_limits(command):
    for option in COMMANDS[command][1]:
        for number in numbers(option.hint):
            assert number.limits, f"{option.name} of {command} is a number without limits: Annotated[…, '>= 0']"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_size_of_an_architecture_has_limits(family):
    for option in options_of(family.config):
        assert all(number.limits for number in numbers(option.hint)), option.name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_wrong_value_is_refused_by_name(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main, options = COMMANDS[command]
    for option in options:
        texts, values = wrong(option)
        assert values, option.name
        *tables, key = option.name.split(".")
        for text in texts:
            flag = option.name if option.positional else f"--{option.name}"
            # those behind it are missing, which is said only of what is right
            argv = [text] if option.positional else [f"{flag}={text}"]
            argv = ["p", *argv] if option.name in ("target", "b") else argv
            assert f"error: {flag} is " in refusal(main, argv, capsys), (option, text)
        for value in values:
            Path("my.toml").write_text(f"[{'.'.join(tables)}]\n{key} = {value}\n" if tables else f"{key} = {value}\n")
            said = refusal(main, ["--config", "my.toml"], capsys)
            assert f"my.toml: {option.name} is " in said, (option, value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_wrong_size_of_an_architecture_is_refused_by_name(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = next(iter(family.presets))
    for option in options_of(family.config):
        _, values = wrong(option)
        for value in values:
            table = f"[architecture]\n{option.name} = {value}\n"
            Path("my.toml").write_text(table)
            said = [refusal(train, ["--model", model, "--config", "my.toml"], capsys)]
            if value != "1979-05-27":  # JSON has no dates
                table = json.dumps(tomllib.loads(table)["architecture"])
                said.append(refusal(train, ["--model", model, "--architecture", table], capsys))
            for one in said:
                assert f"--architecture: {option.name} is " in one, (value, one)


def test_it_is_refused_without_torch():
    for module, flag in product(
        ("mm_train.__main__", "mm_train.extract", "mm_infer.__main__", "mm_infer.chat", "mm_infer.caption"),
        ("--model",),
    ):
        script = (
            f"import sys\nfrom {module} import main\ntry:\n    main(['{flag}'])\n"
            "except SystemExit as stop:\n    sys.exit(0 if stop.code == 2 and 'torch' not in sys.modules else 1)"
        )
        assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).returncode == 0, module


@pytest.mark.parametrize("command", COMMANDS)
def test_every_default_fits_its_field(command):
    for option in COMMANDS[command][1]:
        if not option.required:
            check_value(option.name, option.default, option.hint)
    for family in FAMILIES:
        for preset in family.presets.values():
            check_config(preset.config)
