"""A family is a room: whoever stands outside its folder asks its record, and never by its name."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm_models.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("libs/mm-data", "libs/mm-parallel", "libs/mm-models", "apps/train", "apps/infer")  # mm_convert has tables
FAMILY = r"wan|vace|opensoraplan|open_sora|osp|qwen|t2v|i2v|flf2v|ti2v|v2v"
NAME = re.compile(rf"(?i)(?<![a-z])({FAMILY})(?![a-z])")

# The formats of other people's files, and the rule by which VACE's clips were cut, are facts about files.
FORMATS = {
    "mm_data": {"geometry.py", "layout.py", "manifest.py", "mindspeed.py", "selection.py", "vace.py"},
    "mm_models": {"families.py"},  # the one tuple of all families
}


def modules() -> list[Path]:
    """Modules that stand in no family's room."""
    rooms = {family.name for family in FAMILIES}
    return [
        file
        for package in PACKAGES
        for file in sorted((ROOT / package / "src").rglob("*.py"))
        if not rooms & set(file.parts) and file.name not in FORMATS.get(file.relative_to(ROOT).parts[3], ())
    ]


def words(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of all that code says: names, and strings that are not documentation."""
    tree = ast.parse(file.read_text())
    documentation = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in node.body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text) | ast.keyword(arg=str(text)):
                yield node.lineno, text
            case ast.ClassDef(name=text) | ast.FunctionDef(name=text):
                yield node.lineno, text
            case ast.ImportFrom(module=module, names=names):
                yield from ((node.lineno, text) for text in (module or "", *(alias.name for alias in names)))
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.Constant(value=str(text)) if id(node) not in documentation:
                yield node.lineno, text


@pytest.mark.parametrize("file", modules(), ids=lambda file: "/".join(file.relative_to(ROOT).parts[3:]))
def test_no_module_outside_a_room_names_a_family(file):
    named = [(line, text) for line, text in words(file) if NAME.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text))]
    assert not named, f"{file.relative_to(ROOT)} names a family or a task of one: ask mm_models.family instead"


def test_no_module_outside_a_room_reads_a_field_of_a_configuration():
    """Widths and channels are facts of a family too: its record tells what others need of them."""
    # also names of other things; the rows of text are a flag of mm_infer, what is predicted a field of DDPM, and
    # encoders of text have a vocabulary
    shared = {"dim", "eps", "text_tokens", "prediction_type", "vocab_size"}
    fields = {field.name for family in FAMILIES for field in dataclasses.fields(family.config)} - shared
    for file in modules():
        if "mm_parallel" not in file.parts and "mm_data" not in file.parts:  # they know no configuration
            attributes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)]
            read = [(node.lineno, node.attr) for node in attributes if node.attr in fields]
            assert not read, f"{file.relative_to(ROOT)} reads {read}: ask mm_models.family instead"


def test_names_are_found(tmp_path):
    """The test above can fail: in names, imports, strings; and not for documentation or parts of words."""
    file = tmp_path / "module.py"
    file.write_text(
        '"""Wan is named here, which is documentation."""\nfrom a.wan import b\nclass WanThing: ...\n'
        'x = y.t2v\nz = f(task="vace")\nwander = "swan"\n'
    )
    found = {line for line, text in words(file) if NAME.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text))}
    assert found == {2, 3, 4, 5}


def test_the_general_of_mm_models_imports_no_family():
    rooms = {f"mm_models.{family.name}" for family in FAMILIES}
    for file in modules():
        if "mm-models" in file.parts:
            assert not any(text.startswith(room) for _, text in words(file) for room in rooms), file


def test_the_loop_is_a_page():
    tree = ast.parse((ROOT / "apps/train/src/mm_train/train.py").read_text())
    longest = max(node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    assert longest <= 40
