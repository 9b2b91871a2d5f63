"""What a program prints: names of files are shown, and obeyed by no terminal; a reader that ends, ends no work."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tomllib

import pytest

from mm_convert import convert_ckpt, convert_ckpt_to_mm
from mm_convert.cli import main
from mm_convert.cli.arguments import dump
from mm_convert.cli.terminal import escaped_output, one_line
from mm_convert.write.progress import Progress

HOSTILE = "\x1b]0;x\x07\r\x9b2J\x7f\u202e\u2066\u2028\udcff"
SHOWN = r"\x1b]0;x\x07\x0d\x9b2J\x7f\u202e\u2066\u2028\udcff"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_printed_warned_logged_and_raised_is_escaped():
    code = (
        "import logging, sys, warnings; from mm_convert.cli.terminal import escaped_output\n"
        f"with escaped_output():\n    text = {HOSTILE!r}\n    print(text, '猫\\tß', flush=True)\n"
        "    warnings.warn(text)\n    logging.warning(text)\n    raise RuntimeError(text)"
    )
    utf8 = os.environ | {"PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=utf8)
    assert done.returncode == 1
    assert done.stdout == f"{SHOWN} 猫\tß\n"
    assert f"UserWarning: {SHOWN}\n" in done.stderr
    assert f"WARNING:root:{SHOWN}\n" in done.stderr
    assert done.stderr.endswith(f"RuntimeError: {SHOWN}\n")
    assert not CONTROLS.search(done.stderr)


def test_how_a_program_ends():
    with pytest.raises(SystemExit) as stop, escaped_output():
        sys.exit(HOSTILE)
    assert stop.value.code == SHOWN
    assert one_line(f"a\nb{HOSTILE}") == rf"a\nb{SHOWN}"


def test_the_streams_are_given_back(capsys):
    before = sys.stdout, sys.stderr
    with escaped_output():
        assert sys.stdout is not before[0]
        assert (sys.stdout.encoding, sys.stderr.isatty()) == (before[0].encoding, False)
    assert (sys.stdout, sys.stderr) == before


def test_a_bar_may_begin_its_line_anew(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with escaped_output():
        sys.stderr.write("\r 10 %\rgone")
        sys.stderr.write("\n")
        sys.stderr.write("\x1b[A\x1b[A")  # as tqdm leaves a bar below another
        sys.stderr.write("\x1b[A name")
        with Progress(100, "x") as progress:
            progress.shown -= 1
            progress(100)
    shown = sys.stderr.getvalue()
    assert shown.startswith("\r 10 %\\x0dgone\n\x1b[A\x1b[A\\x1b[A name\r")
    assert shown.count("100%") == 2
    assert shown.count("\x1b") == 2


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "gbk"])
def test_a_stream_of_another_encoding_stops_nothing(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict", newline="\n"))
    with escaped_output():
        print("é 猫 🐈")
    assert written.getvalue() == "é 猫 🐈\n".encode(encoding, "backslashreplace")


@pytest.mark.parametrize("closed", ["| head -n 1", ">&-", "2>&1 | true"])
def test_work_goes_on_when_nobody_reads(closed, tmp_path):
    code = (
        "import sys, time; from mm_convert.cli.terminal import escaped_output\n"
        "with escaped_output():\n"
        "    for i in range(3000): print('line', i, flush=i % 100 == 0); print('line', file=sys.stderr)\n"
        "    print('x' * 100000)\n"
        "    open(sys.argv[1], 'w').write('done')\n"
    )
    command = f'{{ "$0" -c "$1" "$2"; echo "code $?" >&3; }} {closed}'
    done = subprocess.run(
        ["bash", "-c", f"exec 3>{tmp_path}/code; {command}", sys.executable, code, str(tmp_path / "work")],
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "work").read_text() == "done"
    assert (tmp_path / "code").read_text() == "code 0\n"
    assert "Error" not in done.stderr


def test_a_full_disk_is_said():
    code = "from mm_convert.cli.terminal import escaped_output\nwith escaped_output(): print('lost')"
    done = subprocess.run([sys.executable, "-c", f"import sys\nsys.stdout = open('/dev/full', 'w')\n{code}"], text=True)
    assert done.returncode != 0


@pytest.mark.parametrize("name", ["\x1b]0;x\x07", "a\rb", "a\nb", "\u202exfdp", os.fsdecode(b"a\xff\x9b2J")])
def test_the_command_shows_names_as_they_are(name, tmp_path, toys, capsys):
    source = toys.diffusers(tmp_path / name)
    wrong = tmp_path / f"{name}.safetensors"
    wrong.write_bytes(b"nothing")
    out = tmp_path / f"{name}-out"
    for line, expected in (
        (["inspect", source], 0),
        (["inspect", wrong], 1),
        (["inspect", tmp_path / f"{name}-missing"], 2),
        (["convert", source, out], 0),
        (["inspect", out], 0),
        (["convert", source, tmp_path / f"{name}-dry", "--dry_run"], 0),
        (["convert", source, out], 1),
        (["convert", source, tmp_path / "x", f"--{name}"], 2),
        (["convert", source, tmp_path / "x", "--to", name], 2),
        (["convert", source, tmp_path / "x", "--config", tmp_path / name], 2),
        ([name], 2),
        (["diff", source, wrong], 1),
        (["diff", source, out], 0),
    ):
        code = 0
        try:
            main([str(word) for word in line])
        except SystemExit as stop:
            code = stop.code or 0
        shown, err = capsys.readouterr()
        if isinstance(code, str):  # what Python prints
            assert "\n" not in code
            code, err = 1, err + code
        assert code == (2 if "\udcff" in name else expected), (line, err)
        assert not CONTROLS.search(shown + err)
        assert "Traceback" not in err
    if "\udcff" not in name:
        assert not CONTROLS.search((out / "mm_convert.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", [convert_ckpt.main, convert_ckpt_to_mm.main])
def test_the_scripts_of_the_guides_are_alike(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script(["--mode", HOSTILE[:-1], "\x1b[2J"])
    shown = "".join(capsys.readouterr())
    assert stop.value.code == 2
    assert "error: " in shown
    assert not CONTROLS.search(shown)


def test_a_printed_configuration_can_be_read_back():
    text = dump({"a": HOSTILE[:-1]})
    assert not CONTROLS.search(text)
    assert tomllib.loads(text) == {"a": HOSTILE[:-1]}
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        dump({"a": HOSTILE})
