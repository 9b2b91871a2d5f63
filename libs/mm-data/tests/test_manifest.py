"""Lists in the guides' formats, and messages for those that are not."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_data import Geometry, read_manifest, select

CAT = {
    "path": "videos/1.mp4",
    "cap": "a cat",
    "num_frames": 81,
    "fps": 24,
    "resolution": {"height": 480, "width": 832},
}


def dataset(folder, *records, name="data.json"):
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for record in records:
        (folder / record["path"]).write_bytes(b"video")
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records)) + "\n\n"
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_the_guides_format(tmp_path, name):
    path = dataset(
        tmp_path, CAT, {"path": "videos/2.mp4", "cap": ["one", "two"], "duration": 2.5, "fps": 30}, name=name
    )
    one, two = read_manifest(path)
    assert (one.id, one.path, one.captions) == ("videos/1.mp4", tmp_path / "videos/1.mp4", ("a cat",))
    assert (one.num_frames, one.fps, one.height, one.width, one.cut) == (81, 24, 480, 832, None)
    assert (two.captions, two.num_frames, two.height) == (("one", "two"), 75, None)


def test_several_sets_with_commas_and_spaces(tmp_path):
    first, second = tmp_path / "cats, dogs and more", tmp_path / "plain"
    dataset(first, CAT, name="data, new.json")
    dataset(second, CAT)
    text = tmp_path / "data.txt"
    text.write_text(f"# two sets\n{first},{first}/data, new.json\n\n {second} , {second}/data.json \n")
    samples = read_manifest(text)
    assert [s.path for s in samples] == [first / "videos/1.mp4", second / "videos/1.mp4"]
    assert [s.id for s in samples] == ["videos/1.mp4", "videos/1.mp4#2"]


def test_relative_paths_are_also_looked_for_beside_data_txt(tmp_path):
    dataset(tmp_path / "set", CAT)
    (tmp_path / "data.txt").write_text("set,set/data.json\n")
    assert read_manifest(tmp_path / "data.txt")[0].path == tmp_path / "set/videos/1.mp4"


def test_cuts_of_one_video_are_samples_of_their_own(tmp_path):
    path = dataset(tmp_path, {**CAT, "cut": [0, 81]}, {**CAT, "cut": [81, 162]})
    assert [(s.id, s.cut) for s in read_manifest(path)] == [
        ("videos/1.mp4[0:81]", (0, 81)),
        ("videos/1.mp4[81:162]", (81, 162)),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[]", "lists no samples"),
        ("a.json", "", "a.json, line 1: not JSON"),
        ("a.json", '{"path": "x"}', "expected a list of objects, found dict"),
        ("a.json", '[{"cap": "x"}]', "sample 0: no path"),
        ("a.json", "[3]", "sample 0: expected an object"),
        ("a.json", '[{"path": "x", "cap": 3}]', "sample 0: cap is 3"),
        ("a.json", '[{"path": "x", "fps": "24"}]', "fps is '24'"),
        ("a.json", '[{"path": "x", "cut": [5, 5]}]', "cut is"),
        ("a.json", '[{"path": "x", "resolution": {"height": "480"}}]', "height is '480'"),
        ("a.jsonl", '{"path": "x"}\n{"path": ', "a.jsonl, line 2: not JSON"),
        ("a.txt", "\n# nothing\n", "lists no data sets"),
        ("a.txt", "one two\n", "line 1: 'one two' has no comma"),
        ("a.txt", "/nowhere,/nowhere/a.json\n", "/nowhere is no folder, /nowhere/a.json is no file"),
        ("a.csv", "x", "not .csv"),
    ],
)
def test_bad_lists_are_refused_by_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_manifest(tmp_path / name)


def test_folders_and_absent_files(tmp_path):
    with pytest.raises(ValueError, match="write a data"):
        read_manifest(tmp_path)
    dataset(tmp_path, CAT)
    with pytest.raises(ValueError, match=r"did you mean .*data\.json\?"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_manifest(tmp_path / "none.json")


def test_the_report_counts_every_reason(tmp_path):
    def like(number, **changes):
        return {**CAT, "path": f"videos/{number}.mp4", **changes}

    path = dataset(
        tmp_path,
        CAT,
        like(2, cap=" "),
        like(3, resolution={"height": 100, "width": 170}),
        like(4, resolution={"height": 832, "width": 300}),
        like(5, num_frames=8),
        like(6, num_frames=80, fps=60),
        like(7),
        like(8, resolution=None, num_frames=None),
        like(9, cut=[0, 8]),
    )
    (tmp_path / "videos/7.mp4").unlink()
    chosen = select(read_manifest(path), Geometry(num_frames=33, min_frames=17, fps=12))
    assert [s.id for s in chosen.kept] == ["videos/1.mp4", "videos/8.mp4"]  # what is not said is judged at decoding
    assert chosen.counts == {
        "too_short": 3,
        "no_caption": 1,
        "resolution_too_small": 1,
        "aspect_mismatch": 1,
        "missing_file": 1,
    }
    assert "9 samples, 2 kept, 7 dropped" in str(chosen)
    assert "too_short: 3, e.g. videos/5.mp4: 4 frames, fewer than min_frames=17" in str(chosen)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.txt"])
def test_odd_separators_are_no_line_ends_and_other_encodings_are_named(tmp_path, name):
    odd = "a cat\u2028on\x85a mat"
    folder = tmp_path / odd
    folder.mkdir()
    text = json.dumps({"path": "1.mp4", "cap": odd}, ensure_ascii=False)
    (folder / "data.json").write_text(f"[{text}]", encoding="utf-8")
    (folder / "data.jsonl").write_bytes(f"{text}\r\n{text}\n".encode())
    (folder / "data.txt").write_text(f"{folder},{folder}/data.json\n", encoding="utf-8")
    assert {sample.captions for sample in read_manifest(folder / name)} == {(odd,)}
    (folder / name).write_bytes(b"\xff\xfe[")
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text"):
        read_manifest(folder / name)


def test_the_report_tells_of_short_clips(tmp_path):
    path = dataset(
        tmp_path,
        CAT,
        {**CAT, "path": "videos/2.mp4", "num_frames": 80},
        {**CAT, "path": "videos/3.mp4", "cut": [0, 20]},
        {**CAT, "path": "videos/4.mp4", "num_frames": None},
    )
    samples = read_manifest(path)
    report = select(samples, Geometry(num_frames=81))
    assert report.short == {"videos/2.mp4": 77, "videos/3.mp4[0:20]": 17}
    assert "shorter than num_frames=81: 2, the shortest gives a clip of 17: videos/3.mp4[0:20]" in str(report)
    assert "shorter" not in str(select(samples, Geometry(num_frames=17)))
    assert str(select(samples[:1], Geometry())) == "1 sample, 1 kept, 0 dropped"


def read(tmp_path, record, name="data.json"):
    text = record if isinstance(record, str) else json.dumps(record)
    (tmp_path / name).write_text(f"[{text}]" if name == "data.json" else text, encoding="utf-8")
    return read_manifest(tmp_path / name)[0]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ('"num_frames": 48.0, "fps": 24.0, "resolution": {"height": 64.0, "width": 96.0}', (48, 24, 64, 96, None)),
        ('"num_frames": NaN, "fps": NaN, "duration": 2.0, "resolution": NaN, "cut": NaN', (None,) * 5),
        ('"num_frames": 0, "fps": 0, "resolution": {"height": 0, "width": -1}', (None,) * 5),
        ('"num_frames": -192153584101141, "fps": 24, "duration": 2', (48, 24, None, None, None)),  # of OpenCV
        ('"num_frames": 81, "cut": [0.0, 17.0]', (81, None, None, None, (0, 17))),
        ('"hash": ' + "7" * 5000, (None,) * 5),  # more digits than Python reads, of what is not read here
    ],
)
def test_numbers_are_read_as_pandas_and_opencv_write_them(tmp_path, facts, expected):
    sample = read(tmp_path, f'{{"path": "a.mp4", "cap": ["x"], {facts}}}')
    assert (sample.num_frames, sample.fps, sample.height, sample.width, sample.cut) == expected
    assert all(isinstance(n, int) for n in (sample.num_frames, sample.height, *(sample.cut or ())) if n is not None)


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        ('"duration": Infinity', "sample 0: duration is Infinity"),
        ('"fps": -Infinity', "sample 0: fps is -Infinity"),
        ('"fps": 1e400', "sample 0: fps is 1e400"),
        ('"num_frames": ' + "7" * 5000, f"sample 0: num_frames is {'7' * 40}... (5,000 characters)"),
        ('"num_frames": 9223372036854775809', "sample 0: num_frames is 9223372036854775809"),
        ('"num_frames": 48.5', "sample 0: num_frames is 48.5; it must be a whole number"),
        ('"num_frames": true', "sample 0: num_frames is True"),
        ('"resolution": {"width": [1]}', "sample 0: width is [1]"),
        ('"resolution": "480x832"', "sample 0: resolution is '480x832'; it must be an object, as {"),
        ('"cut": 5', "sample 0: cut is 5; it must be a list"),
        ('"cut": [0, NaN]', "sample 0: cut is [0, None]"),
        ('"cut": [0, 1e400]', "sample 0: cut is [0, 1e400]"),
        ('"text": 1e400', "sample 0: text is 1e400"),
        ('"cap": ["x", null]', "sample 0: cap is ['x', None]"),
        ('"fps": ' + "[" * 2000 + "]" * 2000, "line 1: lists and objects nested more than 64 deep"),
        ('"fps": ' + "[" * 100 + "]" * 100, "line 1: lists and objects nested more than 64 deep"),
    ],
)
def test_odd_values_are_refused_with_file_and_position(tmp_path, fact, message):
    with pytest.raises(ValueError, match=re.escape(f"data.json, {message}")):
        read(tmp_path, f'{{"path": "a.mp4", {fact}}}')


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FACTS = ("cap", "caption", "num_frames", "fps", "duration", "resolution", "cut", "src_ref_images", "path", "video")


@settings(max_examples=300, deadline=None)
@given(
    record=st.fixed_dictionaries({"path": st.text(max_size=8)}, optional=dict.fromkeys(FACTS[:-2], JSON_VALUES))
    | st.dictionaries(st.sampled_from(FACTS), JSON_VALUES, max_size=5),
    height=st.integers() | st.floats(),
)
def test_whatever_a_list_says_is_a_sample_or_one_clear_line(tmp_path_factory, record, height):
    """…and no sample that was read makes choosing among them fail."""
    folder = tmp_path_factory.mktemp("any")
    if record.get("resolution") is None:
        record["resolution"] = {"height": height, "width": 96}
    try:
        sample = read(folder, record)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith(f"{folder / 'data.json'}, sample 0: ")
        assert "\n" not in refusal
        return
    (folder / "there.mp4").write_bytes(b"no video")
    chosen = select([replace(sample, path=folder / "there.mp4", control=None)], Geometry(num_frames=33, min_frames=17))
    assert "1 sample, " in str(chosen)
    assert all(n is None or n > 0 for n in (sample.num_frames, sample.fps, sample.height, sample.width))


@pytest.mark.parametrize("key", ["cap", "caption", "text", "prompt"])
def test_captions_stand_under_the_keys_of_the_common_tools(tmp_path, key):
    assert read(tmp_path, {"path": "a.mp4", key: "a cat"}).captions == ("a cat",)
    assert read(tmp_path, {"path": "a.mp4", "prompt": None, "text": "", key: ["a cat", " "]}).captions == ("a cat",)
    assert read(tmp_path, {"path": "a.mp4", key: "a cat", "cap": "a cat"}).captions == ("a cat",)
    other = "caption" if key == "cap" else "cap"
    with pytest.raises(ValueError, match=r"sample 0: both .*\('a cat'\) and .*\('a dog'\)|sample 0: both .*dog.* and"):
        read(tmp_path, {"path": "a.mp4", key: "a cat", other: "a dog"})


def test_every_sample_has_an_id_of_its_own(tmp_path):
    """…also where a file is called as we number those of one name."""
    names = ["a", "a#2", "a", "a", "a#2", "a[0:4]"]
    text = json.dumps([{"path": name} for name in names] + [{"path": "a", "cut": [0, 4]}])
    (tmp_path / "data.json").write_text(text)
    ids = [sample.id for sample in read_manifest(tmp_path / "data.json")]
    assert ids == ["a", "a#2", "a#3", "a#4", "a#2#2", "a[0:4]", "a[0:4]#2"]


def test_lists_are_read_with_a_byte_order_mark_and_only_from_files(tmp_path):
    for name, text in (("a.json", '[{"path": "1"}]'), ("a.jsonl", '{"path": "1"}\n'), ("a.txt", f"{tmp_path},a.json")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert [sample.id for sample in read_manifest(tmp_path / name)] == ["1"]
        os.mkfifo(tmp_path / f"pipe{name[1:]}")
        with pytest.raises(ValueError, match=r"is a named pipe \(FIFO\), not a file"):
            read_manifest(tmp_path / f"pipe{name[1:]}")
    (tmp_path / "a.json").write_text('[{"path": "1"},]')
    with pytest.raises(ValueError, match=r"a\.json, line 1: not JSON"):
        read_manifest(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('[{"path": "1"}\n] x')
    with pytest.raises(ValueError, match=r"a\.json, line 2: not JSON: Extra data"):
        read_manifest(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_bytes(b'{"path": "' + b"x" * (17 << 20))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: it has more than 16,777,216 bytes"):
        read_manifest(tmp_path / "a.jsonl")


def test_odd_paths_are_dropped_with_their_reason(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"video")
    odd = {
        "folder": ("no_file", "is a folder"),
        "pipe": ("no_file", "is a named pipe (FIFO)"),
        "x" * 5000: ("missing_file", "File name too long"),
        "\0": ("missing_file", "holds a NUL"),
        "\ud83d": ("missing_file", "half a character"),
        "file/inside": ("missing_file", "Not a directory"),
        "\x1b[2Jgone": ("missing_file", r"\x1b[2Jgone is not there"),
    }
    (tmp_path / "data.json").write_text(json.dumps([{"path": path, "cap": "x"} for path in odd]))
    chosen = select(read_manifest(tmp_path / "data.json"), Geometry())
    assert not chosen.kept
    for (sample, reason), (path, (kind, detail)) in zip(chosen.dropped, odd.items(), strict=True):
        assert (sample.id, reason.kind) == (path, kind)
        assert detail in reason.detail
        assert len(reason.detail) < 300
    assert "\x1b" not in str(chosen)
    (half,) = select([replace(read(tmp_path, {"path": "file", "cap": "x"}), captions=("\ud83d",))], Geometry()).dropped
    assert str(half[1]).startswith("bad_caption: cap holds half a character")


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize(
    "record", ['{"path": "a.mp4", "cap": "x", "cap": "y"}', '{"path": "a.mp4", "resolution": {"a": 1, "b": 2, "a": 1}}']
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, name, record):
    with pytest.raises(ValueError, match=rf"{name}, line 1: an object has the key '(cap|a)' twice"):
        read(tmp_path, record, name)


def test_a_line_of_commas_is_not_tried_at_each(tmp_path):
    (tmp_path / "data.txt").write_text("," * 10_000_000)
    with pytest.raises(ValueError, match=r"line 1: .* has 10,000,000 characters, more than two paths have"):
        read_manifest(tmp_path / "data.txt")


def test_names_that_the_locale_cannot_spell_are_said(tmp_path):
    (tmp_path / "\u4e00.mp4").touch()
    code = "import sys; from mm_data.files import find_fault; print(ascii(find_fault(sys.argv[1] + chr(0x4e00))))"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, f"{tmp_path}/"], env=os.environ | ascii_only, capture_output=True, text=True
    )
    assert "has no name in ascii, the encoding of the locale: set PYTHONUTF8=1" in done.stdout
