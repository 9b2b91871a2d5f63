"""The code in the READMEs runs."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent


ROOMS = ("wan", "opensoraplan", "qwen2_5_vl")


@pytest.mark.parametrize("readme", ["README.md", *(f"src/mm_models/{room}/README.md" for room in ROOMS)])
def test_code_runs(readme, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where it writes
    blocks = re.findall(r"```python\n(.*?)```", (PACKAGE / readme).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for code in blocks:
        exec(compile(code, readme, "exec"), {})
        assert "torch.Size" in capsys.readouterr().out
