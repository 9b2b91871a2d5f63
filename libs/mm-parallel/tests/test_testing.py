"""What a test author relies on: results, the traceback of the culprit, no hang, no process left."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mm_parallel.testing import assert_same_grads, spawn


@dataclass
class Answer:
    """Lives in a file that pytest imports under a name nobody else can import."""

    value: int


def total(rank: int, world: int, start: Answer) -> Answer:
    number = torch.tensor(rank + start.value)
    dist.all_reduce(number)
    return Answer(number.item())


def test_results_come_back_by_rank():
    assert spawn(3, total, Answer(10)) == [Answer(33)] * 3


def unhappy(rank: int, world: int) -> None:
    if rank == 1:
        raise ArithmeticError("rank one is unhappy")
    dist.barrier()


def killed(rank: int, world: int) -> None:
    if rank == 1:
        os.abort()  # as gloo does on a size mismatch between peers
    dist.barrier()


def asleep(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(1000)
    dist.barrier()


def test_the_traceback_of_the_failing_rank_is_reported():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 in unhappy: Traceback[\s\S]*ArithmeticError: rank one is"):
        spawn(2, unhappy)
    assert time.monotonic() - start < 15


def test_a_rank_that_dies_without_a_word_is_named():
    with pytest.raises(RuntimeError, match="rank 1 of 2 in killed: died with exit code -6"):
        spawn(2, killed)


def test_a_hang_ends_with_the_stacks():
    with pytest.raises(TimeoutError, match=r"asleep: ranks \[0, 1\] still run after 4 s[\s\S]*in asleep"):
        spawn(2, asleep, timeout=4)


def own_pid(rank: int, world: int) -> int:
    return os.getpid()


def test_no_process_is_left():
    for pid in spawn(2, own_pid):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_grads_are_compared_by_name_and_size():
    one = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert_same_grads(one, {"a": torch.ones(3) + 1e-7, "b": torch.zeros(2)}, 1e-6)
    with pytest.raises(AssertionError, match="gradient of a: error"):
        assert_same_grads(one, {"a": torch.ones(3) * 1.01, "b": torch.zeros(2)}, 1e-6)
    with pytest.raises(AssertionError, match="gradient of b: error"):
        assert_same_grads({"a": one["a"], "b": torch.full((2,), float("nan"))}, one, 1e-6)
    with pytest.raises(AssertionError, match="gradient of b"):
        assert_same_grads({"a": one["a"], "b": torch.ones(2)}, one, 1e-6)
    with pytest.raises(AssertionError, match="different names"):
        assert_same_grads({"a": one["a"]}, one, 1e-6)


def test_ranks_start_however_much_is_imported(tmp_path):
    """An argument of a command holds 128 KiB, which the names of some thousand modules fill."""
    program = f"""if True:
        import importlib.util, sys, types
        for number in range(4000):
            name = f"a_module_with_a_rather_long_name_{{number}}"
            module = types.ModuleType(name)
            module.__spec__ = importlib.util.spec_from_file_location(name, __file__)
            sys.modules[name] = module
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from mm_parallel.testing import spawn
        from test_testing import add
        if __name__ == "__main__":
            print(spawn(2, add, 3))"""
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[3, 4]", done.stderr


def add(rank: int, world: int, number: int) -> int:
    return rank + number
