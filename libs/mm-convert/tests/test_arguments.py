"""The strict command line: every mistake is named, and what is printed can be read back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_convert.cli.arguments import dump, parse


@dataclass
class Optim:
    """How the weights move."""

    lr: float = 1e-4
    "learning rate, 100% of it"
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass
class Adapter:
    rank: int = 8
    scale: float = 1.0


@dataclass
class Config:
    """A run."""

    model: str
    "a preset"
    optim: Optim = field(default_factory=Optim)
    stages: list[list[int]] | list[int] | None = None
    recompute: int | str = "none"
    fast: bool = False
    output: Path | None = None
    note: str | None = "x"
    adapter: Adapter = field(default_factory=Adapter)
    kind: Literal["a", "b"] = "a"
    sizes: dict[str, int] = field(default_factory=dict)
    clip: float | None = 1.0
    prompts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.clip == 7:
            raise ValueError("clip must not be 7")


def read(*argv, **kwargs):
    return parse(Config, [str(word) for word in argv], prog="toy", **kwargs)


def fails(capsys, *argv, **kwargs):
    with pytest.raises(SystemExit) as exit:
        read(*argv, **kwargs)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_flags():
    config = read(
        *("--model", "wan", "--optim.lr", "1e-3", "--optim.betas", "[0.8, 0.9]", "--stages", "[[5,5],[5,5]]"),
        *("--recompute", "3", "--fast", "--output", "out", "--note", "null", "--adapter.rank", "4"),
        *("--kind=b", "--sizes", '{"a": 1}', "--clip", "null", "--prompts", '["a cat", "a dog"]'),
    )
    assert config == Config(
        model="wan",
        optim=Optim(1e-3, (0.8, 0.9)),
        stages=[[5, 5], [5, 5]],
        recompute=3,
        fast=True,
        output=Path("out"),
        note=None,
        adapter=Adapter(4, 1.0),
        kind="b",
        sizes={"a": 1},
        clip=None,
        prompts=["a cat", "a dog"],
    )
    assert isinstance(config.optim, Optim)
    assert isinstance(config.output, Path)
    assert read("--model", "wan", "--stages", "[1,2]", "--fast", "false").stages == [1, 2]


def test_later_beats_earlier(tmp_path):
    (tmp_path / "recipe.toml").write_text('model = "r"\nnote = "r"\nkind = "b"\n[optim]\nlr = 0.5\n')
    (tmp_path / "mine.toml").write_text('model = "m"\nnote = "m"\n[optim]\nbetas = [0.1, 0.2]\n')
    (tmp_path / "more.toml").write_text('note = "more"\n')
    recipe, mine, more = (tmp_path / name for name in ("recipe.toml", "mine.toml", "more.toml"))
    config = read("--config", mine, f"--config={more}", "--model", "flag", defaults=[recipe])
    assert (config.model, config.note, config.kind) == ("flag", "more", "b")
    assert config.optim == Optim(0.5, (0.1, 0.2))
    assert read("--model", "first", "--config", mine).model == "first"  # a flag, wherever it stands


def test_what_is_printed_reads_back(tmp_path, capsys):
    argv = ["--model", 'a "quoted" \\ name\n', "--note", "null", "--adapter.scale", "0.5", "--stages", "[[1],[2,3]]"]
    with pytest.raises(SystemExit) as exit:
        read(*argv, "--print_config")
    assert exit.value.code == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    assert read("--config", tmp_path / "printed.toml") == read(*argv)


texts = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text not in ("null", "==UNSET=="))
floats = st.floats(allow_nan=False)


@settings(max_examples=25, deadline=None)
@given(
    st.builds(
        Config,
        model=texts,
        optim=st.builds(Optim, floats, st.tuples(floats, floats)),
        stages=st.none()
        | st.lists(st.integers(0, 99))
        | st.lists(st.lists(st.integers(0, 99), min_size=1), min_size=1),
        recompute=st.integers(0, 99) | st.sampled_from(["none", "full"]),
        fast=st.booleans(),
        note=st.none() | texts,
        adapter=st.builds(Adapter, st.integers(), floats),
        sizes=st.dictionaries(texts, st.integers(-(2**63), 2**63 - 1)),
        clip=st.none() | floats.filter(lambda clip: clip != 7),
        prompts=st.lists(texts),
    )
)
def test_any_configuration_reads_back(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("dump") / "config.toml"
    file.write_text(dump(config), encoding="utf-8", newline="")
    assert read("--config", file) == config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--modle", "a"], "unknown option --modle, did you mean --model?"),
        (["--model", "a", "--lr", "3"], "did you mean --optim.lr?"),
        (["--model", "a", "--optim", "{}"], "did you mean --optim.lr?"),
        (["--model", "a", "--adapter.rnk", "3"], "did you mean --adapter.rank?"),
        (["--model", "a", "--mod", "b"], "unknown option --mod"),  # no abbreviations
        (["--model", "a", "--optim.lr", "fast"], "optim.lr: Expected a float. Got value: fast"),
        (["--model", "a", "--clip", "x"], "clip: Expected one of float, null. Got value: x"),
        (["--model", "a", "--kind", "c"], "kind: Expected a Literal['a', 'b']. Got value: c"),
        (["--model", "a", "--clip", "7"], "clip must not be 7"),
        (["--model", "a", "stray"], "stray"),
        (["--model"], "--model: expected one argument"),
        (["--config"], "--config needs a file"),
        (["--config", "nowhere.toml"], "cannot read nowhere.toml"),
        ([], "required: --model"),
    ],
)
def test_mistakes_on_the_command_line(argv, words, capsys):
    assert words in fails(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle = 'a'", "unknown key modle, did you mean model?"),
        ("[optim]\nlrr = 3", "unknown key optim.lrr, did you mean optim.lr?"),
        ("[optm]\nlr = 3", "unknown key optm, did you mean"),
        ("lr = 3", "unknown key lr, did you mean optim.lr?"),
        ("[adapter]\nrnk = 3", "unknown key adapter.rnk, did you mean adapter.rank?"),
        ("optim = 3", "optim is a table ([optim]), not the value 3"),
        ("[optim]\nlr = 'x'", "optim.lr: Expected a float. Got value: x"),
        ("model = 3", "model: Expected a str. Got value: 3"),
        ("model = ", "is not TOML"),
    ],
)
def test_mistakes_in_a_file_name_the_file(text, words, tmp_path, capsys):
    (tmp_path / "my.toml").write_text(text)
    error = fails(capsys, "--model", "a", "--config", tmp_path / "my.toml")
    assert words in error
    assert "my.toml" in error
    assert words in fails(capsys, "--model", "a", defaults=[tmp_path / "my.toml"])


def test_help_shows_docstrings_and_defaults(capsys, tmp_path):
    (tmp_path / "recipe.toml").write_text("[optim]\nlr = 0.25\n")
    with pytest.raises(SystemExit) as exit:
        read("--help", defaults=[tmp_path / "recipe.toml"])
    assert exit.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "A run.",
        "a preset (required",
        "How the weights move.",
        "learning rate, 100% of it",
        "default: 0.25",
    ):
        assert words in out


def test_special_floats_are_written_as_toml_has_them():
    assert "lr = inf" in dump(Optim(lr=math.inf))
    assert "lr = nan" in dump(Optim(lr=math.nan))


@pytest.mark.parametrize("flags", [("--prompts", "a"), ("--stages", "x"), ("--optim.betas", "0.9")])
def test_how_a_list_is_written_is_said(capsys, flags):
    assert 'a list is written ["a", "b"]' in fails(capsys, "--model", "x", *flags)
