"""A conversion is killed before every change that it makes to the file system, and the same command runs again.

Nothing is lost and nothing is half: what stands under a visible name is the old or the new one, whole. Afterwards all
is as if nothing had been killed, and nothing is left behind.
"""

from __future__ import annotations

import errno
import fcntl
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mm_convert.cli.commands  # noqa: F401  # so that the runs need not
from mm_convert import convert, diff, lock_output
from mm_convert.store.mm import MANIFEST
from mm_convert.testing.kills import Scenario, kill_everywhere
from mm_convert.write import install


def tree(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, but what manifests say of the source: a second conversion in place reads the first."""
    return {str(path.relative_to(folder)): _content(path) for path in folder.rglob("*")}


def _content(path: Path) -> bytes:
    if path.is_dir():
        return b"folder"
    return re.sub(rb'  "(from|source)": .*\n', b"", path.read_bytes()) if MANIFEST in path.name else path.read_bytes()


def visible(files: dict[str, bytes]) -> dict[str, bytes]:
    hidden = (".partial-", ".partial", ".lock")
    return {n: data for n, data in files.items() if data != b"folder" and not any(part in n for part in hidden)}


# Where several names change, one after the other, these are what a reader may see between; what is there is whole.
BETWEEN = {
    "a file over": ["T.pt"],  # the old one, or the new one, without its manifest
    "a tree in place": ["P"],  # `release` without the file that names it: the published files are read
    "published files beside a tree": ["P"],  # some of them: the tree is read
    "a file": [],  # the manifest alone
}


def test_a_conversion_killed_before_any_change_loses_nothing_and_can_be_given_again(toys, tmp_path):
    sizes = toys.kinds["t2v"] | {"layers": 2}
    source, other = (
        toys.write_checkpoint(tmp_path / name, toys.shapes("diffusers", sizes), files)
        for name, files in (("S", 2), ("other", 1))
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    convert(other, tmp_path / "old/T", "mm")
    convert(other, tmp_path / "old file/T.pt", "original")
    shutil.copytree(source, tmp_path / "published/P")
    shutil.copytree(source, tmp_path / "made/P")
    convert(tmp_path / "made/P", tmp_path / "made/P", "mindspeed")
    convert(source, tmp_path / "trees/P", "mindspeed", pp_layers=[1, 1])
    s = str(source)
    commands = {
        "a tree": (["convert", s, "new/T", "--to", "mindspeed", "--pp_layers", "[1,1]"], empty),
        "a file": (["convert", s, "T.pt", "--to", "original"], empty),
        "over": (["convert", s, "T", "--overwrite"], tmp_path / "old"),
        "a file over": (["convert", s, "T.pt", "--to", "original", "--overwrite"], tmp_path / "old file"),
        "in place": (["convert", "P", "P"], tmp_path / "published"),
        "a tree in place": (["convert", "P", "P", "--to", "mindspeed"], tmp_path / "published"),
        "in place over": (["convert", "P", "P", "--to", "mindspeed", "--overwrite"], tmp_path / "made"),
        "published files beside a tree": (
            ["convert", "P", "P", "--to", "diffusers", "--shard_gb", "0.00006"],
            tmp_path / "trees",
        ),
    }
    scenarios = [Scenario("mm_convert.cli:main", argv, str(start)) for argv, start in commands.values()]
    for name, kills in zip(commands, kill_everywhere(scenarios, tmp_path / "work", ["mm_convert"]), strict=True):
        argv, start = commands[name]
        assert len(kills.kills) > 10, name
        before, after = tree(start), tree(kills.final)
        assert visible(after) == {name: data for name, data in after.items() if data != b"folder"}
        for kill in kills.kills:
            at = f"{name}: {' '.join(argv)}, killed before {kill.change}"
            killed, again = tree(kill.killed), tree(kill.again)
            seen = visible(killed)
            if seen not in (visible(before), visible(after)):
                assert name in BETWEEN, at
                assert all(seen[file] in (before.get(file), after.get(file)) for file in seen), at
                assert {file for file in visible(before) if not file.endswith(".mm_convert.json")} <= {*seen}, at
                for target in BETWEEN[name]:
                    assert not any(diff(kill.killed / target, source)) or not any(diff(kill.killed / target, other)), at
            assert kill.code == 0 or (seen == visible(after) and "exists" in kill.said), f"{at}\n{kill.said}"
            assert again == after, at


def test_without_an_exchange_of_names_the_old_one_is_put_aside_and_not_lost(toys, tmp_path, monkeypatch):
    source, other = toys.diffusers(tmp_path / "S"), toys.diffusers(tmp_path / "other")
    monkeypatch.setattr(install, "exchange", lambda a, b: False)
    convert(other, tmp_path / "T")
    convert(source, tmp_path / "T", overwrite=True)
    assert not any(diff(tmp_path / "T", source))
    # killed when the old one was put aside, and the new one had not taken its place
    hidden = tmp_path / ".T.partial-1"
    convert(other, hidden / "new/T")
    (hidden / "old").mkdir()
    (tmp_path / "T").rename(hidden / "old/T")
    (hidden / "moving.json").write_text(json.dumps({"moves": ["T"]}), encoding="utf-8")
    assert install.recover(tmp_path, "T") == {"T"}
    assert not any(diff(tmp_path / "T", other))
    assert {path.name for path in tmp_path.iterdir()} == {"S", "other", "T"}


def test_what_is_left_moves_nothing_out_of_its_folder(tmp_path):
    hidden = tmp_path / "into/.T.partial-1"
    (hidden / "new").mkdir(parents=True)
    (hidden / "x").touch()
    (hidden / "moving.json").write_text(json.dumps({"moves": ["../x", ".", "/etc/x", 1]}), encoding="utf-8")
    (tmp_path / "into/.T.partial-2").symlink_to(tmp_path)
    assert install.recover(tmp_path / "into", "T") == set()
    assert {path.name for path in tmp_path.rglob("*")} == {"into", ".T.partial-2"}


def test_two_conversions_into_one_target_are_one_too_many(toys, tmp_path):
    source = toys.diffusers(tmp_path / "S")
    (tmp_path / ".T.partial-1/new").mkdir(parents=True)
    command = "import sys, mm_convert; lock = mm_convert.lock_output('T', '.T.lock'); lock.__enter__(); "
    command += "print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", command], stdin=-1, stdout=-1, cwd=tmp_path) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=rf"T is being written by process {other.pid} on .*, since 20\d\d-"):
            convert(source, tmp_path / "T")
        assert (tmp_path / ".T.partial-1").exists()  # a living process may be writing there
        other.kill()  # the lock goes with the process, its file stays
    assert (tmp_path / ".T.lock").exists()
    convert(source, tmp_path / "T")
    assert {path.name for path in tmp_path.iterdir()} == {"S", "T"}


def test_where_there_are_no_locks_it_is_said_and_nothing_is_swept(toys, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    source = toys.diffusers(tmp_path / "S")
    (tmp_path / ".T.partial-1/new").mkdir(parents=True)
    monkeypatch.setattr(fcntl, "flock", refuse)
    convert(source, tmp_path / "T")
    assert "T cannot be locked (No locks available): see to it that nothing else writes" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"S", "T", ".T.partial-1"}


def test_a_lock_is_taken_by_one_and_then_by_the_other(tmp_path):
    with lock_output(tmp_path):
        with pytest.raises(ValueError, match="wait until it has ended"), lock_output(tmp_path):
            pass
        with pytest.raises(ValueError, match="wait until it has ended"), lock_output(tmp_path):
            pass  # a refused one has not taken the file away
    with lock_output(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_lock_on_a_full_disk_is_named_and_not_left(tmp_path):
    """Here of a process that may write no byte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match=r"\.lock") as refused, lock_output(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
    with lock_output(tmp_path) as held:
        assert held
