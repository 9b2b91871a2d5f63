"""Texts are UTF-8 whatever the locale says, so every call that opens one says so."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OTHER_OPENS = ("os", "av", "Image", "webbrowser")  # whose `open` reads no text


def find_unsaid(file: Path) -> list[str]:
    """Where a text is opened in the encoding of the locale: `open`, `read_text`, `write_text` without `encoding`."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        if name == "open":
            if method and getattr(node.func.value, "id", "") in OTHER_OPENS:
                continue
            modes = [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
            modes += node.args[0 if method else 1 :][:1]
            is_text = all(
                isinstance(m, ast.Constant) and isinstance(m.value, str) and "b" not in m.value for m in modes
            )
        else:
            is_text = method and len(node.args) <= {"read_text": 0, "write_text": 1}.get(name, -1)
        if is_text:
            found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    return found


def test_every_text_is_opened_as_utf8():
    files = [file for folder in ("libs", "apps", "docs", ".ci") for file in (ROOT / folder).rglob("*.py")]
    programs = [file for file in files if not file.name.startswith("test_")]
    assert len(programs) > 200
    assert not [place for file in programs for place in find_unsaid(file)]


def test_the_places_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    calls = ["open(p)", "open(p, 'a')", "p.open('w')", "p.read_text()", "p.write_text(t)", "open(p, mode='r')"]
    right = ["open(p, 'rb')", "p.open('xb')", "p.read_text(encoding='utf-8')", "av.open(p)", "read_text(p)"]
    (tmp_path / "x.py").write_text("\n".join(calls + right), encoding="utf-8")
    assert find_unsaid(tmp_path / "x.py") == [f"x.py:{line}" for line in range(1, len(calls) + 1)]
