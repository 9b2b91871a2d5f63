"""Conversations in the formats that people have: the same content is the same conversation; what is broken is named."""

from __future__ import annotations

import base64
import json
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from mm_data.conversations import (
    REASONS,
    Box,
    Conversation,
    Ledger,
    Media,
    Source,
    Turn,
    Unusable,
    find_missing,
    read_conversations,
)
from mm_data.images import read_image, read_size


def picture(path: Path, size=(6, 4), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, **options)
    return path


def write(path: Path, records: list, **options) -> Path:
    path.write_text(json.dumps(records, **options), encoding="utf-8")
    return path


def read(path: Path, media: Path | None = None, **options):
    return read_conversations([Source(path)], media, **options)


def read_one(tmp_path: Path, record, **options) -> tuple[Turn, ...]:
    return read(write(tmp_path / "one.json", [record]), **options)[0].turns


# --- one content, four formats. A turn is (role, parts); a part is a text, or (kind, name)

IMAGE, OTHER, VIDEO = ("image", "a.png"), ("image", "deep/b.png"), ("video", "c.mp4")
SAMPLES = [
    [("user", [IMAGE, "\nWhat is it?"]), ("assistant", ["A cat."])],
    [("user", ["What is 1 + 1?"]), ("assistant", [" 2\n"])],
    [("system", ["Be brief."]), ("user", [IMAGE, OTHER, "Which is larger?"]), ("assistant", ["The first."])],
    [("user", ["See ", VIDEO, " and ", IMAGE, "."]), ("assistant", ["Yes."])],
    [("user", [IMAGE]), ("assistant", ["Red."]), ("user", ["And ", OTHER, "?"]), ("assistant", ["Red, too."])],
    [("user", ["Hi"]), ("assistant", ["Hello"]), ("system", ["Be rude."]), ("user", ["Hi"]), ("assistant", ["Tss."])],
    [("user", ['Say "assistant" <|im_end|> \u4f60\u597d \\n {[']), ("assistant", ["\U0001f600}]"])],
    [("system", ["You see."]), ("user", [VIDEO, VIDEO, "Same?"]), ("assistant", ["Same."])],
]


def marked(parts) -> str:
    return "".join(part if isinstance(part, str) else f"<{part[0]}>" for part in parts)


def listed(sample, kind: str) -> list[str]:
    return [part[1] for _, parts in sample for part in parts if part[0] == kind and not isinstance(part, str)]


def as_messages(sample, folder: Path) -> dict:
    """As in MindSpeed-MM's guide."""
    messages = [{"role": role, "content": marked(parts)} for role, parts in sample]
    return {"messages": messages, "images": listed(sample, "image"), "videos": listed(sample, "video")}


def as_llava(sample, folder: Path) -> dict:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    record = {"id": 7, "conversations": [{"from": names[r], "value": marked(parts)} for r, parts in sample]}
    for kind in ("image", "video"):
        found = listed(sample, kind)
        if found:
            record[kind] = found if len(found) > 1 else found[0]
    return record


def as_sharegpt(sample, folder: Path) -> dict:
    record = as_llava(sample, folder)
    record["images"], record["videos"] = record.pop("image", []), record.pop("video", None)
    first = record["conversations"][0]
    record["system"] = record["conversations"].pop(0)["value"] if first["from"] == "system" else ""
    return record


def as_openai(sample, folder: Path) -> dict:
    def part(one, number: int) -> dict:
        if isinstance(one, str):
            return {"type": "text", "text": one}
        kind, name = one
        url = {"url": (folder / name).as_uri(), "detail": "auto"}
        ways = [{"type": kind, kind: name}, {"type": f"{kind}_url", f"{kind}_url": url}, {"type": kind, "path": name}]
        return ways[number % 3]

    messages = []
    for role, parts in sample:
        plain = len(parts) == 1 and isinstance(parts[0], str)
        content = [part(one, number) for number, one in enumerate(parts)]
        messages.append({"role": role, "content": parts[0] if plain else content})
    return {"messages": messages}


FORMATS = [as_messages, as_llava, as_sharegpt, as_openai]


@pytest.mark.parametrize("style", ["json", "indented", "jsonl"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_the_same_content_is_the_same_conversation(form, style, tmp_path):
    folder = tmp_path / "media"
    records = [form(sample, folder) for sample in SAMPLES]
    path = tmp_path / f"d.{'jsonl' if style == 'jsonl' else 'json'}"
    if style == "jsonl":
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n\n".join(lines) + "\r\n", encoding="utf-8")
    else:
        write(path, records, indent=2 if style == "indented" else None)
    found = read(path, folder)
    assert len(found) == len(SAMPLES)
    for number, sample in enumerate(SAMPLES):
        turns = tuple(
            Turn(role, tuple(one if isinstance(one, str) else Media(one[0], str(folder / one[1])) for one in parts))
            for role, parts in sample
        )
        assert found[number] == Conversation(f"{path.name}[{number}]", turns)
        assert found.num_bytes(number) >= sum(len(p.encode()) for _, ps in sample for p in ps if isinstance(p, str))
    assert list(found.ids) == [f"{path.name}[{number}]" for number in range(len(SAMPLES))]


def test_marks_in_lists_of_parts_are_text(tmp_path):
    parts = [{"type": "text", "text": "<image> is"}, {"type": "text", "text": " a mark, <bbox> too"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]}
    assert read_one(tmp_path, record)[0].parts == ("<image> is a mark, <bbox> too",)


def test_parts_without_a_path_take_those_of_the_item(tmp_path):
    parts = [{"type": "image", "max_pixels": 784}, {"type": "text", "text": "?"}, {"type": "image"}]
    record = {"images": ["/x.png", {"bytes": None, "path": "/y.png"}]}
    record["messages"] = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]
    turns = read_one(tmp_path, record)
    assert turns[0].parts == (Media("image", "/x.png", 784), "?", Media("image", "/y.png"))


def test_a_picture_in_a_data_url(tmp_path):
    data = base64.b64encode(picture(tmp_path / "a.png", (7, 5)).read_bytes()).decode()
    url = f"data:image/png;base64,{data}"
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]}
    found = read(write(tmp_path / "one.json", [record]))
    survey = find_missing(found, Ledger())
    assert survey.sizes == {url: (5, 7)}
    assert (read_image(url) == read_image(tmp_path / "a.png")).all()
    for broken in ("data:image/png;base64,AAAA", "data:image/png;base64,", "data:;base64,\u00e9"):
        with pytest.raises(ValueError, match="data:"):
            read_size(broken)


# --- what is broken is named

TURNS = [{"role": "user", "content": "<image>Hi"}, {"role": "assistant", "content": "Ho"}]


def said(*roles_and_contents) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in roles_and_contents]}


BROKEN = {
    "no turns": ({"prompt": "a", "answer": "b"}, "unknown_format", "prompt, answer"),
    "both": ({"messages": TURNS, "conversations": TURNS, "image": "a"}, "unknown_format", "both messages and conv"),
    "empty list": ({"messages": []}, "unknown_format", "messages is []"),
    "turn": ({"messages": ["Hi"]}, "unknown_format", "turn 0 is 'Hi'"),
    "no role": ({"messages": [{"human": "Hi"}]}, "unknown_format", "no role"),
    "other role": (said(("user", "a"), ("narrator", "b")), "roles", "'narrator'"),
    "two questions": (said(("user", "a"), ("user", "b")), "roles", "turn 1 is of user after user"),
    "answer first": (said(("assistant", "a"), ("user", "b")), "roles", "turn 0 is of assistant"),
    "no answer": (said(("user", "a")), "roles", "the last turn is of user"),
    "late system": (said(("user", "a"), ("system", "b"), ("assistant", "c")), "roles", "turn 1 is of system"),
    "last system": (said(("user", "a"), ("assistant", "b"), ("system", "c")), "roles", "the last turn is of system"),
    "two systems": (said(("user", "a"), ("assistant", "b")) | {"system": "x"}, None, ""),
    "system twice": (said(("system", "s"), ("user", "a"), ("assistant", "b")) | {"system": "x"}, "roles", "turn 1"),
    "tool": (said(("user", "a"), ("tool", "b")), "tools", "turn 1 (tool)"),
    "call": ({"messages": [*TURNS[:1], {"role": "assistant", "content": None, "tool_calls": [1]}]}, "tools", "turn 1"),
    "tools": (said(("user", "a"), ("assistant", "b")) | {"tools": "[{}]"}, "tools", "it has tools"),
    "preference": (said(("user", "a"), ("assistant", "b")) | {"rejected": "c"}, "unknown_format", "rejected"),
    "loss": ({"messages": [TURNS[0] | {"loss": False}, TURNS[1]], "image": "a"}, "unknown_format", "has loss False"),
    "empty answer": (said(("user", "a"), ("assistant", "")), "empty_turn", "turn 1 (assistant)"),
    "no content": (said(("user", None), ("assistant", "b")), "empty_turn", "turn 0"),
    "number": (said(("user", 5), ("assistant", "b")), "unknown_format", "the content of turn 0 is 5"),
    "half a character": (said(("user", "\ud83d"), ("assistant", "b")), "broken_json", "surrogate"),
    "more marks": ({"messages": TURNS}, "marks", "<image> is there 1 times, for 0 images"),
    "fewer marks": ({"messages": TURNS, "images": ["a", "b"]}, "marks", "<image> is there 1 times, for 2 images"),
    "other kind": ({"messages": TURNS, "video": "a"}, "marks", "for 0 images"),
    "answer with picture": (said(("user", "a"), ("assistant", "<image>")) | {"image": "a"}, "marks", "turn 1"),
    "no objects": (said(("user", "a"), ("assistant", "<bbox>")), "marks", "<bbox> is there 1 times, for 0 in objects"),
    "image and images": ({"messages": TURNS, "image": "a", "images": ["a"]}, "unknown_format", "both image and images"),
    "frames": (said(("user", "<video>"), ("assistant", "b")) | {"videos": [["1.png"]]}, "unknown_format", "frames"),
    "http": ({"messages": TURNS, "image": "https://a.b/c.png"}, "remote_media", "https://a.b/c.png"),
    "oss": ({"messages": TURNS, "image": "oss://a/c.png"}, "remote_media", "oss://a/c.png"),
    "host": ({"messages": TURNS, "image": "file://host/c.png"}, "remote_media", "host"),
    "data video": (said(("user", "<video>"), ("assistant", "b")) | {"video": "data:a"}, "unknown_format", "data:"),
    "part": (said(("user", [{"type": "input_audio"}]), ("assistant", "b")), "unknown_format", "input_audio"),
    "part key": (
        said(("user", [{"type": "image", "image": "a", "resized_height": 28}]), ("assistant", "b")),
        "unknown_format",
        "resized_height",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name, tmp_path):
    record, reason, text = BROKEN[name]
    if reason is None:
        read_one(tmp_path, record)
        return
    with pytest.raises(Unusable) as refused:
        read_one(tmp_path, record)
    assert refused.value.reason == reason
    assert text in refused.value.text
    again = pickle.loads(pickle.dumps(refused.value))
    assert (again.reason, again.text) == (reason, refused.value.text)


def test_its_own_id_is_said(tmp_path):
    with pytest.raises(Unusable, match="its own id is 000000033471"):
        read_one(tmp_path, {"id": "000000033471", "messages": TURNS})


def test_questions_without_answers(tmp_path):
    assert read_one(tmp_path, said(("user", "a")), answered=False)[-1].role == "user"
    assert read_one(tmp_path, said(("user", "a"), ("assistant", "b")), answered=False)[-1].role == "assistant"


def test_broken_json_is_named_with_its_line(tmp_path):
    good, path = json.dumps(said(("user", "a"), ("assistant", "b"))), tmp_path / "d.jsonl"
    broken = '{"messages": [}'
    twice = '{"messages": 1, "messages": 2}'
    path.write_bytes("\n".join([good, "", broken, good, twice, "x"]).encode() + b"\n\xff\n" + good.encode())
    found = read(path)
    assert len(found) == 7
    ledger = Ledger()
    assert find_missing(found, ledger).usable.tolist() == [0, 2, 6]
    assert ledger.counts == {"broken_json": 4}
    places = [len(good) + 2 + len('{"messages": ['), 2 * len(good) + len(broken) + 4]
    places += [places[1] + len(twice) + 1, places[1] + len(twice) + 3]
    why = ["not JSON: Expecting value", "an object has the key 'messages' twice: keep the one that is meant"]
    why += ["not JSON: Expecting value", "not UTF-8 text: invalid start byte"]
    assert [entry.text for entry in ledger.entries] == [
        f"line {line} (byte {place}): {what}" for line, place, what in zip((3, 5, 6, 7), places, why, strict=True)
    ]
    # in an array: an item is named where the others can be told from it
    path = tmp_path / "d.json"
    path.write_text(f"[{good},\n{broken}}},\n{good}]", encoding="utf-8")
    found = read(path)
    assert found[0].turns == found[2].turns
    with pytest.raises(Unusable, match=r"line 2 \(byte \d+\): not JSON: Expecting value"):
        found[1]


# --- boxes


def test_objects(tmp_path):
    record = said(
        ("user", "Find the <ref-object> in <image>, not in <image>"), ("assistant", "<ref-object>: <bbox>, <bbox>")
    )
    record |= {"images": ["/a.png", "/b.png"]}
    record["objects"] = {"ref": ["cat", "a cat"], "bbox": [[1, 2.5, 30, 4e1], [5, 6]], "image_id": [1, 0]}
    turns = read_one(tmp_path, record)
    assert turns[0].parts == ("Find the cat in ", Media("image", "/a.png"), ", not in ", Media("image", "/b.png"))
    assert turns[1].parts == ("a cat: ", Box((1.0, 2.5, 30.0, 40.0), 1), ", ", Box((5.0, 6.0), 0))
    # of videos and pictures, `image_id` counts the pictures, a box counts both
    record = said(("user", "<video><image>Where is <bbox>?"), ("assistant", "There.")) | {"video": "/v", "image": "/a"}
    record["objects"] = {"ref": [], "bbox": [[0, 0, 1, 0.5]], "bbox_type": "norm1"}
    assert read_one(tmp_path, record)[0].parts[3] == Box((0.0, 0.0, 1.0, 0.5), 1, normalized=True)


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ([], "boxes"),
        ({"bbox": [[1, 2, 3]]}, "boxes"),
        ({"bbox": [[1, 2, "3", 4]]}, "boxes"),
        ({"bbox": [[True, 2]]}, "boxes"),
        ({"bbox": [[3, 2, 1, 4]]}, "boxes"),
        ({"bbox": [[1, 4, 3, 2]]}, "boxes"),
        ({"bbox": [[-1, 2, 3, 4]]}, "boxes"),
        ({"bbox": [[1, 2, 3, 4]], "bbox_type": "norm1"}, "boxes"),
        ({"bbox": [[1, 2]], "bbox_type": "norm1000"}, "boxes"),
        ({"bbox": [[1, 2]], "image_id": [1]}, "boxes"),
        ({"bbox": [[1, 2]], "image_id": [-1]}, "boxes"),
        ({"bbox": [[1, 2]], "image_id": [0, 0]}, "boxes"),
        ({"bbox": [[1, 2]], "ref": [5]}, "boxes"),
        ({"bbox": [[1, 2]], "boxes": []}, "boxes"),
        ({"bbox": [[1, 2], [3, 4]]}, "marks"),
        ({"bbox": [[1, 2]], "ref": ["cat"]}, "marks"),
        ({}, "marks"),
    ],
)
def test_objects_that_are_wrong(objects, reason, tmp_path):
    record = said(("user", "<image>?"), ("assistant", "<bbox>")) | {"image": "/a.png", "objects": objects}
    with pytest.raises(Unusable) as refused:
        read_one(tmp_path, record)
    assert refused.value.reason == reason


def test_boxes_in_the_json_of_answers(tmp_path):
    answer = '```json\n[{"bbox_2d": [10, 20.5, 30, 40], "label": "cat"}, {"point_2d" :[ 1,2 ]}]\n```'
    record = said(
        ("user", "<video>?"), ("assistant", "No."), ("user", '"bbox_2d": [1, 2] in <image>?'), ("assistant", answer)
    )
    record |= {"image": "/a.png", "video": "/v.mp4"}
    turns = read_one(tmp_path, record, boxes="original")
    assert turns[2].parts[0] == '"bbox_2d": [1, 2] in '
    assert turns[3].parts == (
        '```json\n[{"bbox_2d": ',
        Box((10.0, 20.5, 30.0, 40.0), 1),
        ', "label": "cat"}, {"point_2d" :',
        Box((1.0, 2.0), 1),
        "}]\n```",
    )
    assert read_one(tmp_path, record)[3].parts == (answer,)
    for answer in (
        '"bbox_2d": [1, 2, 3]',
        '"bbox_2d": [1, "a"]',
        '"bbox_2d": [[1, 2, 3, 4]]',
        '"bbox_2d": [9, 9, 1, 1]',
    ):
        record = said(("user", "<image>"), ("assistant", answer)) | {"image": "/a.png"}
        with pytest.raises(Unusable, match="boxes: "):
            read_one(tmp_path, record, boxes="original")
    with pytest.raises(Unusable, match="no image is before it"):
        read_one(tmp_path, said(("user", "a"), ("assistant", '"bbox_2d": [1, 2]')), boxes="original")


# --- several files


def test_several_sources(tmp_path):
    one, two = ({"messages": said(("user", name), ("assistant", "b"))["messages"]} for name in "ab")
    for folder, records in (("x", [one] * 3), ("y", [two] * 2)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "data.json", records)
    write(tmp_path / "more.json", [one])
    sources = [
        Source(tmp_path / "x/data.json", 2.0),
        Source(tmp_path / "y/data.json", 0.5),
        Source(tmp_path / "more.json"),
    ]
    found = read_conversations(sources)
    assert found.ids[:] == [
        *(f"x/data.json[{n}]" for n in range(3)),
        *(f"y/data.json[{n}]" for n in range(2)),
        "more.json[0]",
    ]
    assert found.spans == (range(3), range(3, 5), range(5, 6))
    assert [found[i].turns[0].parts[0] for i in range(6)] == list("aaabba")
    assert [found[i].id for i in range(6)] == list(found.ids)
    assert [found.find_id(id) for id in found.ids] == list(range(6))
    for wrong in ("x/data.json[3]", "data.json[0]", "x/data.json[-1]", "more.json[00]"):
        with pytest.raises(ValueError, match="no conversation is"):
            found.find_id(wrong)
    assert len(read_conversations([Source(tmp_path / "x/data.json", max_items=2)])) == 2
    with pytest.raises(ValueError, match="given twice"):
        read_conversations([Source(tmp_path / "more.json"), Source(tmp_path / "x/../more.json")])
    with pytest.raises(IndexError):
        found[6]


def test_the_identity_is_that_of_what_is_read(tmp_path):
    records = [said(("user", name), ("assistant", "b")) for name in "abc"]
    one, same = write(tmp_path / "a.json", records), write(tmp_path / "b.json", records)
    other = write(tmp_path / "c.json", records[::-1])
    known = read(one).identity
    assert read(same, tmp_path).identity == known
    assert known not in {
        read(other).identity,
        read(one, boxes="original").identity,
        read(one, answered=False).identity,
        read_conversations([Source(one, max_items=2)]).identity,
        read_conversations([Source(one), Source(same)]).identity,
    }


def test_threads_and_other_processes_read_the_same(tmp_path):
    path = write(tmp_path / "d.json", [said(("user", f"{n} " * n), ("assistant", "b")) for n in range(1, 200)])
    found = read(path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(found.__getitem__, range(199))) == [found[i] for i in range(199)]
    again = pickle.loads(pickle.dumps(found))
    assert again[150] == found[150]
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="was changed while it was in use"):
        found[3]


def test_where_media_are_looked_for(tmp_path, monkeypatch):
    """In the folder that was given, beside the list, and where the program runs; absolute paths are as they are."""
    (tmp_path / "data").mkdir()
    (tmp_path / "media").mkdir()
    monkeypatch.chdir(tmp_path)
    given, beside, here = picture(Path("media/a.png")), picture(Path("data/b.png")), picture(Path("c.png"))
    picture(Path("data/a.png"))
    names = ["a.png", "b.png", "c.png", str(tmp_path / "x.png"), "nowhere.png", "./data/b.png"]
    path = write(Path("data/d.json"), [{"messages": TURNS, "image": name} for name in names])
    found = [conversation.media[0].path for conversation in read(path, Path("media"))]
    assert found[:3] == [str(given), str(beside), str(here)]
    assert found[3:] == [str(tmp_path / "x.png"), "media/nowhere.png", "./data/b.png"]
    late = read(path, Path("media"))
    assert late[4].media[0].path == "media/nowhere.png"
    picture(Path("media/nowhere.png"))
    assert late[4].media[0].path == "media/nowhere.png"


# --- the survey


def test_find_missing(tmp_path):
    media = tmp_path / "media"
    picture(media / "good.jpg", (9, 5))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(media / "turned.jpg", (9, 5), exif=exif)
    (media / "half.png").write_bytes(picture(media / "whole.png").read_bytes()[:20])
    (media / "text.png").write_text("no picture", encoding="utf-8")
    (media / "v.mp4").write_bytes(b"whatever")
    names = ["good.jpg", "turned.jpg", "half.png", "text.png", "god.jpg", "good.jpg", "gone/g\0d\ud83d.jpg"]
    records = [{"messages": TURNS, "image": name} for name in names]
    records += [said(("user", "<video>"), ("assistant", "b")) | {"video": name} for name in ("v.mp4", "w.mp4")]
    records += [{"messages": TURNS}, said(("user", "a"), ("assistant", "b"))]
    found, ledger, progress = read(write(tmp_path / "d.json", records), media), Ledger(), []
    survey = find_missing(found, ledger, say=lambda done, all: progress.append((done, all)))
    assert survey.usable.dtype == np.int64
    assert survey.kinds == {"images": 3, "videos": 1, "only text": 1}
    assert survey.usable.tolist() == [0, 1, 5, 7, 10]
    assert survey.sizes == {
        str(media / "good.jpg"): (5, 9),
        str(media / "turned.jpg"): (9, 5),
    }
    assert {path: read_image(path).shape[:2] for path in survey.sizes} == survey.sizes
    assert ledger.counts == {"missing_media": 3, "unreadable_media": 2, "marks": 1}
    texts = {entry.id: entry.text for entry in ledger.entries}
    assert texts["d.json[4]"].endswith("god.jpg is not there, did you mean good.jpg?")
    assert "half.png" in texts["d.json[2]"]
    assert "text.png" in texts["d.json[3]"]
    assert "v.mp4" in texts["d.json[8]"]
    assert progress == [(11, 11)]
    assert "missing_media: 3, e.g. d.json[4]" in str(ledger)
    # a picture that is none says nothing of a video
    records = [records[7], {"messages": TURNS, "image": "v.mp4"}]
    mixed = find_missing(read(write(tmp_path / "m.json", records), media), Ledger())
    assert mixed.usable.tolist() == [0]
    # nothing but names
    light = find_missing(found, Ledger(), headers=False)
    assert (light.usable.tolist(), light.sizes) == ([0, 1, 2, 3, 5, 7, 10], {})
    part = find_missing(found, ledger := Ledger(), indices=range(4, 6))
    assert (part.usable.tolist(), len(ledger)) == ([5], 1)


def test_the_ledger(tmp_path):
    ledger = Ledger()
    assert ledger.add("b[1]", Unusable("roles", "two\nlines"))
    assert ledger.add("a[0]", Unusable("marks", "x" * 5000))
    assert not ledger.add("b[1]", Unusable("marks", "again"))
    assert ledger.add("c[2]", Unusable("roles", "you"))
    assert len(ledger) == 3
    assert "b[1]" in ledger
    assert "d[0]" not in ledger
    assert ledger.counts == Counter(roles=2, marks=1)
    ledger.write(tmp_path / "failures.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["a[0]", "b[1]", "c[2]"]
    assert lines[1] == {"id": "b[1]", "reason": "roles", "text": "two\\nlines"}
    assert len(lines[0]["text"]) < 2100
    assert {line["reason"] for line in lines} <= set(REASONS)


def test_without_torch():
    import subprocess
    import sys

    code = "import sys, mm_data.conversations, mm_data.show\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
