"""What files hold is told by a part of their bytes, at a bounded cost, and by no time."""

import os
import time

from mm_data import files_below, identify_files
from mm_data.files import identify_file


def write_sparse(path, size: int, at: dict[int, bytes]):
    """A large file that takes no space."""
    with open(path, "wb") as file:
        file.truncate(size)
        for place, data in at.items():
            file.seek(place)
            file.write(data)
    return path


def test_every_byte_of_a_small_file_counts_and_the_ends_of_a_large_one(tmp_path):
    a, b = write_sparse(tmp_path / "a", 5_000_000, {}), write_sparse(tmp_path / "b", 5_000_000, {3_333_333: b"x"})
    assert identify_file(a) != identify_file(b)
    large = [{}, {0: b"x"}, {2**34 - 1: b"x"}, {2**33: b"x" * 2**23}]
    seen = {identify_file(write_sparse(tmp_path / f"{i}", 2**34, at)) for i, at in enumerate(large)}
    assert len(seen) == 4
    assert identify_file(a).startswith("5,000,000 bytes, ")
    os.utime(b, (1, 1))
    assert identify_file(b) == identify_file(write_sparse(tmp_path / "c", 5_000_000, {3_333_333: b"x"}))


def test_many_files_cost_little(tmp_path):
    """100,000 clips are some thousands of shards, or as many files of MindSpeed-MM."""
    files = {f"{i}": write_sparse(tmp_path / f"{i}", 2**27, {0: b"%d" % i}) for i in range(5000)}
    start = time.perf_counter()
    found = identify_files(files)
    assert time.perf_counter() - start < 20
    assert len(set(found.values())) > 2500
    write_sparse(tmp_path / "0", 2**27, {2**27 - 1: b"x"})
    (tmp_path / "1").unlink()
    again = identify_files(files)
    assert [name for name in files if found[name] != again[name]] == ["0", "1"]
    assert again["1"] == "missing"


def test_a_folder_is_named_from_itself_without_what_is_hidden(tmp_path):
    for name in ("a/b.json", ".cache/c", "d.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(files_below(tmp_path)) == ["a/b.json", "d.bin"]
    assert list(files_below(tmp_path / "d.bin")) == ["d.bin"]
