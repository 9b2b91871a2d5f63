"""The README's examples are run as they stand there, by the commands that it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```.*?```\n(python .*?)```", README, re.DOTALL)


@pytest.mark.parametrize(("code", "commands"), EXAMPLES, ids=["example", "attention"])
def test_an_example_prints_the_same_in_every_layout(tmp_path, code, commands):
    (tmp_path / re.search(r"\w+\.py", commands)[0]).write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    printed, ranks = set(), []
    for command in commands.splitlines():
        words = command.replace("torchrun", "-m torch.distributed.run --standalone").removeprefix("python").split()
        output = subprocess.check_output([sys.executable, *words], cwd=tmp_path, env=environment, text=True, timeout=90)
        what, count = re.fullmatch(r"(.*) on (\d) ranks\n", output).groups()
        printed.add(what)
        ranks.append(int(count))
    assert ranks == [int(number) for number in re.findall(r"nproc_per_node (\d)", f"nproc_per_node 1 {commands}")]
    assert len(printed) == 1, printed
