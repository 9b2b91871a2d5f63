"""The README's example is run as it stands there, by the commands that it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_prints_the_same_norm_in_every_layout(tmp_path):
    code, commands = re.search(r"```python\n(.*?)```.*?```\n(python example.*?)```", README, re.DOTALL).groups()
    (tmp_path / "example.py").write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    norms, ranks = set(), []
    for command in commands.splitlines():
        words = command.replace("torchrun", "-m torch.distributed.run --standalone").removeprefix("python").split()
        output = subprocess.check_output([sys.executable, *words], cwd=tmp_path, env=environment, text=True, timeout=90)
        norm, count = re.fullmatch(r"gradient norm (\d+\.\d+) on (\d) ranks\n", output).groups()
        norms.add(norm)
        ranks.append(int(count))
    assert ranks == [1, 2, 4, 4]
    assert len(norms) == 1, norms
