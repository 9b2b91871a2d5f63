"""The strict command line: every mistake is named, and what is printed can be read back."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_convert.cli.arguments import dump, flags_of, parse
from mm_convert.cli.values import check_fields


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


texts = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text != "null")
floats = st.floats(allow_nan=False, allow_infinity=False)


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
        adapter=st.builds(Adapter, st.integers(-(2**63), 2**63 - 1), floats),
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
        (["--model", "a", "--optim.lr", "fast"], "--optim.lr is fast; it takes a number"),
        (["--model", "a", "--clip", "x"], "--clip is x; it takes a number, or null"),
        (["--model", "a", "--kind", "c"], "--kind is c; it takes one of a, b"),
        (["--model", "a", "--clip", "7"], "clip must not be 7"),
        (["--model", "a", "stray"], "stray"),
        (["--model"], "--model has no value; it takes text"),
        (["--config"], "--config has no value; it takes a file"),
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
        ("[optim]\nlr = 'x'", "optim.lr is 'x'; it takes a number"),
        ("model = 3", "model is 3; it takes text"),
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


def test_a_configuration_by_its_flags():
    found = flags_of(read("--model", "x", "--optim.lr", 0.5, "--output", "out"))
    assert found["--model"] == "x"
    assert found["--optim.lr"] == 0.5
    assert found["--output"] == "out"
    assert set(found) >= {"--adapter.rank", "--sizes", "--clip"}


def test_special_floats_are_written_as_toml_has_them():
    assert "lr = inf" in dump(Optim(lr=math.inf))
    assert "lr = nan" in dump(Optim(lr=math.nan))


@pytest.mark.parametrize("flags", [("--prompts", "a"), ("--stages", "x"), ("--optim.betas", "0.9")])
def test_how_a_list_is_written_is_said(capsys, flags):
    assert 'a list is written ["a", "b"]' in fails(capsys, "--model", "x", *flags)


# --- text comes out as it was typed

ODD = ["#1.png", "~", "---", "&a", "*a", "!x", "{", "[", "a: b", "null ", " null", "NULL", "Null", "None", "yes", "no"]
ODD += ["on", "off", "true", "1_000", "0x10", "1e5", "12:30", "1", ".5", ".inf", ".nan", "- a", "? a", "|", ">", "%a"]
ODD += [
    "@a",
    "`a",
    "'a",
    '"a',
    "'a'",
    '"a"',
    "a #b",
    "a\nb",
    "{a: 1}",
    "2001-01-01",
    "==UNSET==",
    "-x",
    "=",
    "",
]
typed = (st.sampled_from(ODD) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))).filter(
    lambda text: text != "null"
)


@dataclass
class Texts:
    note: str | None = None
    plain: str = ""
    image: Path | None = None
    images: Path | list[Path] | None = None
    prompts: list[str] | None = None
    words: tuple[str, ...] = ()
    either: int | str | None = None


@settings(max_examples=150, deadline=None)
@given(typed)
def test_text_comes_out_as_typed(text):
    def take(name, written=text):
        return getattr(parse(Texts, [f"--{name}={written}"], prog="toy"), name)

    assert take("note") == take("plain") == text
    if text:
        assert take("image") == Path(text)
        assert text.startswith("[") or take("images") == Path(text)
    listed = json.dumps([text, "b"])
    assert take("prompts", listed) == [text, "b"]
    assert take("words", listed) == (text, "b")
    if text and not set(text) & set("[],'\"") and text == text.strip():  # in brackets, but not quoted
        assert take("prompts", f"[{text}, b]") == [text, "b"]
        assert take("images", f"[{text}]") == [Path(text)]
    if not text.startswith("--") or not text[2:3].isalpha():
        assert parse(Texts, ["--note", text], prog="toy").note == text


@settings(max_examples=100, deadline=None)
@given(typed.filter(lambda text: text.isascii() or text.encode("utf-8", "ignore").decode() == text))
def test_text_of_a_file_comes_out_as_written(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("text") / "my.toml"
    config = Texts(text, text, Path(text) if text else None, [Path(text)] if text else None, [text], (text,), text)
    file.write_text(dump(config), encoding="utf-8", newline="")
    assert parse(Texts, ["--config", str(file)], prog="toy") == config


@pytest.mark.parametrize("text", ["~", "yes", "1_000", "0x10", "12:30", "010", "&", "2001-01-01"])
def test_yaml_has_no_surprises(text, tmp_path):
    (tmp_path / "my.yaml").write_text(f"note: {text}\nimage: {text}\nprompts: [{text}, b]\nplain: x\n")
    if text == "&":
        text = "x"
        (tmp_path / "my.yaml").write_text("note: &a x\nimage: x\nprompts: [x, b]\nplain: x\n")
    assert parse(Texts, ["--config", str(tmp_path / "my.yaml")], prog="toy") == Texts(
        text, "x", Path(text), None, [text, "b"]
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("note: # 1.png", "line 1: a key has no value"),
        ("note: &a x\nplain: *a", "line 2: a configuration takes no aliases (*a)"),
        ("note: null\nplain: null", "plain is None; it takes text"),
        ("plain: 1e5", "plain is 100000.0; it takes text"),
        ("note: " + "[" * 2000, "is not TOML"),
        ("note = " + "[" * 2000, "nested too deeply"),
    ],
)
def test_what_a_file_says_of_nothing(text, words, tmp_path, capsys):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        parse(Texts, ["--config", str(tmp_path / "my.yaml")], prog="toy")
    assert words in capsys.readouterr().err


@dataclass
class Numbers:
    whole: Annotated[int, ">= 1", "<= 9"] = 1
    rate: Annotated[float, "> 0", "< 1"] = 0.5
    any_rate: float = 0.0
    pair: tuple[Annotated[float, ">= 0"], float] = (0.0, 0.0)
    shard: Literal[-1] | Annotated[int, ">= 1"] = -1
    maybe: Annotated[int | None, ">= 0"] = None
    fast: bool = False


@pytest.mark.parametrize(
    "argv",
    [
        *(
            f"--whole={text}"
            for text in ("0", "10", "1.0", "1e0", "0x1", "01:00", "one", "", " 1", "true", "null", "[1]")
        ),
        *(f"--rate={text}" for text in ("0", "1", "-1", "nan", "inf", "-inf", "1e999", "0x1", "1:00", "half", "")),
        *(f"--any_rate={text}" for text in ("nan", "inf", "-Infinity", "1e400")),
        *(
            f"--pair={text}"
            for text in ("[1]", "[1,2,3]", "[-1,0]", "[nan,0]", "1", "[1,2", "[1,,2]", "[1,2]]", '["1",2]')
        ),
        *(f"--shard={text}" for text in ("0", "-2")),
        *(f"--maybe={text}" for text in ("-1", "none", "~", "Null")),
        *(f"--fast={text}" for text in ("yes", "1", "on", "")),
    ],
)
def test_numbers_that_do_not_fit_are_named(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(Numbers, [argv], prog="toy")
    error = capsys.readouterr().err
    assert error.startswith(f"toy: error: {argv.partition('=')[0]} is ")
    assert "it takes" in error
    assert error.count("\n") == 1


def test_numbers_that_fit():
    argv = ["--whole=+9", "--rate=.5e0", "--pair", "[1, 2_0.5]", "--shard", "3", "--maybe", "null", "--fast", "True"]
    assert parse(Numbers, argv, prog="toy") == Numbers(9, 0.5, 0.0, (1.0, 20.5), 3, None, True)
    assert parse(Numbers, ["--shard", "-1", "--maybe", "0", "--any_rate", "-1e5"], prog="toy") == Numbers(
        maybe=0, any_rate=-1e5
    )


def test_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "my.toml").write_text('note = "é"\n', encoding="utf-8-sig")
    assert parse(Texts, ["--config", str(tmp_path / "my.toml")], prog="toy").note == "é"


def test_what_a_number_takes_is_said():
    with pytest.raises(ValueError, match=r"--rate is 7; it takes a number \(more than 0, less than 1\)$"):
        check_fields(Numbers, {"rate": 7}, "--")
    assert check_fields(Numbers, {"pair": [1, 2], "other": 3}) == {"pair": (1.0, 2.0), "other": 3}


@pytest.mark.parametrize(
    "text", ["note: a\nnote: b\n", "optim:\n  lr: 1\n  lr: 2\n", "optim: {lr: 1}\n'optim': {lr: 1}\n"]
)
def test_a_key_that_is_there_twice_is_refused_in_yaml(text, tmp_path, capsys):
    (tmp_path / "my.yaml").write_text(f"model: x\n{text}")
    with pytest.raises(SystemExit):
        read("--config", tmp_path / "my.yaml")
    assert re.search(r"my.yaml: line [34]: (note|lr|optim) is there twice", capsys.readouterr().err)


def test_a_name_that_is_there_twice_is_refused_in_a_table(capsys):
    with pytest.raises(SystemExit):
        read("--model", "x", "--sizes", '{"a": 1, "a": 2}')
    assert "each name once" in capsys.readouterr().err


def test_utf8_that_python_reads_as_ascii_is_said(capsys):
    """As it does with PYTHONUTF8=0 in the C locale."""
    with pytest.raises(SystemExit):
        read("--model", "\u4e00".encode().decode("ascii", "surrogateescape"))
    said = capsys.readouterr().err
    assert "and '\u4e00' is UTF-8: set PYTHONUTF8=1" in said
    with pytest.raises(SystemExit):
        read("--model", "\udcff")
    assert "is not UTF-8 text" in capsys.readouterr().err


@dataclass
class Several:
    lora: Path | list[Path] | None = field(default=None, metadata={"repeated": True})
    strength: float | list[float] = field(default=1.0, metadata={"repeated": True})
    steps: int = 1


def test_a_flag_that_may_be_given_several_times() -> None:
    def read(*argv: str) -> Several:
        return parse(Several, argv, prog="x")

    assert read("--lora", "a").lora == Path("a")
    assert read("--lora", "a", "--lora=b", "--strength", "0.5", "--strength", "-1") == Several(
        [Path("a"), Path("b")], [0.5, -1.0]
    )
    assert read("--lora", '["a", "b"]', "--lora", "c").lora == [Path("a"), Path("b"), Path("c")]
    assert read("--steps", "2", "--steps", "3").steps == 3  # of any other, the last counts
