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
flag or key, or a value that its field does not take, ends with exit code 2, one line, and the nearest name.
Lists are written `[1, 2]` or `[[5,5],[5,5]]`; of a field with `metadata={"repeated": True}` the flag may also be given
several times, `--lora a --lora b`. A true bool is `--flag` or `--flag true`. None is written `null` on the
command line and "null" in TOML, which has no word for it. Text that begins with `--` is written `--flag=--text`.
What fits a field is said by its type, limits included: see `mm_convert.cli.values`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import os
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mm_convert.cli.terminal import one_line
from mm_convert.cli.toml import dump, read_tables, template
from mm_convert.cli.values import check_value, describe, hints_of, read_text

__all__ = [
    "REQUIRED",
    "Option",
    "dump",
    "flags_of",
    "instantiate",
    "nearest",
    "options_of",
    "parse",
    "parse_options",
    "read_config",
]

T = TypeVar("T")

REQUIRED = dataclasses.MISSING
_MAX_FILE = 2**18  # bytes of a file of options


@dataclasses.dataclass(frozen=True)
class Option:
    """What takes a value: its dotted name, its type, its default (`REQUIRED` without) and its help."""

    name: str
    hint: Any
    default: Any = REQUIRED
    help: str = ""
    positional: bool = False
    repeated: bool = False
    """Whether its flag may be given several times, each with one of its values."""

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


def parse(
    config_class: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
    defaults: Sequence[Path | Mapping[str, Any]] = (),
    environment: str = "",
    reword: Callable[[dict[str, Any]], dict[str, Any]] = lambda tables: tables,
) -> T:
    """Read the command line into an instance of the dataclass `config_class`.

    Args:
        argv: arguments without the program's name; None takes sys.argv[1:].
        defaults: TOML files, or their tables, that stand between the dataclass defaults and `--config`; a missing file
            is an error.
        environment: environment variables that begin so are values too: this prefix and the name of the field in upper
            case, with two underscores for each dot.

        reword: gives the tables of a file in our names where they may have others; its ValueErrors are reported, too.

    A ValueError of a `__post_init__` is reported like any other wrong value. Errors: SystemExit(2), text on stderr.
    """
    return parse_options(
        options_of(config_class),
        partial(instantiate, config_class),
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
    defaults: Sequence[Path | Mapping[str, Any]] = (),
    environment: str = "",
    reword: Callable[[dict[str, Any]], dict[str, Any]] = lambda tables: tables,
) -> T:
    """The same for options that no dataclass states; `groups` has what is said of a table of them.

    `make` is given the values by the options' dotted names; its ValueErrors are reported like any other wrong value.
    """
    known = {option.name: option for option in options}
    try:
        words = _split(list(sys.argv[1:] if argv is None else argv), known)
        values = {name: option.default for name, option in known.items()}
        for file in defaults:
            values |= _check(file, known) if isinstance(file, Mapping) else _read_file(Path(file), known, reword)
        values |= _read_environment(environment, known) if environment else {}
        for file in words.files:
            values |= _read_file(Path(file), known, reword)
        if words.help:
            _print_help(known, values, prog, description, groups or {})
            sys.exit(0)
        values |= {name: _read(shown, texts, known[name].hint) for name, (shown, texts) in words.given.items()}
        missing = [name for name in known if values[name] is REQUIRED]
        if missing and words.printing is None:
            said = ", ".join(name if known[name].positional else f"--{name}" for name in missing)
            raise ValueError(f"the following arguments are required: {said}")
        made = None if missing else make(values)
    except ValueError as error:
        sys.stderr.write(f"{prog}: error: {one_line(error)}\n")
        sys.exit(2)
    if words.printing is None:
        return made
    if missing or words.printing == "comments":
        helps = {name: option.help for name, option in known.items()} if words.printing == "comments" else {}
        print(template(values, helps, missing), end="")
    else:
        print(dump(_nest(values)), end="")
    sys.exit(0)


def read_config(config_class: type[T], path: Path) -> T:
    """A configuration from the file that `dump` wrote of it. ValueError, with the file's name, for what does not fit.

    What is not in the file is as the dataclass has it.
    """
    known = {option.name: option for option in options_of(config_class)}
    values = {name: option.default for name, option in known.items()}
    values |= _read_file(path, known, lambda tables: tables)
    if missing := [name for name, value in values.items() if value is REQUIRED]:
        raise ValueError(f"{path} does not say {', '.join(missing)}")
    return instantiate(config_class, values)


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean X?` for the known name closest to `name`, or an empty text."""
    known = sorted(known)
    wrong_table = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]  # lr for optim.lr
    close = wrong_table or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


# --- reading


class _Words(NamedTuple):
    """A command line, not understood yet."""

    given: dict[str, tuple[str, list[str]]]
    """Name of an option -> what it is called in a message, and the text of its value, or of several."""
    files: list[str]
    printing: str | None
    """None: nothing is printed; otherwise what follows `--print_config=`."""
    help: bool


def _split(argv: list[str], known: Mapping[str, Option]) -> _Words:
    """The words of a command line by the options that they belong to. ValueError for one that belongs to none."""
    for word in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # so Python holds bytes that it cannot decode
            raise ValueError(_why_undecoded(word))
    positional = [name for name, option in known.items() if option.positional]
    flags = known.keys() - positional | {"config", "print_config", "help"}
    given: dict[str, tuple[str, list[str]]] = {}
    bare: list[str] = []
    files: list[str] = []
    printing, wants_help, words = None, False, list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            bare += words
            break
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        if word in ("-h", "--help"):
            wants_help = True
        elif flag == "--print_config":
            if value not in ("", "comments"):
                raise ValueError(f"{word}: it takes nothing, or comments")
            printing = value
        elif not word.startswith("-"):
            bare.append(word)
        elif name not in flags or not word.startswith("--"):
            raise ValueError(f"unknown option {flag}{nearest(name, flags).replace('mean ', 'mean --')}")
        else:
            value = value if equals else _value(flag, words, known.get(name))
            if name == "config":
                files.append(value)
            else:
                before = given[name][1] if name in given and known[name].repeated else []
                given[name] = (flag, [*before, value])
    if len(bare) > len(positional):
        raise ValueError(f"{bare[len(positional)]!r} belongs to no option: values follow a --flag")
    given |= {name: (name, [word]) for name, word in zip(positional, bare, strict=False)}
    return _Words(given, files, printing, wants_help)


def _why_undecoded(word: str) -> str:
    try:
        text = os.fsencode(word).decode()
    except UnicodeError:
        return f"{word!r} is not UTF-8 text, as configurations and records are: give it another name"
    encoding = sys.getfilesystemencoding()
    return f"Python reads the command line as {encoding} here, and {text!r} is UTF-8: set PYTHONUTF8=1"


def _read(shown: str, texts: list[str], hint: Any) -> Any:
    """The value that a flag says; of a flag that is given several times, all of them in one list."""
    read = [read_text(shown, text, hint) for text in texts]
    if len(read) == 1:
        return read[0]
    return [one for value in read for one in (value if isinstance(value, list | tuple) else [value])]


def _value(flag: str, words: list[str], option: Option | None) -> str:
    """The value that follows a flag, taken from the words. A bool may stand alone."""
    if option is not None and option.hint is bool:
        return words.pop(0) if words and words[0].lower() in ("true", "false") else "true"
    if not words or re.match("--[A-Za-z]", words[0]):
        what = describe(option.hint) if option else "a file"
        wrong = f" (text that begins so is written {flag}={words[0]})" if words else ""
        raise ValueError(f"{flag} has no value; it takes {what}{wrong}")
    return words.pop(0)


def _read_file(
    path: Path, known: Mapping[str, Option], reword: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Values by the options' names. ValueError, with the file's name, for what is no option or does not fit."""
    tables = read_tables(path)
    try:
        return _check(reword(tables), known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check(tables: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """Values of tables by the options' names. ValueError for what is no option or does not fit."""
    return {name: check_value(name, value, known[name].hint) for name, value in _flatten(tables, known)}


def _flatten(tables: Mapping[str, Any], known: Mapping[str, Option], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every option that is given in the tables. ValueError for what is none."""
    groups = {name.rsplit(".", n)[0] for name in known for n in range(1, name.count(".") + 1)}
    for key, value in tables.items():
        name = f"{prefix}{key}"
        if name in known:
            yield name, value
        elif name not in groups:
            raise ValueError(f"unknown key {name}{nearest(name, known)}")
        elif isinstance(value, Mapping):
            yield from _flatten(value, known, f"{name}.")
        else:
            raise ValueError(f"{name} is a table ([{name}]), not the value {value!r}")


def _read_environment(prefix: str, known: Mapping[str, Option]) -> dict[str, Any]:
    names = {prefix + name.upper().replace(".", "__"): name for name in known}
    given = [variable for variable in os.environ if variable.startswith(prefix)]
    for variable in given:
        if variable not in names:
            raise ValueError(f"unknown environment variable {variable}{nearest(variable, names)}")
    return {
        names[variable]: read_text(variable, os.environ[variable], known[names[variable]].hint) for variable in given
    }


def _print_help(
    known: Mapping[str, Option], values: Mapping[str, Any], prog: str, description: str, groups: Mapping[str, str]
) -> None:
    """What every option is for, what it takes, and what it is if it is not given."""
    positional = " ".join(name.upper() for name, option in known.items() if option.positional)
    parser = argparse.ArgumentParser(prog, f"%(prog)s {positional} [options]".replace("  ", " "), description)
    parser.add_argument("--config", metavar="FILE", help="values from this TOML or YAML; may be repeated")
    parser.add_argument("--print_config", action="store_true", help="print the resulting configuration and exit")
    tables: dict[str, Any] = {"": parser}
    for name, option in known.items():
        table = name.rpartition(".")[0]
        if table not in tables:
            tables[table] = parser.add_argument_group(table, groups.get(table) or None)
        value = "null" if values[name] is None else values[name]
        unset = "required" if value is REQUIRED else f"default: {value}"
        said = f"{option.help} ({unset}; takes {describe(option.hint)})".replace("%", "%%")
        flag = {"metavar": name.upper()} if option.positional else {"metavar": "…"}
        tables[table].add_argument(name if option.positional else f"--{name}", help=said, **flag)
    parser.print_help()


def options_of(cls: type, prefix: str = "") -> Iterator[Option]:
    """What the fields of a dataclass, and of those in it, say."""
    hints, helps = hints_of(cls), _field_docs(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from options_of(hint, f"{prefix}{field.name}.")
        else:
            inside = any(dataclasses.is_dataclass(part) for part in typing.get_args(hint))
            assert not inside, f"{prefix}{field.name}: a table is always there; give it a field that switches it off"
            default = _default(field)
            how = {name: field.metadata.get(name, False) for name in ("positional", "repeated")}
            yield Option(prefix + field.name, hint, default, helps.get(field.name, ""), **how)


def flags_of(config: Any, prefix: str = "--") -> dict[str, Any]:
    """What a configuration says, by its flags: `{"--optim.lr": 1e-4}`. A path is its text."""
    flags: dict[str, Any] = {}
    for name, value in ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config)):
        if dataclasses.is_dataclass(value):
            flags |= flags_of(value, f"{prefix}{name}.")
        else:
            flags[prefix + name] = str(value) if isinstance(value, Path) else value
    return flags


def _group_docs(cls: type, prefix: str = "") -> dict[str, str]:
    """Table -> what its dataclass says of itself."""
    docs: dict[str, str] = {}
    for name, hint in hints_of(cls).items():
        if dataclasses.is_dataclass(hint):
            doc = hint.__doc__ or ""
            written = doc.startswith(f"{hint.__name__}(")  # by dataclasses: a signature
            docs |= {prefix + name: "" if written else " ".join(doc.split()), **_group_docs(hint, f"{prefix}{name}.")}
    return docs


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


@cache
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


def instantiate(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass from values by their dotted names."""
    hints = hints_of(cls)

    def value(name: str) -> Any:
        if not dataclasses.is_dataclass(hints[name]):
            return values[name]
        inside = {key.removeprefix(f"{name}."): item for key, item in values.items() if key.startswith(f"{name}.")}
        return instantiate(hints[name], inside)

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
