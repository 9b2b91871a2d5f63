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
import os
import re
import sys
import textwrap
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser

from mm_convert.cli.toml import dump, template

__all__ = ["REQUIRED", "Option", "dump", "nearest", "options_of", "parse", "parse_options"]

T = TypeVar("T")

REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Option:
    """What takes a value: its dotted name, its type, its default (`REQUIRED` without) and its help."""

    name: str
    hint: Any
    default: Any = REQUIRED
    help: str = ""
    positional: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


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
    return parse_options(
        options_of(config_class),
        partial(_instantiate, config_class),
        argv,
        prog=prog,
        description=description or inspect.getdoc(config_class) or "",
        groups=_group_docs(config_class),
        defaults=defaults,
        environment=environment,
        reword=reword,
    )


def parse_options(
    options: Iterable[Option],
    make: Callable[[Mapping[str, Any]], T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
    groups: Mapping[str, str] | None = None,
    defaults: Sequence[Path] = (),
    environment: str = "",
    reword: Callable[[dict[str, Any]], dict[str, Any]] = lambda tables: tables,
) -> T:
    """The same for options that no dataclass states; `groups` has what is said of a table of them.

    `make` is given the values by the options' dotted names; its ValueErrors are reported like any other wrong value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    known = {option.name: option for option in options}
    _refuse_other_encodings(parser, argv)
    _refuse_unknown_flags(parser, argv, known)

    values: dict[str, Any] = {}
    for file in defaults:
        values |= _read_file(parser, Path(file), known, reword)
    values |= _read_environment(parser, environment, known) if environment else {}
    for file in _config_files(parser, argv):
        values |= _read_file(parser, Path(file), known, reword)

    printing = next((word for word in argv if word.partition("=")[0] == "--print_config"), "")
    parser.add_argument(
        "--config", type=list[str], metavar="FILE", help="values from this TOML or YAML; may be repeated"
    )
    parser.add_argument("--print_config", action="store_true", help="print the resulting configuration and exit")
    _add_options(parser, known, groups or {}, values, missing_is_fine=bool(printing))
    namespace = parser.parse_args(_for_jsonargparse(argv, known))
    values = {name: namespace.get(name) for name in known}
    missing = [name for name, option in known.items() if printing and values[name] is None and option.required]
    if missing or printing == "--print_config=comments":
        helps = {name: option.help for name, option in known.items()} if "comments" in printing else {}
        print(template(values, helps, missing), end="")
        sys.exit(0)
    try:
        made = make(values)
    except ValueError as error:
        parser.error(str(error))
    if printing:
        print(dump(_nest(values)), end="")
        sys.exit(0)
    return made


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


def options_of(cls: type, prefix: str = "") -> Iterator[Option]:
    """What the fields of a dataclass, and of those in it, say."""
    hints, helps = typing.get_type_hints(cls), _field_docs(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from options_of(hint, f"{prefix}{field.name}.")
        else:
            inside = any(dataclasses.is_dataclass(part) for part in typing.get_args(hint))
            assert not inside, f"{prefix}{field.name}: a table is always there; give it a field that switches it off"
            default = _default(field)
            positional = field.metadata.get("positional", False)
            yield Option(prefix + field.name, hint, default, helps.get(field.name, ""), positional)


def _group_docs(cls: type, prefix: str = "") -> dict[str, str]:
    """Table -> what its dataclass says of itself."""
    docs: dict[str, str] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            doc = hint.__doc__ or ""
            written = doc.startswith(f"{hint.__name__}(")  # by dataclasses: a signature
            docs |= {prefix + name: "" if written else " ".join(doc.split()), **_group_docs(hint, f"{prefix}{name}.")}
    return docs


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


def _refuse_other_encodings(parser: _Parser, argv: list[str]) -> None:
    for word in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # so Python holds bytes that are no UTF-8
            parser.error(f"{word!r} is not UTF-8 text, as configurations and records are: give it another name")


def _refuse_unknown_flags(parser: _Parser, argv: list[str], known: Mapping[str, Option]) -> None:
    positional = {name for name, option in known.items() if option.positional}
    flags = (set(known) - positional) | {"config", "print_config", "help"}
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


def _for_jsonargparse(argv: list[str], known: Mapping[str, Option]) -> list[str]:
    """Take out what is done here (--config, --print_config), and let `--flag` alone mean `--flag true`."""
    result = []
    skip = {j for i, word in enumerate(argv) if word == "--config" for j in (i, i + 1)}
    for i, word in enumerate(argv):
        if i in skip or word.partition("=")[0] == "--print_config" or word.startswith("--config="):
            continue
        option = known.get(word.removeprefix("--")) if word.startswith("--") else None
        alone = option and option.hint is bool and argv[i + 1 : i + 2] not in (["true"], ["false"])
        result.append(f"{word}=true" if alone else word)
    return result


def _read_file(
    parser: _Parser, path: Path, known: Mapping[str, Option], reword: Callable[[dict[str, Any]], dict[str, Any]]
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
    groups = {name.rsplit(".", n)[0] for name in known for n in range(1, name.count(".") + 1)}

    def refuse_unknown_keys(table: Mapping[str, Any], prefix: str = "") -> None:
        for key, value in table.items():
            name = prefix + key
            if name in known:
                continue
            if name not in groups:
                parser.error(f"{path}: unknown key {name}{nearest(name, known)}")
            elif isinstance(value, Mapping):
                refuse_unknown_keys(value, name + ".")
            else:
                parser.error(f"{path}: {name} is a table ([{name}]), not the value {value!r}")

    refuse_unknown_keys(tables)
    return {name: _check(parser, path, option, value) for name, option, value in _choose(tables, known)}


def _yaml(text: str) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return content if isinstance(content, dict) else None


def _read_environment(parser: _Parser, prefix: str, known: Mapping[str, Option]) -> dict[str, Any]:
    names = {prefix + name.upper().replace(".", "__"): name for name in known}
    values = {}
    for variable in (variable for variable in os.environ if variable.startswith(prefix)):
        if variable not in names:
            parser.error(f"unknown environment variable {variable}{nearest(variable, names)}")
        option = known[names[variable]]
        single = ArgumentParser(exit_on_error=False)
        single.add_argument(f"--{option.name}", type=option.hint)
        try:
            values[option.name] = single.parse_args([f"--{option.name}={os.environ[variable]}"])[option.name]
        except Exception as error:
            parser.error(f"{variable}: {_plain(str(error))}")
    return values


def _choose(tables: Mapping[str, Any], known: Mapping[str, Option]) -> Iterator[tuple[str, Option, Any]]:
    for name, option in known.items():
        value: Any = tables
        for part in name.split("."):
            if part not in value:
                break
            value = value[part]
        else:
            yield name, option, value


def _check(parser: _Parser, path: Path, option: Option, value: Any) -> Any:
    """Let jsonargparse judge the value alone, so that the error can name the file."""
    single = ArgumentParser(exit_on_error=False)
    single.add_argument(f"--{option.name}", type=option.hint)
    try:
        return single.parse_object({option.name: value})[option.name]
    except Exception as error:
        parser.error(f"{path}: {_plain(str(error))}")


def _add_options(
    parser: _Parser,
    known: Mapping[str, Option],
    groups: Mapping[str, str],
    values: Mapping[str, Any],
    missing_is_fine: bool,
) -> None:
    tables = {"": parser}
    for name, option in known.items():
        table = name.rpartition(".")[0]
        if table not in tables:
            tables[table] = parser.add_argument_group(table, groups.get(table) or None)
        default = values.get(name, option.default)
        required = default is REQUIRED and not missing_is_fine
        settings: dict[str, Any] = {"type": option.hint, "help": option.help or "%(type)s"}
        if default is not REQUIRED:
            settings["default"] = default
        if option.positional:
            tables[table].add_argument(name, **settings, **({} if required else {"nargs": "?"}))
        else:
            tables[table].add_argument(f"--{name}", **settings, required=required)


def _instantiate(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass from values by their dotted names."""
    hints = typing.get_type_hints(cls)

    def value(name: str) -> Any:
        if not dataclasses.is_dataclass(hints[name]):
            return values[name]
        inside = {key.removeprefix(f"{name}."): item for key, item in values.items() if key.startswith(f"{name}.")}
        return _instantiate(hints[name], inside)

    return cls(**{field.name: value(field.name) for field in dataclasses.fields(cls)})


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted names as tables in tables."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *tables, key = name.split(".")
        inner = nested
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[key] = value
    return nested
