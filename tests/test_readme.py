"""Every command in a README is one that the programs understand, flag by flag."""

import re
import shlex
from math import prod
from pathlib import Path

import pytest

from mm_convert import cli
from mm_convert.cli.arguments import parse
from mm_infer.config import Config as InferConfig
from mm_train.export import ExportConfig
from mm_train.extract import ExtractConfig
from mm_train.recipe import load_config

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh.md", *ROOT.glob("apps/*/README.md"), *ROOT.glob("docs/**/*.md")]
COUNTS = ("--nnodes", "--nproc_per_node")  # of torchrun
PROGRAMS = {
    "mm_train": load_config,
    "mm_train.extract": lambda argv: parse(ExtractConfig, argv, prog="extract"),
    "mm_train.export": lambda argv: parse(ExportConfig, argv, prog="export"),
    "mm_infer": lambda argv: parse(InferConfig, argv, prog="infer"),
}


def commands() -> list[tuple[str, list[str], int]]:
    """(program, arguments, ranks) of every command of ours that stands in a code block."""
    found = []
    for readme in READMES:
        for block in re.findall(r"```[a-z]*\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["mm-convert"]:
                    found.append(("mm-convert", words[1:], 1))
                elif "-m" in words and words[words.index("-m") + 1] in PROGRAMS:
                    at = words.index("-m") + 1
                    counts = [int(words[i + 1]) for i, word in enumerate(words[:at]) if word in COUNTS]
                    found.append((words[at], words[at + 1 :], prod(counts)))
    return found


def test_there_are_commands_of_every_program():
    assert {program for program, *_ in commands()} == {*PROGRAMS, "mm-convert"}


@pytest.mark.parametrize(("program", "arguments", "ranks"), commands())
def test_the_command_is_understood(program, arguments, ranks, tmp_path, monkeypatch, capsys):
    """And, of training, that its layout fits the ranks and its batch the layout."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    if program != "mm-convert":
        read = PROGRAMS[program](arguments)
        if program == "mm_train":
            parallel = read.parallel.resolve(ranks)
            read.micro_batches(parallel.dp_replicate * parallel.dp_shard)
        return
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code != 2, capsys.readouterr().err  # 2 would say: not understood
    assert "does not exist" in str(stop.value.code)  # refused only because the example's files are not here
