"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_readme_runs(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "doubled/config.json").exists()
