"""The README's examples are run as they stand there, by the commands that it names."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mm_parallel.testing import spawn

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```.*?```\n(python .*?)```", README, re.DOTALL)


def run(rank: int, world: int, argv: list[str]) -> str:
    """As torchrun would; returns what is printed."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    sys.argv = argv
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(argv[0], run_name="__main__")
    return printed.getvalue()


@pytest.mark.parametrize(("code", "commands"), EXAMPLES, ids=["example", "attention"])
def test_an_example_prints_the_same_in_every_layout(tmp_path, code, commands):
    """The first command under torchrun is typed; of the others the ranks are started."""
    file = tmp_path / re.search(r"\w+\.py", commands)[0]
    file.write_text(code)
    printed, ranks = set(), []
    for number, command in enumerate(commands.splitlines()):
        if number < 2:
            words = command.replace("torchrun", "-m torch.distributed.run --standalone").removeprefix("python").split()
            output = subprocess.check_output([sys.executable, *words], cwd=tmp_path, text=True, timeout=90)
        else:
            world, arguments = re.fullmatch(rf"torchrun --nproc_per_node (\d) {file.name}(.*)", command).groups()
            output = "".join(spawn(int(world), run, [str(file), *arguments.split()]))
        what, count = re.fullmatch(r"(.*) on (\d) ranks\n", output).groups()
        printed.add(what)
        ranks.append(int(count))
    assert ranks == [int(number) for number in re.findall(r"nproc_per_node (\d)", f"nproc_per_node 1 {commands}")]
    assert len(printed) == 1, printed
