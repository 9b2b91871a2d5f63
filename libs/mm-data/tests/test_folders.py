"""A folder with an annotation.json in it and in its folders; the lists of Open-Sora-Plan, of both versions."""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_data import Geometry, read_manifest, select
from mm_data.annotations import find_annotations
from mm_data.nearest import Neighbours

CLIP = {"cap": ["a cat"], "resolution": {"height": 480, "width": 640}, "fps": 24.0, "duration": 8.0}


def write(folder, *entries, files=()):
    """An annotation.json with these entries, each a path or a record, and files."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [entry if isinstance(entry, dict) else CLIP | {"path": entry} for entry in entries]
    if entries:
        (folder / "annotation.json").write_text(json.dumps(records))
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"video")


def read(folder):
    notes = []
    return read_manifest(folder, notes.append), notes


def test_paths_begin_at_their_list_or_at_the_folder_wherever_the_file_is(tmp_path):
    write(tmp_path, "top.mp4", "folder_01/named by the top.mp4", files=["top.mp4", "folder_01/named by the top.mp4"])
    write(tmp_path / "folder_01", "video0.mp4", "folder_01/video1.mp4", files=["video0.mp4", "video1.mp4"])
    write(tmp_path / "folder_02", "video0.mp4", "deep/video0.mp4", files=["video0.mp4", "deep/video0.mp4"])
    write(tmp_path / "no list", files=["unread.mp4"])
    write(tmp_path / "folder_01/too deep", "unread.mp4", files=["unread.mp4"])
    samples, notes = read(tmp_path)
    assert [sample.id for sample in samples] == [
        "top.mp4",
        "folder_01/named by the top.mp4",
        "folder_01/video0.mp4",
        "folder_01/video1.mp4",
        "folder_02/video0.mp4",
        "folder_02/deep/video0.mp4",
    ]
    assert all(sample.path == tmp_path / sample.id for sample in samples)
    assert (samples[0].num_frames, samples[0].fps, samples[0].height, samples[0].width) == (192, 24.0, 480, 640)
    assert not notes
    assert len(select(samples, Geometry()).kept) == 6


def test_names_are_the_same_from_wherever_the_command_runs(tmp_path, monkeypatch):
    write(tmp_path / "set/folder_01", "video0.mp4", "../other.mp4", files=["video0.mp4", "../other.mp4"])
    (tmp_path / "set/abs.mp4").write_bytes(b"video")
    write(tmp_path / "set", str(tmp_path / "set/abs.mp4"))
    expected = ["abs.mp4", "folder_01/video0.mp4", "other.mp4"]
    assert [sample.id for sample in read(tmp_path / "set")[0]] == expected
    monkeypatch.chdir(tmp_path)
    for path in ("set", "./set/", "set/folder_01/.."):
        assert [sample.id for sample in read(path)[0]] == expected
    monkeypatch.chdir(tmp_path / "set")
    assert [sample.id for sample in read(".")[0]] == expected


def test_a_path_that_may_be_two_files_is_refused_with_both(tmp_path):
    write(tmp_path, files=["a.mp4"])
    write(tmp_path / "folder_01", "a.mp4", files=["a.mp4"])
    message = rf"folder_01/annotation.json, sample 0: 'a.mp4' may be {tmp_path}/folder_01/a.mp4 or {tmp_path}/a.mp4, wh"
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "a.mp4").symlink_to("folder_01/a.mp4")
    assert [sample.id for sample in read(tmp_path)[0]] == ["folder_01/a.mp4"]


def test_a_file_of_two_lists_counts_once_and_that_is_said(tmp_path):
    write(tmp_path, "f/1.mp4", "f/2.mp4", {"path": "f/3.mp4", "cap": "one"}, "f/4.mp4", files=["f/1.mp4", "f/2.mp4"])
    cut = CLIP | {"path": "4.mp4", "cut": [0, 93]}  # a sample of its own
    write(tmp_path / "f", "1.mp4", "2.mp4", {"path": "3.mp4", "cap": ["one", "two"]}, cut, files=["3.mp4", "4.mp4"])
    samples, notes = read(tmp_path)
    assert [sample.id for sample in samples] == ["f/1.mp4", "f/2.mp4", "f/3.mp4", "f/4.mp4", "f/4.mp4[0:93]"]
    assert [sample.captions for sample in samples][1:3] == [("a cat",), ("one", "two")]
    assert [re.sub(".*?: ", "", note, count=1) for note in notes] == [
        "2 entries name files that another annotation.json lists too, e.g. f/1.mp4, with the same captions: each "
        "counts once",
        "1 entry names a file that another annotation.json lists too, e.g. f/3.mp4, with other captions: each counts "
        "once and has the captions of both, of which one is drawn",
    ]
    with pytest.warns(UserWarning, match="entr") as told:
        read_manifest(tmp_path)
    assert [str(one.message) for one in told] == notes


def test_links_to_a_folder_do_not_make_its_samples_twice(tmp_path):
    write(tmp_path / "set", "a.mp4", files=["a.mp4"])
    write(tmp_path / "set/folder_01", "b.mp4", files=["b.mp4"])
    write(tmp_path / "elsewhere", "c.mp4", files=["c.mp4"])
    for link, target in (("00", "folder_01"), ("99", "folder_01"), ("loop", "."), ("c", "../elsewhere")):
        (tmp_path / "set" / link).symlink_to(target)
    assert [sample.id for sample in read(tmp_path / "set")[0]] == ["a.mp4", "c/c.mp4", "folder_01/b.mp4"]


def test_a_list_that_is_a_link_to_nothing_is_not_passed_over(tmp_path):
    write(tmp_path, "a.mp4", files=["a.mp4"])
    (tmp_path / "folder_01").mkdir()
    (tmp_path / "folder_01/annotation.json").symlink_to("moved.json")
    with pytest.raises(ValueError, match=r"folder_01/annotation\.json is a link to moved\.json, which is not there"):
        read(tmp_path)


def test_what_one_list_says_twice_is_two_samples(tmp_path):
    """As in every list: a sample that is listed twice is trained on twice."""
    write(tmp_path, "f/1.mp4", "f/1.mp4")
    write(tmp_path / "f", "1.mp4", files=["1.mp4"])
    samples, notes = read(tmp_path)
    assert [sample.id for sample in samples] == ["f/1.mp4", "f/1.mp4#2"]
    assert len(notes) == 1


@settings(max_examples=60, deadline=None)
@given(
    top=st.lists(st.tuples(st.integers(0, 3), st.sampled_from("xyz")), max_size=4),
    below=st.lists(st.tuples(st.integers(0, 3), st.sampled_from("xyz")), min_size=1, max_size=4),
    relative_to_top=st.booleans(),
)
def test_no_entry_of_two_lists_is_lost_or_counted_twice(tmp_path_factory, top, below, relative_to_top):
    folder = tmp_path_factory.mktemp("set")
    write(folder / "f", files=[f"{n}.mp4" for n in range(4)])
    write(folder, *({"path": f"f/{n}.mp4", "cap": cap} for n, cap in top))
    prefix = "f/" if relative_to_top else ""
    write(folder / "f", *({"path": f"{prefix}{n}.mp4", "cap": cap} for n, cap in below))
    samples, notes = read(folder)
    said = sum(int(re.search(r": (\d+) entr", note)[1]) for note in notes)
    assert len(samples) + said == len(top) + len(below)
    assert {(s.path.name, cap) for s in samples for cap in s.captions} == {(f"{n}.mp4", c) for n, c in top + below}
    assert len({sample.id for sample in samples}) == len(samples)
    twice = {n for n, _ in top} & {n for n, _ in below}
    assert said == sum(n in twice for n, _ in below)


def test_pieces_of_files_as_version_1_1_says_them(tmp_path):
    """`frame_idx` is first:end, as `cut` is; the facts that such a list leaves out are those of the file."""
    whole = {"path": "a.mp4", "cap": "one"}
    write(tmp_path, whole | {"frame_idx": "0:65"}, whole | {"frame_idx": "65:130", "cut": [65, 130]}, files=["a.mp4"])
    samples, _ = read(tmp_path)
    assert [(s.id, s.cut, s.fps, s.height) for s in samples] == [
        ("a.mp4[0:65]", (0, 65), None, None),
        ("a.mp4[65:130]", (65, 130), None, None),
    ]
    dropped = select(samples, Geometry(num_frames=93, min_frames=93)).dropped
    assert [str(reason)[:9] for _, reason in dropped] == ["too_short"] * 2


@settings(max_examples=100, deadline=None)
@given(first=st.integers(0, 2**64), end=st.integers(0, 2**64), cut=st.sampled_from([None, "same", "other"]))
def test_frame_idx_is_a_cut_or_refused(tmp_path_factory, first, end, cut):
    folder = tmp_path_factory.mktemp("list")
    written = {"same": {"cut": [first, end]}, "other": {"cut": [first, end + 1]}}.get(cut, {})
    write(folder, {"path": "a.mp4", "frame_idx": f"{first}:{end}", **written})
    right = first < end <= 2**63
    if right and cut != "other":
        (sample,) = read_manifest(folder)
        assert sample.cut == (first, end)
        return
    with pytest.raises(ValueError, match=r"sample 0: (frame_idx is|cut is)"):
        read_manifest(folder)


@pytest.mark.parametrize("value", ["5", "5:", ":5", "5:5", "6:5", "-1:5", "0:5:9", "a:b", "0.0:5", "", "9" * 30 + ":1"])
def test_other_frame_idx_are_refused_by_position(tmp_path, value):
    write(tmp_path, {"path": "a.mp4", "frame_idx": value})
    with pytest.raises(ValueError, match=r"annotation\.json, sample 0: frame_idx is .*; it must be first:end in fr"):
        read_manifest(tmp_path)
    write(tmp_path, {"path": "a.mp4", "frame_idx": [0, 5]})
    with pytest.raises(ValueError, match=r"sample 0: frame_idx is .*; it must be text"):
        read_manifest(tmp_path)


def test_a_folder_without_lists_says_where_they_are_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without annotation\.json, and so are those in it: write a data"):
        find_annotations(tmp_path)
    write(tmp_path / "a/b", "x.mp4")
    with pytest.raises(ValueError, match="without annotation"):
        find_annotations(tmp_path)
    (tmp_path / "a/annotation.json").mkdir()
    with pytest.raises(ValueError, match=r"a/annotation\.json is a folder, not a file"):
        read_manifest(tmp_path)
    (tmp_path / "a/annotation.json").rmdir()
    (tmp_path / "a/annotation.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a/annotation\.json lists no samples"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("folder_01/5711_people_walking_by.mp4", "5711_res1080p.mp4?"),  # as in the released lists: alike up to a _
        ("folder_01/5712_x.mp4", "5712_y.mp4?"),  # not 5713_x.mp4
        ("folder_01/Sunset.MP4", "sunset.mp4?"),
        ("folder_01/my sunset.mp4", "sunset.mp4?"),
        ("folder_01/sunset.webm", "sunset.mp4?"),
        ("folder_1/sunset.mp4", "folder_01 in {top}?"),
        ("folder_1/deeper/sunset.mp4", "folder_01 in {top}?"),
        ("folder_01/quite else", None),
        ("folder_01/loop", None),
        ("empty/sunset.mp4", None),
    ],
)
def test_a_missing_file_is_named_with_what_it_may_have_been(tmp_path, asked, meant):
    write(tmp_path / "folder_01", files=["5711_res1080p.mp4", "5712_y.mp4", "5713_x.mp4", "sunset.mp4"])
    (tmp_path / "folder_01/loop").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    write(tmp_path, asked)
    ((_, reason),) = select(read_manifest(tmp_path), Geometry()).dropped
    hint = "" if meant is None else f", did you mean {meant.format(top=tmp_path)}"
    assert str(reason) == f"missing_file: {tmp_path / asked} is not there{hint}"


def test_a_path_of_neither_place_is_told_from_the_one_that_has_its_folder(tmp_path):
    write(tmp_path / "f", "f/5711_a.mp4", files=["5711_b.mp4"])
    ((_, reason),) = select(read_manifest(tmp_path), Geometry()).dropped
    assert reason.detail == f"{tmp_path}/f/5711_a.mp4 is not there, did you mean 5711_b.mp4?"


def test_many_missing_files_of_one_folder_take_no_square_of_their_number(tmp_path):
    for n in range(5000):
        (tmp_path / f"{n}_tar.mp4").touch()
    neighbours, start = Neighbours(), time.process_time()
    for n in range(5000):
        assert neighbours.describe(tmp_path / f"{n}_list.mp4") == f", did you mean {n}_tar.mp4?"
    assert time.process_time() - start < 5  # 0.2 s; every name with every name takes minutes
