"""A configuration as TOML that can be read back; YAML is read, too, as MindSpeed-MM's users have it."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from mm_convert.cli.terminal import COMMANDS
from mm_convert.files import TooDeep, parse_toml, read_text

_MAX_FILE = 2**18  # bytes of a configuration: YAML takes seconds for so many


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a file. ValueError, with its name, for one that cannot be read, or is neither TOML nor YAML."""
    try:
        text = read_text(path, _MAX_FILE)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    try:
        return parse_toml(text)
    except TooDeep as error:
        raise ValueError(f"{path} is nested too deeply: {error}") from None
    except tomllib.TOMLDecodeError as error:
        try:
            tables = yaml.load(text, _Loader)  # a SafeLoader
        except (yaml.YAMLError, RecursionError):
            tables = None
        except ValueError as refused:
            raise ValueError(f"{path}: {refused}") from None
        if not isinstance(tables, dict) or not all(isinstance(key, str) for key in tables):
            raise ValueError(f"{path} is not TOML: {error}") from None
        return tables
    except ValueError as error:  # a number of 5,000 digits
        raise ValueError(f"{path} is not TOML: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML without its surprises: of words that are not quoted, only null, true, false and numbers are not text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):  # a few lines of them can stand for a billion
            raise ValueError(f"line {line}: a configuration takes no aliases (*{event.anchor})")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and not event.value:
            raise ValueError(f"line {line}: a key has no value; null is none, and text that begins with # is quoted")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen:  # the second would replace the first unsaid; TOML refuses it, too
                raise ValueError(f"line {key.start_mark.line + 1}: {name} is there twice")
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)


for _tag, _pattern in {
    "null": "null",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)


def dump(config: Any) -> str:
    """The configuration, a dataclass or a mapping, as TOML that `--config` reads back to an equal one.

    None is written as "null". ValueError for a text with half characters, as names of files in another encoding have.
    """
    lines: list[str] = []
    _dump_table(_fields(config), "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def template(values: Mapping[str, Any], helps: Mapping[str, str], missing: Sequence[str]) -> str:
    """TOML to be filled in, from values by their dotted names: what is missing stands as a comment.

    `helps`: what is written above a value.
    """
    lines, table = [], ""
    for name in sorted(values, key=lambda name: name.rpartition(".")[0]):
        own, _, key = name.rpartition(".")
        if own != table:
            lines += ["", f"[{own}]"]
            table = own
        if helps.get(name):
            lines.append(f"# {helps[name]}")
        lines.append(f"# {_key(key)} =   (required)" if name in missing else f"{_key(key)} = {_toml(values[name])}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _fields(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _dump_table(values: Mapping[str, Any], prefix: str, lines: list[str]) -> None:
    tables = {k: _fields(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}
    lines += [f"{_key(k)} = {_toml(v)}" for k, v in tables.items() if not isinstance(v, Mapping)]
    for key, table in tables.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{prefix}{_key(key)}]"]
            _dump_table(table, f"{prefix}{_key(key)}.", lines)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: Any) -> str:
    if value is None:
        return '"null"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        if re.search("[\ud800-\udfff]", str(value)):
            raise ValueError(f"{str(value)!r} is not UTF-8 text, which a configuration is: give it another name")
        written = json.dumps(str(value), ensure_ascii=False)
        return COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", written)  # nothing that a terminal obeys
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    raise AssertionError(f"a configuration cannot hold a {type(value).__name__}: {value!r}")
