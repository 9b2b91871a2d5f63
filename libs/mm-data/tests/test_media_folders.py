"""Folders of clips and pictures with a text beside each."""

import pytest

from mm_data import Geometry, read_manifest, select
from mm_data.manifest import list_files


def make(top, *files, **texts):
    """Files with something in them; texts by name."""
    for name in files:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"x")
    for name, text in texts.items():
        (top / f"{name}.txt").write_text(text, encoding="utf-8")
    return top


def read(top, **how):
    notes = []
    return read_manifest(top, notes.append, **how), notes


def test_clips_and_pictures_of_all_folders_with_their_texts(tmp_path):
    top = make(tmp_path / "set", "b.mp4", "A.MOV", "deep/er/c.WebP", "deep/d.mkv", b="  a dog,\nrunning \n\n")
    (top / "A.TXT").write_bytes(b"\xef\xbb\xbfa c\xc3\xa4t\r\n")
    make(top / "deep", d="d", **{"er/c": "c"})
    samples, notes = read(top)
    assert [(sample.id, sample.path, sample.captions) for sample in samples] == [
        ("A.MOV", top / "A.MOV", ("a cät",)),
        ("b.mp4", top / "b.mp4", ("a dog,\nrunning",)),
        ("deep/d.mkv", top / "deep/d.mkv", ("d",)),
        ("deep/er/c.WebP", top / "deep/er/c.WebP", ("c",)),
    ]
    assert not notes
    assert list_files(top) == []
    chosen = select(samples, Geometry())
    assert len(chosen.kept) == 4
    assert "kept as clips of one frame, being pictures: 1" in str(chosen)


def test_the_order_and_the_names_are_those_of_the_folder_from_wherever_it_is_read(tmp_path, monkeypatch):
    top = make(tmp_path / "set", "2.mp4", "10.mp4", "a/1.mp4", **{"2": "2", "10": "10", "a/1": "1"})
    monkeypatch.chdir(tmp_path)
    for path in (top, "set", "./set/", "set/a/.."):
        assert [sample.id for sample in read(path)[0]] == ["10.mp4", "2.mp4", "a/1.mp4"]


def test_files_without_a_text_are_refused_with_their_number_and_the_first(tmp_path):
    top = make(tmp_path, "1.mp4", "2.mp4", "sub/3.png", **{"1": "one", "sub/3": " \n"})
    said = r"2 of 3 clips and pictures have no caption, e\.g\. 2\.mp4: write it into 2\.txt beside it .* --data\.cap"
    with pytest.raises(ValueError, match=said):
        read(top)
    samples, notes = read(top, caption="a photo")
    assert [sample.captions for sample in samples] == [("one",), ("a photo",), ("a photo",)]
    assert notes == [f"{top}: 2 files have no text, e.g. 2.mp4: 'a photo' is taken as the caption"]
    assert [sample.captions for sample in read(top, caption="")[0]] == [("one",), ("",), ("",)]
    assert len(select(read(top, caption="")[0], Geometry()).kept) == 3  # the empty prompt is one


def test_what_is_not_read_is_told(tmp_path):
    top = make(tmp_path, "1.mp4", ".hidden.mp4", ".DS_Store", ".git/2.mp4", "1.npz", "a.NPZ", "notes", **{"1": "one"})
    make(top, orphan="nobody's", **{"1.mp4": "not its name"})
    samples, notes = read(top)
    assert [sample.id for sample in samples] == ["1.mp4"]
    assert notes == [
        f"{top}: not read: 2 files without a clip or picture of the same name, e.g. 1.mp4.txt",
        f"{top}: not read: 1 file hidden by a dot, e.g. .hidden.mp4",
        f"{top}: not read: 3 files of other kinds (.npz: 2, no extension: 1), e.g. 1.npz",
    ]


def test_two_that_would_share_a_caption_are_refused(tmp_path):
    top = make(tmp_path, "1.mp4", "1.jpg", "2.mp4", "2.MP4", "a/1.mp4", **{"1": "one", "2": "two", "a/1": "three"})
    with pytest.raises(
        ValueError, match=r"2 times two clips or pictures share a name, .*1\.jpg and 1\.mp4: rename one"
    ):
        read(top)
    for name in ("1.jpg", "2.MP4"):
        (top / name).unlink()
    make(top, **{"2": "two"})
    (top / "2.TXT").write_text("another")
    with pytest.raises(ValueError, match=r"two captions share a name, e\.g\. 2\.TXT and 2\.txt: keep one"):
        read(top)


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    top = make(tmp_path, "1.mp4")
    (top / "1.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"1\.txt is not UTF-8 text \(.*\): save it as UTF-8"):
        read(top)


def test_links_are_followed_once(tmp_path):
    top = make(tmp_path / "set", "a/1.mp4", **{"a/1": "one"})
    make(tmp_path / "other", "2.mp4", **{"2": "two"})
    (top / "b").symlink_to("a")
    (top / "a/up").symlink_to("..")
    (top / "c").symlink_to(tmp_path / "other")
    assert [sample.id for sample in read(top)[0]] == ["a/1.mp4", "c/2.mp4"]


def test_lists_come_first(tmp_path):
    """A folder with an annotation.json is its list; other lists in it are not read, and that is said."""
    top = make(tmp_path / "set", "sub/1.mp4", "data.json", **{"sub/1": "one"})
    samples, notes = read(top)
    assert [sample.captions for sample in samples] == [("one",)]
    assert notes == [f"{top}: not read: 1 file of other kinds (.json: 1), e.g. data.json"]
    (top / "sub/annotation.json").write_text('[{"path": "1.mp4", "cap": "of the list"}]')
    assert [sample.captions for sample in read(top)[0]] == [("of the list",)]
    (top / "sub/annotation.json").unlink()
    (top / "sub/1.txt").unlink()
    with pytest.raises(ValueError, match=r"1\.mp4; did you mean .*/data\.json\? Else write it into 1\.txt"):
        read(top)
