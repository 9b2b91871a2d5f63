"""Killing a program before every change that it makes to the file system, and running it again.

`kill_everywhere` starts one process that imports all that the programs need, and forks: a child is killed
before its first change, the next before its second, …, until one ends by itself. So an import is paid once. After each
kill the same command runs again, in another child.

A change is what Python's audit events show: opening for writing, rename, unlink, mkdir, rmdir, link, symlink, truncate;
`mm_convert.write.install.exchange` raises one too. What C code writes by itself (FFmpeg's files) is seen when it is
renamed. Only changes below the folder of a run count.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Scenario:
    """program: "module:function", called with a list of arguments. start: a folder that each run gets a copy of, as
    its working directory. ignored: files whose names have this in them do not count. warm: "module:function", called
    once with the arguments, before the first fork: what need not be done again by every run.
    """

    program: str
    argv: list[str]
    start: str
    ignored: str = "\0"
    warm: str = ""


@dataclass(frozen=True)
class Kill:
    """One kill: before which change, what was there then, what the same command made of that, and how it ended."""

    change: str
    killed: Path
    again: Path
    code: int
    said: str


@dataclass(frozen=True)
class Kills:
    """All kills of a program, and the folder of a run that was not killed."""

    kills: list[Kill]
    final: Path


def kill_everywhere(scenarios: Sequence[Scenario], work: Path, packages: Sequence[str]) -> list[Kills]:
    """The kills of every scenario, each with a folder of its own in `work`.

    packages: what this process has imported of them is imported once, before the first fork.
    The programs run in the locale C, whose encoding is ASCII: nothing that they write may depend on it.
    """
    names = [name for name in list(sys.modules) if name.partition(".")[0] in packages]
    told = json.dumps([[asdict(scenario) for scenario in scenarios], str(work), names])
    command = [sys.executable, "-m", __name__]
    ascii = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, input=told, capture_output=True, encoding="utf-8", env=ascii, check=False)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}{done.stderr}")
    return [
        Kills([Kill(c, Path(killed), Path(again), code, said) for c, killed, again, code, said in kills], Path(final))
        for kills, final in json.loads(done.stdout.splitlines()[-1])
    ]


def _serve(told: str) -> None:
    scenarios, work, imports = json.loads(told)
    for name in imports:
        with contextlib.suppress(Exception):  # what cannot be imported by its name is left to the runs
            importlib.import_module(name)
    results = [_kill_all(Scenario(**scenario), Path(work, str(i))) for i, scenario in enumerate(scenarios)]
    print(json.dumps(results))


def _kill_all(scenario: Scenario, work: Path) -> tuple[list[tuple[str, str, str, int, str]], str]:
    kills = []
    if scenario.warm:
        _find(scenario.warm)(scenario.argv)
    assert len(os.listdir("/proc/self/task")) == 1, "no fork once threads have started"
    gc.disable()
    gc.freeze()
    for number in count(1):
        run, killed = work / f"{number:03d}", work / f"{number:03d}-killed"
        shutil.copytree(scenario.start, run)
        code, said = _run(scenario, run, kill_before=number)
        if code != -signal.SIGKILL:
            assert code == 0, said
            return kills, str(run)
        change = said.splitlines()[-1]
        shutil.copytree(run, killed)
        code, said = _run(scenario, run)
        kills.append((change, str(killed), str(run), code, said))
    raise AssertionError


def _run(scenario: Scenario, folder: Path, kill_before: int = 0) -> tuple[int, str]:
    """Exit code and output of one run, in a child."""
    log = folder.with_name(f"{folder.name}.log")
    child = os.fork()
    if not child:
        _run_here(scenario, folder, log, kill_before)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, log.read_text(encoding="utf-8")


def _run_here(scenario: Scenario, folder: Path, log: Path, kill_before: int) -> NoReturn:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        program = _find(scenario.program)
        if kill_before:
            _kill_before(kill_before, str(folder), scenario.ignored)
        program(scenario.argv)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _find(name: str) -> Callable[[list[str]], Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _kill_before(number: int, folder: str, ignored: str) -> None:
    """From here on, this process dies before its change of this number, and says on stderr what it was."""
    changes = count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike) or not flags & _WRITING:
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        name = os.path.abspath(os.fsdecode(path)) if not isinstance(path, int) else folder
        if not name.startswith(folder) or ignored in name or (event == "os.mkdir" and os.path.isdir(name)):
            return
        if next(changes) == number:
            os.write(2, f"\n{event} {os.path.relpath(name, folder)} {arguments[1] or ''}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    _serve(sys.stdin.read())
