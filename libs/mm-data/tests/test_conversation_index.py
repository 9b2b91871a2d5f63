"""Items are found by their bytes as a parser finds them, whatever stands in their texts."""

from __future__ import annotations

import json
import random

import pytest

from mm_data.conversations import index
from mm_data.conversations.index import index_items

# What is in the way: quotes, runs of backslashes, brackets, commas, bytes of longer characters.
BITS = [
    '"',
    "\\",
    "\\\\",
    '\\"',
    "[",
    "]",
    "{",
    "}",
    "},{",
    "],[",
    ",",
    ":",
    "a",
    "\n",
    "\t",
    "\x00",
    "é",
    "\u2028",
    "😀",
]


def make_text(rng: random.Random) -> str:
    return "".join(rng.choice(BITS) for _ in range(rng.randint(0, 12)))


def make_value(rng: random.Random, depth: int = 0):
    kind = rng.randint(0, 6 if depth < 3 else 3)
    if kind <= 2:
        return make_text(rng)
    if kind == 3:
        return rng.choice([1, 2.5, None, True, -3e5])
    many = range(rng.randint(0, 3))
    if kind <= 5:
        return {make_text(rng): make_value(rng, depth + 1) for _ in many}
    return [make_value(rng, depth + 1) for _ in many]


def parse(data: bytes):
    """The value; ValueError, the class, for what is none."""
    try:
        return json.loads(data)
    except ValueError:
        return ValueError


@pytest.mark.parametrize("seed", range(300))
def test_as_a_parser(seed, tmp_path, monkeypatch):
    rng, path = random.Random(seed), tmp_path / "d.json"
    monkeypatch.setattr(index, "PIECE", rng.choice([1, 2, 3, 7, 16, 1 << 20]))
    items = [{make_text(rng): make_value(rng) for _ in range(rng.randint(0, 3))} for _ in range(rng.randint(1, 6))]
    style = {
        "ensure_ascii": rng.random() < 0.5,
        "separators": rng.choice([(",", ":"), (", ", ": "), (" ,\r\n", ":\t")]),
    }
    if lines := rng.random() < 0.3:
        text = rng.choice(["\n", "\r\n", "\n \n\n"]).join(json.dumps(item, ensure_ascii=False) for item in items)
    else:
        text = json.dumps(items, indent=rng.choice([None, 1, 2]), **style)
    data = (rng.choice(["", "\ufeff", " \n"]) + text + rng.choice(["", "\n", "\r\n\n "])).encode()
    path.write_bytes(data)
    found = index_items(path)
    assert [json.loads(data[a:b]) for a, b in zip(found.begins, found.ends, strict=True)] == items
    # One byte is another, or is gone: then an item is broken, or the file is refused, or all is as a parser reads it.
    for _ in range(10 if not lines else 0):
        at = rng.randrange(len(data))
        bad = data[:at] + rng.choice([b"", b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"x"]) + data[at + 1 :]
        path.write_bytes(bad)
        wanted = parse(bad.removeprefix(b"\xef\xbb\xbf"))
        try:
            found = index_items(path)
        except ValueError as error:
            readable = isinstance(wanted, list) and wanted and all(isinstance(item, dict | list) for item in wanted)
            if readable:
                raise AssertionError(bad) from error
            continue
        read = [parse(bad[a:b]) for a, b in zip(found.begins, found.ends, strict=True)]
        assert read == wanted if wanted is not ValueError else ValueError in read, bad


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", "lists no conversations"),
        ("[ \n]", "lists no conversations"),
        ("x", "begins with 'x'"),
        ('{\n"a": 1\n}', "one object over several lines"),
        ('[{"a": 1}, 5]', r"'5' stands before item 1, after line 1 \(byte 9\)"),
        ('[{"a": 1} {"b": 2}]', r"item 0, line 1 \(byte 10\): Expecting ',' or '\]'"),
        ('[{"a": 1},\n,{"b": 2}]', r"item 1, line 2 \(byte 11\): Expecting value"),
        ('[{"a": 1},]', r"a comma is between items, before the end, after line 1 \(byte 9\)"),
        ('[{"a": 1}', r"item 0, line 1 \(byte 9\)"),
        ('[{"a": "b}]', r"item 0, line 1 \(byte 7\): Unterminated string"),
        ('[{"a": 1}]\n[{"a": 1}]', r"something follows the end of the list in line 1 \(byte 9\)"),
        (
            '[{"a": "\\u00e9\u00e9"},\n {"a": {"b": 1},\n {"c": 2}]',
            r"item 1, line 3 \(byte 38\): Expecting property name",
        ),
    ],
)
def test_what_is_no_list_is_named_with_its_place(text, said, tmp_path):
    (tmp_path / "d.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        index_items(tmp_path / "d.json")


def test_files_that_cannot_be_opened(tmp_path):
    for path, said in ((tmp_path / "x.json", "x.json is not there"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=said):
            index_items(path)
