"""The README's example is run as it stands there, by the two commands that it names."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_the_example_prints_the_same_norm_on_any_number_of_ranks(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (tmp_path / "example.py").write_text(re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1))
    alone = [sys.executable, "example.py"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "example.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) for command in (alone, two)
    ]
    outputs = [run.communicate()[0].decode() for run in runs]
    norms = [re.fullmatch(r"gradient norm (\d+\.\d+) on (\d) ranks\n", output).groups() for output in outputs]
    assert [count for _, count in norms] == ["1", "2"]
    assert norms[0][0] == norms[1][0]
