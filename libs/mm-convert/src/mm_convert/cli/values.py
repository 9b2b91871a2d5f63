"""What a value must be: the type of its field, and the limits that stand in that type.

    lr: Annotated[float, ">= 0", "<= 1"] = 1e-5
    betas: tuple[Annotated[float, ">= 0", "< 1"], Annotated[float, ">= 0", "< 1"]] = (0.9, 0.999)
    fps: Annotated[float, "> 0"] | None = None

A limit is an operator and a number. NaN, infinity and whole numbers of more than 64 bits are outside of all limits.

A value comes as text (of a flag, or of the environment) or as data (of TOML, JSON or Python).
Text for text is taken as it was typed. Of a field that may be None, the word `null` is None, and nothing else is.
In a union the first member that fits wins, and what stands in brackets is a list before it is text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

NULL = "null"
_OPERATORS = {"!=": operator.ne, ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_WORDS = {"!=": "not", ">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class Limit(NamedTuple):
    """`>= 0`"""

    sign: str
    bound: str

    def allows(self, value: float) -> bool:
        return _OPERATORS[self.sign](value, json.loads(self.bound))  # not float, which rounds 2^63-1

    def __str__(self) -> str:
        return f"{_WORDS[self.sign]} {self.bound}"


class Kind(NamedTuple):
    """One member of a type: `list[int]`, `str`, …, and for a number its limits."""

    hint: Any
    limits: tuple[Limit, ...] = ()


def read_text(name: str, text: str, hint: Any) -> Any:
    """The value that a text means for a field of this type. ValueError, under this name, for one that does not fit."""
    return _or_refuse(name, _Text(text), hint)


def check_value(name: str, value: Any, hint: Any) -> Any:
    """The value as the type has it: 1 as a float, a list as a tuple. ValueError as above."""
    return _or_refuse(name, value, hint)


def check_fields(fields_of: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by the names of a dataclass's fields, each as its field has it; other names pass as they are.

    ValueError for the first that does not fit, with `prefix` before its name.
    """
    hints = hints_of(fields_of)
    return {
        name: check_value(f"{prefix}{name}", value, hints[name]) if name in hints else value
        for name, value in values.items()
    }


def check_config(config: Any, prefix: str = "") -> None:
    """ValueError for the first value of a dataclass, or of those in it, that its field does not take."""
    for name, hint in hints_of(type(config)).items():
        if dataclasses.is_dataclass(hint):
            check_config(getattr(config, name), f"{prefix}{name}.")
        else:
            check_value(f"{prefix}{name}", getattr(config, name), hint)


@cache
def hints_of(fields_of: type) -> dict[str, Any]:
    """Name of a dataclass's field -> its type, with limits. Not to be changed."""
    return typing.get_type_hints(fields_of, include_extras=True)


def describe(hint: Any) -> str:
    """What fits, in words: `a number (at least 0), or null`."""
    return ", or ".join(map(_describe, kinds_of(hint)))


def kinds_of(hint: Any, limits: tuple[Limit, ...] = ()) -> Iterator[Kind]:
    """The members of a type in their order, unions in unions too."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        yield from kinds_of(hint.__origin__, limits + tuple(Limit(*text.split()) for text in hint.__metadata__))
    elif origin in (Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from kinds_of(member, limits)
    else:
        yield Kind(hint, limits)


# --- how it is done


class _Text(str):
    """Text whose meaning the type decides; other strings are text and nothing else."""


class _Unfit(Exception):
    """The value does not fit this type."""


def _or_refuse(name: str, value: Any, hint: Any) -> Any:
    try:
        return _fit(value, hint)
    except _Unfit:
        plain = isinstance(value, _Text) and re.fullmatch(r"[\w.+/-]{1,80}", value)
        example = ' (a list is written ["a", "b"] or [1, 2])' if any(map(_is_list, kinds_of(hint))) else ""
        example += ' (a table is written {"name": 1}, each name once)' if any(map(_is_table, kinds_of(hint))) else ""
        example += " (a whole number has 64 bits at most)" if re.fullmatch(r"[+-]?[0-9_]{19,}", str(value)) else ""
        shown = value if plain else _SHORT.repr(value)
        raise ValueError(f"{name} is {shown}; it takes {describe(hint)}{example}") from None


def _fit(value: Any, hint: Any) -> Any:
    kinds = list(kinds_of(hint))
    if (value is None or (isinstance(value, str) and value == NULL)) and any(k.hint is type(None) for k in kinds):
        return None
    if isinstance(value, _Text):
        brackets = {"[": _is_list, "{": _is_table}.get(value[:1])
        for kind in filter(lambda kind: brackets and brackets(kind), kinds):
            try:
                return _fit_kind(_list(value) if value[0] == "[" else _table(value), kind)
            except _Unfit:
                continue
    for kind in kinds:
        try:
            return _fit_kind(value, kind)
        except _Unfit:
            continue
    raise _Unfit


def _fit_kind(value: Any, kind: Kind) -> Any:
    hint, origin = kind.hint, typing.get_origin(kind.hint)
    if hint is Any:
        return value
    if origin is Literal:
        return _choice(value, typing.get_args(hint))
    if _is_list(kind):
        return _sequence(value, hint)
    if _is_table(kind):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _Unfit
        return {key: _fit(item, typing.get_args(hint)[1]) for key, item in value.items()}
    if hint is str and isinstance(value, str):
        return str(value)
    if hint is Path and isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return Path(value)
    if hint is bool:
        return _truth(value)
    if hint in (int, float):
        return _number(value, hint, kind.limits)
    assert hint in (str, Path, type(None)), f"no field can be of the type {hint}"
    raise _Unfit


def _is_list(kind: Kind) -> bool:
    return typing.get_origin(kind.hint) in (list, tuple)


def _is_table(kind: Kind) -> bool:
    return typing.get_origin(kind.hint) is dict


def _choice(value: Any, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if str(choice) == value if isinstance(value, _Text) else type(choice) is type(value) and choice == value:
            return choice
    raise _Unfit


def _truth(value: Any) -> bool:
    if isinstance(value, _Text) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    raise _Unfit


def _number(value: Any, number: type, limits: Sequence[Limit]) -> int | float:
    """Of text only what is written in decimal: not 0x10, nor 12:30, which YAML reads as 750."""
    if isinstance(value, _Text) and re.fullmatch(r"[+-]?[0-9_]+" if number is int else r"[+-]?[0-9a-zA-Z_.+-]+", value):
        try:
            value = number(value)
        except ValueError:
            raise _Unfit from None
    if isinstance(value, bool) or not isinstance(value, Integral if number is int else Real):
        raise _Unfit
    try:
        found = number(value)
    except OverflowError:
        raise _Unfit from None
    if (not math.isfinite(found) if number is float else not -(2**63) <= found < 2**63) or not all(
        limit.allows(found) for limit in limits
    ):
        raise _Unfit
    return found


def _sequence(value: Any, hint: Any) -> list | tuple:
    if not isinstance(value, list | tuple):
        raise _Unfit
    made, inside = typing.get_origin(hint), typing.get_args(hint)
    if made is list or inside[1:] == (...,):
        inside = inside[:1] * len(value)
    if len(inside) != len(value):
        raise _Unfit
    return made(_fit(item, each) for item, each in zip(value, inside, strict=True))


_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[^\[\],]+")
_QUOTED = re.compile(r"""'((?:[^']|'')*)'\s*(?=[\],])""")


def _list(text: str) -> list:
    """`[a, "b, c", [1, 2]]` as lists of texts. What is quoted is text; the type decides of the others."""

    def skip(at: int) -> int:
        return _SPACE.match(text, at).end()

    def item(at: int, depth: int) -> tuple[Any, int]:
        if text[at : at + 1] == "[":
            if depth == 4:
                raise _Unfit
            return items(at + 1, depth + 1)
        if text[at : at + 1] == '"':
            try:
                return json.decoder.scanstring(text, at + 1)
            except json.JSONDecodeError:
                raise _Unfit from None
        if quoted := _QUOTED.match(text, at):
            return quoted[1].replace("''", "'"), quoted.end()
        word = _WORD.match(text, at)
        if not word or not word[0].strip():
            raise _Unfit
        return _Text(word[0].strip()), word.end()

    def items(at: int, depth: int) -> tuple[list, int]:
        found: list = []
        at = skip(at)
        while text[at : at + 1] != "]":
            one, at = item(at, depth)
            found.append(one)
            at = skip(at)
            if text[at : at + 1] == ",":
                at = skip(at + 1)
            elif text[at : at + 1] != "]":
                raise _Unfit
        return found, at + 1

    found, end = item(0, 0)
    if text[end:].strip():
        raise _Unfit
    return found


def _table(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):  # a second value would replace the first unsaid
            raise _Unfit
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):  # also a number of 5,000 digits
        raise _Unfit from None


def _describe(kind: Kind) -> str:
    hint, inside = kind.hint, typing.get_args(kind.hint)
    if typing.get_origin(hint) is Literal:
        return ("one of " if len(inside) > 1 else "") + ", ".join(map(str, inside))
    if _is_table(kind):
        return "a table"
    if _is_list(kind):
        many = "" if typing.get_origin(hint) is list or inside[1:] == (...,) else f" of {len(inside)}"
        return f"a list{many}, each item {describe(inside[0])}"
    words = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}
    limits = f" ({', '.join(map(str, kind.limits))})" if kind.limits else ""
    return (words | {type(None): NULL, Any: "anything"})[hint] + limits
