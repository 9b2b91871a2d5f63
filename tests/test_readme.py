"""Every command in a README or in docs/ is one that the programs understand, flag by flag."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path

import pytest

from mm_convert import cli, convert_ckpt_to_mm
from mm_convert.cli.arguments import parse
from mm_data import llava_to_mllm, show
from mm_infer.caption import Config as CaptionConfig
from mm_infer.chat import Config as ChatConfig
from mm_infer.config import Config as InferConfig
from mm_infer.page.__main__ import read_flags
from mm_models import presets
from mm_models.families import find
from mm_train.doctor import DoctorConfig
from mm_train.estimate.config import EstimateConfig
from mm_train.export import ExportConfig
from mm_train.extract import ExtractConfig
from mm_train.page.__main__ import read_config as read_runs
from mm_train.recipe import load_config

ROOT = Path(__file__).resolve().parent.parent
WAN, OPENSORAPLAN, QWEN = (ROOT / f"docs/{name}.md" for name in ("wan", "opensoraplan", "qwen2_5_vl"))
TEMPLATES = (WAN, OPENSORAPLAN, QWEN)  # have blocks with variables, for all models: see `expand`
READMES = [ROOT / "README.md", ROOT / "README.zh.md", *ROOT.glob("apps/*/README.md"), *ROOT.glob("docs/**/*.md")]
COUNTS = ("--nnodes", "--nproc_per_node")  # of torchrun
PROGRAMS = {
    "mm_train": load_config,
    "mm_train.doctor": lambda argv: load_config(argv, DoctorConfig, "doctor"),
    "mm_train.extract": lambda argv: parse(ExtractConfig, argv, prog="extract"),
    "mm_train.estimate": lambda argv: load_config(argv, EstimateConfig, "estimate"),
    "mm_train.export": lambda argv: parse(ExportConfig, argv, prog="export"),
    "mm_infer": lambda argv: parse(InferConfig, argv, prog="infer"),
    "mm_infer.chat": lambda argv: parse(ChatConfig, argv, prog="chat"),
    "mm_infer.caption": lambda argv: parse(CaptionConfig, argv, prog="caption"),
    "mm_infer.page": read_flags,
    "mm_train.page": read_runs,
    "mm_data.show": lambda argv: show.make_parser().parse_args(argv),
    "mm_data.llava_to_mllm": lambda argv: llava_to_mllm.make_parser().parse_args(argv),
}
CONVERTERS = {"mm-convert": cli.main, "mm_convert.convert_ckpt_to_mm": convert_ckpt_to_mm.main}


Command = tuple[str, list[str], int]  # program, arguments, ranks


def blocks(readme: Path, language: str = "[a-z]*") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)


def command(words: list[str]) -> Command | None:
    """What a line of a shell starts, if it is a program of ours."""
    if words[:1] == ["mm-convert"]:
        return "mm-convert", words[1:], 1
    if words[:1] not in (["python"], ["torchrun"]) or "-m" not in words:
        return None
    if words[words.index("-m") + 1] not in PROGRAMS | CONVERTERS:
        return None
    at = words.index("-m") + 1
    return words[at], words[at + 1 :], prod(int(words[i + 1]) for i, word in enumerate(words[:at]) if word in COUNTS)


def written() -> list[Command]:
    """Every command of ours that stands in a code block as it is to be typed."""
    lines = [
        line
        for readme in READMES
        if readme not in TEMPLATES
        for block in blocks(readme)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    typed = [
        shlex.split(line, comments=True) for line in lines if line.startswith(("python ", "torchrun ", "mm-convert "))
    ]
    return [found for words in typed if (found := command(words))]


def table(page: Path, *first: str) -> list[dict[str, str]]:
    """The rows of the table of a page whose header begins so, by the headers of its columns; [] if it has none."""
    rows = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if rows and not line.startswith("|"):
            break
        if rows or [cell.strip("`") for cell in cells[: len(first)]] == [*first]:
            rows.append(cells)
    head, _, *rows = rows or [[], []]
    return [dict(zip([name.strip("`") for name in head], row, strict=True)) for row in rows]


def values(cell: str) -> list[str]:
    """What a cell offers: its code spans; "no"; and nothing, where it is empty or says so."""
    spans = re.findall(r"`(.*?)`", cell)
    return ["no"] if cell == "no" else spans if spans and "nothing" not in cell else ["", *spans]


def settings(page: Path) -> Iterator[dict[str, str]]:
    """Variables for the blocks of a page, as its tables have them: every model, on 1, 8 and 16 devices."""
    for model, ranks in product(table(page, "MODEL", "W"), table(page, "devices")):
        name, devices = model["MODEL"], ranks["devices"]
        chosen = {variable: values(cell) for variable, cell in (model | ranks).items() if variable.isupper()}
        if "E" in model:
            chosen["E"] = values(model["E"] or model["W"])
        rows = [row for row in table(page, "variable") if name in row["MODEL"]]
        chosen |= {row["variable"].strip("`"): values(row[devices]) for row in rows}
        for row in table(page, "MODEL", "GIVEN"):
            if name in row["MODEL"]:
                given = values(row["GIVEN"])
                chosen["GIVEN"] = given if devices == "1" else given[:1]
        for one_of_each in product(*chosen.values()):
            yield dict(zip(chosen, one_of_each, strict=True))


def expand(page: Path, variables: dict[str, str]) -> list[Command]:
    """The commands that bash makes of the blocks of a page, once the variables of one of them are set."""
    programs = ("python", "torchrun", "hf", "mm-convert", "mkdir", "cp")
    script = [f"{name}() {{ printf '%s\\037' {name} \"$@\"; echo; }}" for name in programs]  # says what it is given
    for block in blocks(page, "shell"):
        script.append(block)
        if block.startswith("MODEL="):
            script += [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    said = subprocess.run(["bash", "-euc", "\n".join(script)], check=True, capture_output=True, text=True).stdout
    found = [command(line.split("\037")[:-1]) for line in said.splitlines()]
    return [made for made in found if made and "no" not in made[1]]  # does not fit so few devices


def expand_all(page: Path) -> list[Command]:
    return [made for variables in settings(page) for made in expand(page, variables)]


def commands() -> list[Command]:
    """Each command of ours in the documentation, once."""
    found = [*written(), *(made for page in TEMPLATES for made in expand_all(page))]
    return list({str(made): made for made in found}.values())


def test_each_pattern_of_a_download_has_its_own_flag():
    """Without one, hf takes it for the name of the one file to fetch, and ignores all other patterns."""
    lines = {line for page in READMES for block in blocks(page) for line in block.splitlines()}
    downloads = [shlex.split(line) for line in lines if line.startswith("hf download ")]
    patterns = [(words[i - 1], word) for words in downloads for i, word in enumerate(words) if "*" in word]
    assert len(patterns) >= 3
    assert all(flag in ("--include", "--exclude") for flag, _ in patterns)


def test_one_block_stands_for_every_model_on_every_number_of_devices():
    """Every model of videos: in full, where so many devices hold it, and LoRA; each expert."""
    trained = {
        (arguments[1], ranks, "--recipe" in arguments, *re.findall("--expert (.*)", " ".join(arguments)))
        for page in TEMPLATES
        for program, arguments, ranks in expand_all(page)
        if program == "mm_train" and "--data.features" in arguments
    }
    fits = {"wan2.1-t2v-1.3b", "wan2.1-i2v-1.3b", "wan2.2-ti2v-5b", "vace-1.3b"}  # in full on one device
    fits |= {model for model in presets() if model.startswith("opensoraplan-1.2")}
    assert trained == {
        (model, ranks, lora, *expert)
        for model in presets()
        if "-tiny" not in model and find(model)[0].video is not None
        for ranks, lora in product((1, 8, 16), (False, True))
        for expert in ([("high",), ("low",)] if "a14b" in model else [()])
        if lora or ranks > 1 or model in fits
    }


def test_every_model_of_conversations_is_trained_in_each_way_where_so_many_devices_hold_it():
    trained = {
        (arguments[1], ranks, "".join(re.findall(r"--recipe \S+-(full|lora)", " ".join(arguments))))
        for program, arguments, ranks in expand_all(QWEN)
        if program == "mm_train" and arguments[-2:] != ["--output", "last4"] and "--parallel.tp" not in arguments
    }
    sizes = {f"qwen2.5-vl-{size}" for size in ("3b", "7b", "32b", "72b")}
    assert sizes == {name for name in presets() if "-tiny" not in name and find(name)[0].chat is not None}
    full = {(model, ranks) for model in sizes for ranks in (1, 8, 16, 32)} - {
        (f"qwen2.5-vl-{n}b", 1) for n in (7, 32, 72)
    }
    full -= {("qwen2.5-vl-72b", 8)}
    lora = {(model, ranks) for model in sizes for ranks in (1, 8, 16, 32)} - {(f"qwen2.5-vl-{n}b", 1) for n in (32, 72)}
    whole = full - {("qwen2.5-vl-3b", 1)}  # moments go to the host by FSDP alone, which takes two
    assert trained >= {(*one, "") for one in full} | {(*one, "full") for one in whole} | {
        (*one, "lora") for one in lora
    }


def test_there_are_commands_of_every_program():
    assert {program for program, *_ in commands()} == {*PROGRAMS, *CONVERTERS}


@pytest.mark.parametrize(("program", "arguments", "ranks"), commands())
def test_the_command_is_understood(program, arguments, ranks, tmp_path, monkeypatch, capsys):
    """And, of training, that its layout fits the ranks and its batch the layout."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    if program in PROGRAMS:
        read = PROGRAMS[program](arguments)
        if program == "mm_train":
            parallel = read.parallel.resolve(ranks)
            read.micro_batches(parallel.dp_replicate * parallel.dp_shard)
        return
    with pytest.raises(SystemExit) as stop:
        CONVERTERS[program](arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.endswith("does not exist\n"), said  # refused only because the example's files are not here
