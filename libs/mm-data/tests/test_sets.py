"""A file of sets: how often each is shown, in which sizes; in lists, in features, and in what a loader gives."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_data import (
    ClipDataset,
    FeatureCache,
    FeatureDataset,
    Geometry,
    Order,
    VideoDataset,
    build_loader,
    read_manifest,
    select,
    write_video,
)
from mm_data.layout import geometry_of
from mm_data.sets import Portion, SampleSet, mix, portions_of, read_sets, weights_of

GEOMETRY = Geometry(num_frames=5, max_height=32, max_width=48)
SETS = """
[[set]]
path = "clips/portraits"
repeats = 3
sizes = [[32, 48], [48, 32]]
frames = 1
caption_prefix = "sks, "

[[set]]
path = "clips/data.json"
caption = "anything"

[[set]]
path = "stills/"
weight = 0.2
"""


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """Two portraits, a list of three clips of which one is no video, four pictures."""
    top = tmp_path_factory.mktemp("sets")
    noise = np.random.default_rng(0)
    for folder in ("clips/portraits", "stills"):
        (top / folder).mkdir(parents=True)
    for name in ("portraits/a", "portraits/b", "one", "two"):
        colours = noise.integers(0, 255, (9, 1, 1, 3), dtype=np.uint8)
        write_video(top / f"clips/{name}.mp4", colours.repeat(40, axis=1).repeat(40, axis=2), fps=8)
        (top / f"clips/{name}.txt").write_text(name)
    for number in range(4):
        pixels = noise.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(top / f"stills/{number}.png")
        (top / f"stills/{number}.txt").write_text(str(number))
    (top / "clips/bad.mp4").write_bytes(b"no video")
    listed = [{"path": "one.mp4"}, {"path": "bad.mp4"}, {"path": "two.mp4", "cap": "two"}]
    (top / "clips/data.json").write_text(json.dumps(listed))
    (top / "sets.toml").write_text(SETS)
    return top


IDS = [
    *(f"clips/portraits/{name}.mp4@{size}" for name in "ab" for size in ("32x48", "48x32")),
    *(f"clips/{name}.mp4" for name in ("one", "two")),
    *(f"stills/{number}.png" for number in range(4)),
]


def clips(top, sets="sets.toml") -> ClipDataset:
    chosen = select(read_manifest(top / sets), GEOMETRY)
    return ClipDataset(chosen.kept, GEOMETRY, latent_shape=lambda f, h, w: (3, f, h // 8, w // 8), path=top / sets)


def test_samples_are_those_of_all_sets_in_their_sizes(top):
    samples = read_manifest(top / "sets.toml")
    assert [sample.id for sample in samples if sample.id != "clips/bad.mp4"] == IDS
    assert [sample.captions for sample in samples[::2][:4]] == [
        ("sks, portraits/a",),
        ("sks, portraits/b",),
        ("anything",),
        ("two",),
    ]
    data = clips(top)
    assert data.ids == IDS
    shapes = [(1, 32, 48, 0), (1, 48, 32, 0)] * 2 + [(5, 32, 48, 0)] * 2 + [(1, 32, 48, 0)] * 4
    assert data.clip_shapes == shapes
    assert [tuple(data[i]["video"].shape[1:]) for i in range(10)] == [shape[:3] for shape in shapes]
    # 4 samples 3 times, 2 once: 14 of 17.5 places, so that 3.5 of the pictures are a fifth
    assert data.portions == [
        Portion("clips/portraits", 4, Fraction(3)),
        Portion("clips/data.json", 2, Fraction(1)),
        Portion("stills/", 4, Fraction(7, 8)),
    ]


def test_the_loader_shows_them_so_often_on_any_ranks_from_any_step(top):
    data = clips(top)

    def stream(ranks: int, cursor: int, steps: int) -> list[list[tuple[str, int]]]:
        make = partial(build_loader, data, global_batch=2, dp_size=ranks, cursor=cursor, num_workers=0)
        shares = [itertools.islice(make(dp_rank=rank, small_buckets="repeat"), steps) for rank in range(ranks)]
        return [
            [pair for step in parts for batch in step.micro for pair in zip(batch.ids, batch.epochs, strict=True)]
            for parts in zip(*shares, strict=True)
        ]

    order = Order(data.buckets, 2, 0, sets=data.sets)
    steps = order.batches_before(8)  # 8 epochs: 140 places
    alone = [[(data.ids[pick.index], pick.epoch) for pick in order.step(step)] for step in range(steps)]
    assert stream(2, 10, 3) == alone[5:8]
    assert stream(1, 0, 3) == alone[:3]
    counts = Counter(name for step in alone for name, _ in step)
    assert [counts[name] for name in IDS] == [24] * 4 + [8] * 2 + [7] * 4
    assert len({pair for step in alone for pair in step}) == sum(counts.values())


@pytest.fixture(scope="module")
def features(top):
    """The samples, extracted; once more with other repeats, which encodes nothing."""

    def encode(name: str, folder: Path) -> int:
        chosen = select(read_manifest(top / name), GEOMETRY)
        with FeatureCache(folder) as cache:
            todo = cache.find_work(chosen.kept, GEOMETRY, encoder="mean")
            made = 0
            for clip in VideoDataset(todo.to_encode, GEOMETRY, on_error="return"):
                if isinstance(clip, dict):
                    latents = torch.nn.functional.avg_pool3d(clip["video"], (1, 8, 8))
                    texts = {f"text.{n}": torch.full((1, 2), float(n)) for n in range(len(clip["captions"]))}
                    cache.put(todo.keys[clip["id"]], {"latents": latents} | texts, clip["meta"])
                    made += 1
            cache.put_empty_text(torch.zeros(1, 2), encoder="mean")
            cache.finish(todo)
        return made

    assert encode("sets.toml", top / "features") == 10
    (top / "others.toml").write_text(SETS.replace("repeats = 3", "repeats = 2").replace("stills/", "./stills"))
    (top / "again").mkdir()
    (top / "again/shards").symlink_to(top / "features/shards")
    assert encode("others.toml", top / "again") == 0
    return top


def test_features_keep_how_often_they_are_shown(features):
    data = FeatureDataset(features / "features")
    assert data.ids == IDS
    assert data.portions == clips(features).portions
    assert data.sets == [(4, 3), (2, 1), (4, Fraction(7, 8))]
    assert data.buckets == clips(features).buckets
    assert FeatureDataset(features / "again").sets == [(4, 2), (2, 1), (4, Fraction(5, 8))]
    assert len(set(data.contents)) == 8  # two sizes of one file are of one content
    texts = [data[i]["text"] for i in range(10)]
    assert all(len(text) == 1 for text in texts)


def test_sets_of_feature_folders(features):
    """The sets within a folder keep their proportions."""
    (features / "plain.toml").write_text('[[set]]\npath = "features"\nweight = 0.5\n[[set]]\npath = "again"\nrepeats=2')
    data = FeatureDataset(features / "plain.toml")
    assert data.ids == [f"{folder}/{name}" for folder in ("features", "again") for name in IDS]
    inner = FeatureDataset(features / "again").portions
    places = {portion.name: portion.places for portion in data.portions}
    total = sum(places.values())
    assert sum(count for name, count in places.items() if name.startswith("features/")) == total / 2
    assert [places[f"again/{portion.name}"] for portion in inner] == [2 * portion.places for portion in inner]
    assert [len(data), len(data.records), sum(count for count, _ in data.sets)] == [20, 20, 20]
    batch = data.batch([type("Pick", (), {"index": 3, "epoch": 0})()])
    assert batch.ids == ["features/clips/portraits/b.mp4@48x32"]
    data.check_files()
    assert {"features/dataset.jsonl", "again/dataset.jsonl"} <= set(data.files)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[set]]\npath = "features"\nsizes = [[1, 1]]', r"set 1 \('features'\): sizes is for clips, and features are"),
        ('[[set]]\npath = "features"\n[[set]]\npath = "./features"', r"10 samples are in two sets, e\.g\. features/cl"),
        ('[[set]]\npath = "stills"', r"stills has no dataset\.jsonl"),
    ],
)
def test_sets_of_features_that_cannot_be(features, text, message):
    (features / "bad.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        FeatureDataset(features / "bad.toml")


def test_features_of_other_encoders_do_not_mix(features, tmp_path):
    with FeatureCache(tmp_path / "other") as cache:
        cache.put("key", {"latents": torch.zeros(3, 1, 4, 6), "text.0": torch.zeros(1, 2)}, {"id": "x"})
        cache.put_empty_text(torch.zeros(1, 2))
        cache.finish()
    (tmp_path / "bad.toml").write_text(f'[[set]]\npath = "{features}/features"\n[[set]]\npath = "other"')
    with pytest.raises(ValueError, match=r"features and .*other were made by other encoders"):
        FeatureDataset(tmp_path / "bad.toml")
    index = features / "again/dataset.jsonl"
    lines = index.read_text().splitlines()
    for sets in ([{"name": "a"}], [{"name": "a", "samples": 3, "repeats": "1/0", "weight": None}], "all", [[]]):
        index.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"sets": sets}), *lines[1:]]) + "\n")
        with pytest.raises(ValueError, match=r"dataset\.jsonl: its sets are none"):
            FeatureDataset(features / "again")
    index.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"sets\.toml has no sets: write \[\[set\]\]"),
        ("set = 3", "has no sets"),
        ("[set", r"sets\.toml: not TOML: Expected"),
        ('[[sets]]\npath = "a"', "unknown key 'sets', did you mean 'set'"),
        ("[[set]]\nrepeats = 2", "set 1: path is None"),
        ('[[set]]\npath = "b"', r"set 1 \('b'\): .*/b is not there"),
        ('[[set]]\npath = "foldr"', "foldr is not there, did you mean folder"),
        ('[[set]]\npath = "folder"\nrepeat = 2', "unknown key 'repeat', did you mean 'repeats'"),
        ('[[set]]\npath = "folder"\nnum_repeats = 2', "did you mean 'repeats'"),
        ('[[set]]\npath = "folder"\nresolution = [960, 544]', r"did you mean 'sizes' \(height first\)\?"),
        ('[[set]]\npath = "folder"\nrepeats = 0', "repeats is 0; it must be a number of more than 0"),
        ('[[set]]\npath = "folder"\nrepeats = nan', "repeats is nan"),
        ('[[set]]\npath = "folder"\nweight = true', "weight is True"),
        ('[[set]]\npath = "folder"\nweight = 3', "weight is 3; it is a share .* give repeats"),
        ('[[set]]\npath = "folder"\nweight = 0.3\nrepeats = 2', r"both repeats \(2, how .* and weight \(0\.3"),
        ('[[set]]\npath = "folder"\nweight = 0.3', r"all sets have a weight, and 0\.3 is 0\.3, not 1: .*Give 1,"),
        (
            '[[set]]\npath = "folder"\nweight = 0.5\n[[set]]\npath = "folder"\nweight=0.5\n[[set]]\npath="folder"',
            r"the weights 0\.5 \+ 0\.5 are 1, which leaves nothing",
        ),
        ('[[set]]\npath = "folder"\nsizes = [480, 832]', r"sizes is \[480, 832\]; it must be \[\[height, width\]"),
        ('[[set]]\npath = "folder"\nsizes = [[480, 0]]', "a width is 0"),
        ('[[set]]\npath = "folder"\nsizes = [[480, 32], [480, 32]]', "sizes has one of them twice"),
        ('[[set]]\npath = "folder"\nframes = 1.5', "frames is 1.5; it must be a whole number"),
        ('[[set]]\npath = "folder"\ncaption = 1', "caption is 1; it must be text"),
        ('[[set]]\npath = "sets.toml"', "is a file of sets itself"),
    ],
)
def test_sets_that_cannot_be(tmp_path, text, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "sets.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sets(tmp_path / "sets.toml")


def test_sizes_and_frames_that_cannot_be_are_the_sets_fault(top):
    for asked, message in (
        ("sizes = [[40, 48]]", "max_height=40 is not a multiple of stride=16: use 32 or 48"),
        ("frames = 6", "num_frames=6 is not 4k"),
    ):
        (top / "wrong.toml").write_text(f'[[set]]\npath = "stills"\n{asked}')
        with pytest.raises(ValueError, match=f"set stills: {message}"):
            select(read_manifest(top / "wrong.toml"), GEOMETRY)


def test_frames_of_a_set_replace_those_of_all(top):
    geometry = Geometry(num_frames=9, min_frames=9, max_height=32, max_width=48)
    sample = read_manifest(top / "sets.toml")[0]
    assert geometry_of(sample, geometry) == Geometry(num_frames=1, min_frames=1, max_height=32, max_width=48)


def test_a_file_of_two_sets_is_a_sample_of_each_and_that_is_told(top):
    (top / "twice.toml").write_text('[[set]]\npath = "clips"\ncaption=""\n[[set]]\npath = "clips/portraits"\nrepeats=2')
    notes = []
    samples = read_manifest(top / "twice.toml", notes.append)
    assert len({sample.id for sample in samples}) == len(samples) == 7
    assert {"clips/portraits/a.mp4", "clips/portraits/a.mp4#2"} <= {sample.id for sample in samples}
    told = [note for note in notes if "several" in note]
    assert len(told) == 1
    assert "2 files are in several sets, e.g. " in told[0]
    assert "(most in clips and clips/portraits): each set shows them" in told[0]
    (top / "same.toml").write_text('[[set]]\npath = "stills"\n[[set]]\npath = "stills"\nframes=1\nrepeats=2')
    assert [one.name for one in read_sets(top / "same.toml")] == ["stills", "stills (2)"]


def test_clips_that_are_too_short_for_a_task_are_left_out_with_pictures(top):
    needs_five = replace(GEOMETRY, num_frames=9, least_frames=5)
    with pytest.raises(ValueError, match="set clips/portraits: least_frames=5 is more than num_frames=1"):
        select(read_manifest(top / "sets.toml"), needs_five)
    (top / "mixed.toml").write_text('[[set]]\npath = "clips/portraits"\n[[set]]\npath = "stills"')
    chosen = select(read_manifest(top / "mixed.toml"), needs_five)
    assert [reason.kind for _, reason in chosen.dropped] == ["too_short"] * 4
    assert "0.png is a picture, which is one frame, and least_frames=5 are needed" in str(chosen.dropped[0][1])


fractions = st.fractions(Fraction(1, 10), 4, max_denominator=10)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), fractions), max_size=4),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=3),
)
def test_shares_are_exact(repeated, weighted):
    """Sets without a weight are whole, those with one have their share of all, whatever they hold."""
    total = sum(weight for _, weight in weighted) + (1 if repeated else 0)
    sets = [
        (SampleSet(Path(), f"r{n}", repeats=times), [Portion("", count)]) for n, (count, times) in enumerate(repeated)
    ]
    sets += [
        (SampleSet(Path(), f"w{n}", weight=Fraction(weight, total)), [Portion("", count)])
        for n, (count, weight) in enumerate(weighted)
    ]
    mixed = {portion.name: portion for portion in mix(sets)}
    assert set(mixed) == {one.name for one, [portion] in sets if portion.samples}
    epoch = sum(portion.places for portion in mixed.values())
    for n, (count, times) in enumerate(repeated):
        assert not count or mixed[f"r{n}"].times == times
    if all(count for count, _ in [*repeated, *weighted]) and (repeated or weighted):
        for n, (_, weight) in enumerate(weighted):
            assert mixed[f"w{n}"].places == Fraction(weight, total) * epoch
    if not any(count for count, _ in repeated):
        assert epoch == sum(count for count, _ in weighted)
    assert weights_of(mix([(SampleSet(Path(), "a"), [Portion("", 3)])])) == []


def test_samples_without_sets_are_one_portion():
    assert portions_of([None] * 3) == [Portion("", 3)]
    assert portions_of([]) == []
