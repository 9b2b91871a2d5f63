"""Lists in the guides' formats, and messages for those that are not."""

import json
import re

import pytest

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
