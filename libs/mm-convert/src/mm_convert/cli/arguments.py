"""The strict command line shared by mm-convert, mm-train and mm-infer.

A configuration is a tree of plain dataclasses; the string below a field is its help:

    @dataclass
    class Optim:
        "How the weights move."
        lr: float = 1e-4
        "learning rate at its peak"

    @dataclass
    class Config:
        model: str
        "a preset, for example wan2.1-t2v-1.3b"
        optim: Optim = field(default_factory=Optim)

    config = parse(Config, prog="mm_train")

reads `--optim.lr 3e-4`, `--config mine.toml` (the same names, as TOML tables; may be given several times) and
`--print_config` (`=comments` adds what the fields mean). Later beats earlier: dataclass defaults, files of `defaults`,
environment variables where the program has them, `--config`, flags. A field without default is required. An unknown
flag or key, or a value of the wrong type, ends with exit code 2 and the nearest name.
Lists are written `[1, 2]` or `[[5,5],[5,5]]`, a true bool `--flag` or `--flag true`. None is written `null` on the
command line and "null" in TOML, which has no word for it. In a union the first member that fits wins: write
`int | str`, not `str | int`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import os
import re
import sys
import textwrap
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

T = TypeVar("T")

_REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One field that takes a value: its dotted name, its type, its default and its help."""

    name: str
    hint: Any
    default: Any
    help: str
    positional: bool

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED


def parse(
    config_class: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
    defaults: Sequence[Path] = (),
    environment: str = "",
    reword: Callable[[dict[str, Any]], dict[str, Any]] = lambda tables: tables,
) -> T:
    """Read the command line into an instance of the dataclass `config_class`.

    Args:
        argv: arguments without the program's name; None takes sys.argv[1:].
        defaults: TOML files (recipes) that stand between the dataclass defaults and `--config`; missing is an error.
        environment: environment variables that begin so are values too: this prefix and the name of the field in upper
            case, with two underscores for each dot.

        reword: gives the tables of a file in our names where they may have others; its ValueErrors are reported, too.

    A ValueError of a `__post_init__` is reported like any other wrong value. Errors: SystemExit(2), text on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog=prog, description=description or inspect.getdoc(config_class), allow_abbrev=False)
    leaves = {leaf.name: leaf for leaf in _leaves(config_class)}
    _refuse_unknown_flags(parser, argv, leaves)

    values: dict[str, Any] = {}
    for file in defaults:
        values |= _read_file(parser, Path(file), leaves, reword)
    values |= _read_environment(parser, environment, leaves) if environment else {}
    for file in _config_files(parser, argv):
        values |= _read_file(parser, Path(file), leaves, reword)

    printing = next((word for word in argv if word.partition("=")[0] == "--print_config"), "")
    parser.add_argument(
        "--config", type=list[str], metavar="FILE", help="values from this TOML or YAML; may be repeated"
    )
    parser.add_argument("--print_config", action="store_true", help="print the resulting configuration and exit")
    _add_leaves(parser, config_class, leaves, values, missing_is_fine=bool(printing))
    namespace = parser.parse_args(_for_jsonargparse(argv, leaves))
    missing = [name for name, leaf in leaves.items() if printing and namespace.get(name) is None and leaf.required]
    if missing or printing == "--print_config=comments":
        print(_template(leaves, namespace, missing, "comments" in printing), end="")
        sys.exit(0)
    try:
        config = _instantiate(config_class, namespace)
    except ValueError as error:
        parser.error(str(error))
    if printing:
        print(dump(config), end="")
        sys.exit(0)
    return config


def dump(config: Any) -> str:
    """The configuration as TOML that `--config` reads back to an equal one; None is written as "null"."""
    lines: list[str] = []
    _dump_table(_fields(config), "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean X?` for the known name closest to `name`, or an empty text."""
    known = sorted(known)
    wrong_table = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]  # lr for optim.lr
    close = wrong_table or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


# --- reading


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for action in self._actions if "are required: " in message else ():
            if action.required and action.option_strings:  # jsonargparse names them without dashes
                message = re.sub(rf"(?<=[ ,]){re.escape(action.dest)}(?=,|$)", f"--{action.dest}", message)
        sys.stderr.write(f"{self.prog}: error: {_plain(message)}\n(all options: {self.prog} --help)\n")
        sys.exit(2)


def _plain(message: str) -> str:
    """jsonargparse's message on one line, without its inner words."""
    message = re.sub(r"^(Validation failed: )?Parser key \"(.*?)\":", r"\2:", message.strip())
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("typing.", "").replace("NoneType", "null")
    union = r"Does not validate .*? Subtypes: \[([^:]*)\] Errors: [^:]* Given value type: \w+ Given value: "
    message = re.sub(union, r"Expected one of \1. Got value: ", " ".join(message.split()))
    example = ' (a list is written ["a", "b"] or [1, 2])'
    return message + (example if re.search(r"Expected [^.]*\b(tuple|list)\b", message) else "")


def _leaves(cls: type, prefix: str = "") -> Iterator[_Leaf]:
    hints, helps = typing.get_type_hints(cls), _field_docs(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{field.name}.")
        else:
            inside = any(dataclasses.is_dataclass(part) for part in typing.get_args(hint))
            assert not inside, f"{prefix}{field.name}: a table is always there; give it a field that switches it off"
            default = _default(field)
            positional = field.metadata.get("positional", False)
            yield _Leaf(prefix + field.name, hint, default, helps.get(field.name, ""), positional)


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _field_docs(cls: type) -> dict[str, str]:
    """The string literals that follow the fields in the source, base classes first."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        except (OSError, TypeError):  # made in a REPL or by make_dataclass: no source, no help
            continue
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[field.target.id] = " ".join(str(doc.value.value).split())
    return docs


def _refuse_unknown_flags(parser: _Parser, argv: list[str], leaves: Mapping[str, _Leaf]) -> None:
    positional = {name for name, leaf in leaves.items() if leaf.positional}
    flags = (set(leaves) - positional) | {"config", "print_config", "help"}
    for word in argv[: argv.index("--") if "--" in argv else None]:
        name = word.partition("=")[0][2:].removesuffix("+")
        if word.startswith("--") and name not in flags:
            parser.error(f"unknown option --{name}{nearest(name, flags).replace('mean ', 'mean --')}")


def _config_files(parser: _Parser, argv: list[str]) -> Iterator[str]:
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                parser.error("--config needs a file")
            yield argv[i + 1]
        elif word.startswith("--config="):
            yield word.removeprefix("--config=")


def _for_jsonargparse(argv: list[str], leaves: Mapping[str, _Leaf]) -> list[str]:
    """Take out what is done here (--config, --print_config), and let `--flag` alone mean `--flag true`."""
    result = []
    skip = {j for i, word in enumerate(argv) if word == "--config" for j in (i, i + 1)}
    for i, word in enumerate(argv):
        if i in skip or word.partition("=")[0] == "--print_config" or word.startswith("--config="):
            continue
        leaf = leaves.get(word.removeprefix("--")) if word.startswith("--") else None
        alone = leaf and leaf.hint is bool and argv[i + 1 : i + 2] not in (["true"], ["false"])
        result.append(f"{word}=true" if alone else word)
    return result


def _read_file(
    parser: _Parser, path: Path, leaves: Mapping[str, _Leaf], reword: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot read {path}: {error}")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        tables = _yaml(text)  # as MindSpeed-MM's users have them
        if tables is None:
            parser.error(f"{path} is not TOML: {error}")
    try:
        tables = reword(tables)
    except ValueError as error:
        parser.error(f"{path}: {error}")
    groups = {name.rsplit(".", n)[0] for name in leaves for n in range(1, name.count(".") + 1)}

    def refuse_unknown_keys(table: Mapping[str, Any], prefix: str = "") -> None:
        for key, value in table.items():
            name = prefix + key
            if name in leaves:
                continue
            if name not in groups:
                parser.error(f"{path}: unknown key {name}{nearest(name, leaves)}")
            elif isinstance(value, Mapping):
                refuse_unknown_keys(value, name + ".")
            else:
                parser.error(f"{path}: {name} is a table ([{name}]), not the value {value!r}")

    refuse_unknown_keys(tables)
    return {name: _check(parser, path, leaf, value) for name, leaf, value in _chosen(tables, leaves)}


def _yaml(text: str) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return content if isinstance(content, dict) else None


def _read_environment(parser: _Parser, prefix: str, leaves: Mapping[str, _Leaf]) -> dict[str, Any]:
    names = {prefix + name.upper().replace(".", "__"): name for name in leaves}
    values = {}
    for variable in (variable for variable in os.environ if variable.startswith(prefix)):
        if variable not in names:
            parser.error(f"unknown environment variable {variable}{nearest(variable, names)}")
        leaf = leaves[names[variable]]
        single = ArgumentParser(exit_on_error=False)
        single.add_argument(f"--{leaf.name}", type=leaf.hint)
        try:
            values[leaf.name] = single.parse_args([f"--{leaf.name}={os.environ[variable]}"])[leaf.name]
        except Exception as error:
            parser.error(f"{variable}: {_plain(str(error))}")
    return values


def _chosen(tables: Mapping[str, Any], leaves: Mapping[str, _Leaf]) -> Iterator[tuple[str, _Leaf, Any]]:
    for name, leaf in leaves.items():
        value: Any = tables
        for part in name.split("."):
            if part not in value:
                break
            value = value[part]
        else:
            yield name, leaf, value


def _check(parser: _Parser, path: Path, leaf: _Leaf, value: Any) -> Any:
    """Let jsonargparse judge the value alone, so that the error can name the file."""
    single = ArgumentParser(exit_on_error=False)
    single.add_argument(f"--{leaf.name}", type=leaf.hint)
    try:
        return single.parse_object({leaf.name: value})[leaf.name]
    except Exception as error:
        parser.error(f"{path}: {_plain(str(error))}")


def _add_leaves(
    parser: _Parser, cls: type, leaves: Mapping[str, _Leaf], values: Mapping[str, Any], missing_is_fine: bool
) -> None:
    groups = {"": parser}
    for name, leaf in leaves.items():
        table = name.rpartition(".")[0]
        if table not in groups:
            groups[table] = parser.add_argument_group(table, _group_doc(cls, table))
        default = values.get(name, leaf.default)
        required = default is _REQUIRED and not missing_is_fine
        options: dict[str, Any] = {"type": leaf.hint, "help": leaf.help or "%(type)s"}
        if default is not _REQUIRED:
            options["default"] = default
        if leaf.positional:
            groups[table].add_argument(name, **options, **({} if required else {"nargs": "?"}))
        else:
            groups[table].add_argument(f"--{name}", **options, required=required)


def _group_doc(cls: type, table: str) -> str | None:
    for part in table.split("."):
        cls = typing.get_type_hints(cls)[part]
    doc = cls.__doc__ or ""
    return None if doc.startswith(f"{cls.__name__}(") else " ".join(doc.split())  # dataclasses write a signature


def _instantiate(cls: type[T], namespace: Namespace) -> T:
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        value, hint = namespace[field.name], hints[field.name]
        values[field.name] = _instantiate(hint, value) if dataclasses.is_dataclass(hint) else value
    return cls(**values)


# --- writing


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _template(leaves: Mapping[str, _Leaf], values: Namespace, missing: list[str], comments: bool) -> str:
    """TOML to be filled in: what is required and missing stands as a comment."""
    lines, table = [], ""
    for name, leaf in sorted(leaves.items(), key=lambda item: item[0].rpartition(".")[0]):
        own, _, key = name.rpartition(".")
        if own != table:
            lines += ["", f"[{own}]"]
            table = own
        if comments and leaf.help:
            lines.append(f"# {leaf.help}")
        lines.append(f"# {_key(key)} =   (required)" if name in missing else f"{_key(key)} = {_toml(values[name])}")
    return "\n".join(lines).lstrip("\n") + "\n"


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
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    raise AssertionError(f"a configuration cannot hold a {type(value).__name__}: {value!r}")
