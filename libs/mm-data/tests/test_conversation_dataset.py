"""Conversations in packs: the same stream on any ranks, whole, and nothing silent where something is broken."""

import json
import re
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from mm_data import ConversationDataset, Order, build_loader
from mm_data.conversations import Ledger, read_conversations

sys.path.insert(0, str(Path(__file__).parent))
from tiny_processing import TinyProcessing, break_pixels, make_set, save_png

COUNT, STEP = 30, 8


@pytest.fixture
def listed(tmp_path):
    return make_set(tmp_path / "set", COUNT)


def build(listed, processing=None, **options) -> ConversationDataset:
    options = {"max_tokens": 700, "max_patches": 1200, "threads": 2} | options
    return ConversationDataset(listed, processing or TinyProcessing(), **options)


def take(dataset, steps, cursor=0, ranks=1, workers=0, global_batch=STEP, seed=3):
    """Of each step, the batches of all ranks: [step][rank][micro]."""
    loaders = [
        build_loader(
            dataset,
            global_batch=global_batch,
            dp_rank=rank,
            dp_size=ranks,
            seed=seed,
            cursor=cursor,
            num_workers=workers,
            small_buckets="repeat",
        )
        for rank in range(ranks)
    ]
    each = [list(islice(loader, steps)) for loader in loaders]
    for of_ranks in zip(*each, strict=True):
        assert len({step.digest for step in of_ranks}) == 1
        assert len({len(step.micro) for step in of_ranks}) == 1
        assert {step.cursor_after for step in of_ranks} == {(of_ranks[0].index + 1) * global_batch}
    return [[step.micro for step in of_ranks] for of_ranks in zip(*each, strict=True)]


def shown(steps) -> list[Counter]:
    """(id, epoch) of each step, over all its packs."""
    return [
        Counter(pair for micro in ranks for batch in micro for pair in zip(batch.ids, batch.epochs, strict=True))
        for ranks in steps
    ]


def contents(steps) -> list[Counter]:
    """What the conversations of each step are, tensor by tensor, in whatever pack."""
    return [Counter(one for micro in ranks for batch in micro for one in split(batch)) for ranks in steps]


def split(batch) -> list[tuple]:
    """A pack as its conversations."""
    tensors, found = batch.tensors, []
    bounds = tensors["segments"][0].tolist()
    assert bounds[0] == 0
    assert len(bounds) == len(batch.ids) + 1
    patches, media = 0, 0
    for id_, start, stop in zip(batch.ids, bounds, bounds[1:], strict=False):
        tokens = tensors["input_ids"][0, start:stop]
        own, last_media = 0, media
        while own < 4 * int((tokens == 256).sum()):
            own += int(tensors["grid_thw"][0, last_media].prod())
            last_media += 1
        found.append(
            (
                id_,
                tuple(tokens.tolist()),
                tuple(tensors["labels"][0, start:stop].tolist()),
                tuple(tensors["position_ids"][0, :, start:stop].flatten().tolist()),
                tuple(tensors["pixel_values"][0, patches : patches + own].flatten().tolist()),
                tuple(tensors["grid_thw"][0, media:last_media].flatten().tolist()),
            )
        )
        patches, media = patches + own, last_media
    assert patches == tensors["pixel_values"].shape[1]
    assert media == tensors["grid_thw"].shape[1]
    return found


def test_a_pack_is_its_conversations_one_after_another(listed):
    processing = TinyProcessing()
    dataset = build(listed, processing)
    (((batch, *_),),) = take(dataset, 1)
    assert len(batch.ids) > 1
    tensors = batch.tensors
    tokens = tensors["input_ids"].shape[1]
    assert {name: tuple(tensor.shape[:2]) for name, tensor in tensors.items()} == {
        "input_ids": (1, tokens),
        "labels": (1, tokens),
        "position_ids": (1, 3),
        "pixel_values": (1, int(tensors["grid_thw"].prod(2).sum())),
        "grid_thw": (1, tensors["grid_thw"].shape[1]),
        "segments": (1, len(batch.ids) + 1),
    }
    assert tensors["segments"].dtype == torch.int64
    for id_, ids, labels, positions, pixels, grids in split(batch):
        encoded = processing.encode(listed[listed.find_id(id_)])
        assert ids == tuple(encoded.input_ids.tolist())
        assert labels == tuple(encoded.labels.tolist())
        assert positions == tuple(encoded.position_ids.flatten().tolist())
        assert pixels == tuple(encoded.pixel_values.flatten().tolist())
        assert grids == tuple(encoded.grid_thw.flatten().tolist())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("survey", [True, False])
def test_one_stream_for_any_ranks_packs_and_restarts(listed, survey, workers):
    """6 steps, or 3 and 3; on one rank, two or four; in large packs, small ones or none."""
    whole = take(build(listed, survey=survey), 6, workers=workers)
    order = Order([0] * COUNT, STEP, 3)
    assert shown(whole) == [Counter((listed.ids[i], epoch) for i, epoch in order.step(s)) for s in range(6)]
    expected = contents(whole)
    # ranks of one pipeline or context group load the same on their own
    again = take(build(listed, survey=survey), 6, workers=workers)
    assert [split(batch) for ((*micro,),) in again for batch in micro] == [
        split(batch) for ((*micro,),) in whole for batch in micro
    ]
    resumed = build(listed, survey=survey)  # knows nothing of what the first has learned
    assert contents(take(resumed, 3, cursor=3 * STEP, ranks=2, workers=workers)) == expected[3:]
    for options in ({"max_tokens": 2000, "max_patches": 3000}, {"packing": False}):
        assert contents(take(build(listed, survey=survey, **options), 6, ranks=4)) == expected
    for ranks in take(build(listed), 6, ranks=2):
        for batch in (batch for micro in ranks for batch in micro):
            assert batch.ids  # none is empty
            assert batch.tensors["input_ids"].shape[1] <= 700
            assert batch.tensors["pixel_values"].shape[1] <= 1200


def test_packs_of_one(listed):
    (ranks,) = take(build(listed, packing=False), 1, ranks=2)
    assert [len(batch.ids) for micro in ranks for batch in micro] == [1] * STEP


def test_padding_gives_the_packs_of_a_rank_one_length(listed):
    plain, padded = (take(build(listed, pad=pad), 4, ranks=2) for pad in (False, True))
    assert contents(padded) == contents(plain)
    lengths = set()
    for of_plain, of_padded in zip(plain, padded, strict=True):
        for micro, same in zip(of_plain, of_padded, strict=True):
            longest = max(batch.tensors["input_ids"].shape[1] for batch in micro)
            for batch, before in zip(same, micro, strict=True):
                tensors, real = batch.tensors, before.tensors["input_ids"].shape[1]
                assert tensors["input_ids"].shape == tensors["labels"].shape == (1, longest)
                assert tensors["position_ids"].shape == (1, 3, longest)
                assert int(tensors["segments"][0, -1]) == real
                assert (tensors["labels"][0, real:] == -100).all()
                assert (tensors["input_ids"][0, real:] < 256 + 2).all()
                assert not (tensors["input_ids"][0, real:] == 256).any()
                lengths.add(longest - real)
    assert len(lengths) > 2


def test_the_first_step_reads_no_other_conversation(listed):
    processing = TinyProcessing()
    dataset = build(listed, processing, survey=False)
    assert (processing.measured, processing.decoded) == (0, [])
    (((batch,),),) = take(dataset, 1, global_batch=1)
    own = listed[listed.find_id(batch.ids[0])]
    assert processing.measured == 1
    assert processing.decoded == [media.path for media in own.media]
    # a survey reads headers alone
    surveyed = TinyProcessing()
    build(listed, surveyed)
    assert (surveyed.measured, surveyed.decoded) == (COUNT, [])


def pictures_of(listed, index) -> list[Path]:
    return [Path(image) for image in json.loads(listed.read_text(index))["images"]]


def with_pictures(listed) -> list[int]:
    return [i for i in range(COUNT) if pictures_of(listed, i)]


@pytest.mark.parametrize("survey", [True, False])
def test_a_picture_that_is_broken_leaves_its_pack_smaller(listed, survey):
    """Only the rank that decodes it knows: all else is as planned, in every epoch, and the weight is what is there."""
    before = take(build(listed, survey=survey), 8, ranks=2)
    broken = with_pictures(listed)[:3]
    for index in broken:
        break_pixels(pictures_of(listed, index)[0])
    names = {listed.ids[index] for index in broken}
    ledger = Ledger()
    after = take(build(listed, survey=survey, ledger=ledger), 8, ranks=2)
    assert {entry.id: entry.reason for entry in ledger.entries} == dict.fromkeys(names, "unreadable_media")
    lost = 0
    for ranks, same in zip(before, after, strict=True):
        for micro, others in zip(ranks, same, strict=True):
            assert len(micro) == len(others)
            for batch, smaller in zip(micro, others, strict=True):
                assert smaller.ids == [id_ for id_ in batch.ids if id_ not in names]
                assert split(smaller) == [one for one in split(batch) if one[0] not in names]
                lost += len(batch.ids) - len(smaller.ids)
    assert lost >= 2 * len(names)


def test_a_pack_may_be_empty(listed):
    """L = 0, and everything has no rows; with a length, it is all padding."""
    broken = with_pictures(listed)[0]
    break_pixels(pictures_of(listed, broken)[0])
    dataset = build(listed, packing=False, survey=False)
    picks = [pick for step in range(4) for pick in Order([0] * COUNT, STEP, 3).step(step) if pick.index == broken]
    batch = dataset.batch(picks[:1])
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.tensors.items()}
    assert shapes == {
        "input_ids": (1, 0),
        "labels": (1, 0),
        "position_ids": (1, 3, 0),
        "pixel_values": (1, 0, 12),
        "grid_thw": (1, 0, 3),
        "segments": (1, 1),
    }
    full = dataset.batch([pick._replace(index=with_pictures(listed)[1]) for pick in picks[:1]]).tensors
    assert {name: tensor.dtype for name, tensor in batch.tensors.items()} == {
        name: tensor.dtype for name, tensor in full.items()
    }
    assert batch.ids == batch.epochs == []
    padded = dataset.batch(picks[:1], 7).tensors
    assert padded["input_ids"].shape == (1, 7)
    assert padded["segments"].tolist() == [[0]]


@pytest.mark.parametrize("survey", [True, False])
def test_what_cannot_be_used_is_left_out_by_all_ranks(tmp_path, survey):
    """Missing pictures and items that are none: never replaced, counted, and alike for all ranks."""
    odd = 6
    listed = make_set(tmp_path / "set", COUNT, odd=(odd,))
    missing = with_pictures(listed)[:2]
    for index in missing:
        path = pictures_of(listed, index)[0]
        path.rename(path.with_stem(f"{path.stem}_"))
    ledger = Ledger()
    dataset = build(listed, survey=survey, ledger=ledger)
    gone = {listed.ids[index] for index in (*missing, odd)}
    steps = take(dataset, 8, ranks=2)
    assert ledger.counts == {"missing_media": 2, "roles": 1}
    assert {entry.id for entry in ledger.entries} == gone
    found = shown(steps)
    assert not gone & {id_ for step in found for id_, _ in step}
    if survey:
        texts = [entry.text for entry in ledger.entries if entry.reason == "missing_media"]
        assert all("did you mean" in text for text in texts)
        assert set(dataset.ids) == set(listed.ids) - gone
        assert all(step.total() == STEP for step in found)
    else:
        order = Order([0] * COUNT, STEP, 3)
        assert found == [
            Counter((listed.ids[i], epoch) for i, epoch in order.step(s) if listed.ids[i] not in gone) for s in range(8)
        ]


def test_a_step_of_which_nothing_is_left(tmp_path):
    """Every rank has one empty pack."""
    listed = make_set(tmp_path / "set", COUNT, odd=range(COUNT))
    (ranks,) = take(build(listed, survey=False), 1, ranks=2)
    assert [[batch.ids for batch in micro] for micro in ranks] == [[[]], [[]]]


def test_what_is_too_long_is_refused_before_the_first_step(listed):
    sizes = [TinyProcessing().measure(conversation).tokens for conversation in listed]
    limit = sorted(sizes)[-3] - 1
    assert sum(size > limit for size in sizes) == 3
    processing = TinyProcessing()
    with pytest.raises(
        ValueError, match=r"3 conversations are too long: 0.jsonl.* tokens, .* may be.*too_long: drop, drop_"
    ):
        build(listed, processing, max_tokens=limit, max_patches=9999, too_long="refuse")
    assert processing.decoded == []
    lazy = build(listed, max_tokens=limit, max_patches=9999, too_long="refuse", survey=False)
    with pytest.raises(ValueError, match=r"is too long: 0.jsonl"):
        take(lazy, 8)


@pytest.mark.parametrize("too_long", ["drop", "drop_turns", "shrink"])
@pytest.mark.parametrize("survey", [True, False])
def test_what_is_too_long_is_mended_alike_in_every_epoch(listed, survey, too_long):
    dataset = build(listed, max_tokens=120, max_patches=150, too_long=too_long, survey=survey)
    steps = take(dataset, 8, ranks=2)
    assert dataset.ledger.counts.get("too_long")
    longest = 0
    for batch in (batch for ranks in steps for micro in ranks for batch in micro):
        assert batch.tensors["input_ids"].shape[1] <= 120
        assert batch.tensors["pixel_values"].shape[1] <= 150
        for id_, tokens, *_ in split(batch):
            longest = max(longest, len(tokens))
            whole = TinyProcessing().measure(listed[listed.find_id(id_)]).tokens
            assert len(tokens) <= whole
            assert too_long != "drop" or len(tokens) == whole
    assert survey or dataset.identity == build(listed, survey=False).identity  # whatever was found on the way
    mended = int(dataset.sizes.changed.sum())
    how = {"drop": "", "drop_turns": "oldest questions are left out", "shrink": "pictures are made smaller"}[too_long]
    said = f"{mended} of {len(dataset)} conversations are too long for 120 tokens and 150 patches: their {how}"
    assert dataset.notes == ([said] if survey and mended else [])
    assert mended == 0 if too_long == "drop" else mended > 0
    assert len(dataset.ledger) < COUNT


def test_identity_is_that_of_the_stream(listed, tmp_path):
    """Other limits may go on with it, unless they leave others out or change some."""
    same = build(listed).identity
    assert build(listed, max_tokens=900, max_patches=4000, packing=False, too_long="shrink").identity == same
    assert build(listed, survey=False).identity == same
    assert build(listed, max_tokens=120).identity != same
    mended = {build(listed, max_tokens=tokens, too_long="drop_turns").identity for tokens in (200, 201)}
    assert len(mended) == 2
    weighed = read_conversations([replace(listed.sources[0], weight=2.0)])
    assert build(weighed).identity != same
    with open(listed.sources[0].path, "a", encoding="utf-8") as file:
        file.write(f"{listed.read_text(0)}\n")
    assert build(read_conversations(listed.sources)).identity != same


# --- the survey


def test_a_kept_survey_is_made_anew_where_pictures_are_gone(listed, tmp_path):
    file = tmp_path / "run" / "survey.npz"
    build(listed, survey_file=file)
    pictures_of(listed, with_pictures(listed)[0])[0].unlink()
    again = build(listed, survey_file=file)
    assert len(again) == COUNT - 1
    assert [entry.reason for entry in again.ledger.entries] == ["missing_media"]


def test_a_survey_is_kept_and_mended_files_are_found(listed, tmp_path):
    missing = pictures_of(listed, with_pictures(listed)[0])[0]
    away = missing.rename(tmp_path / "away.png")
    file = tmp_path / "run" / "survey.npz"
    first = build(listed, survey_file=file)
    assert len(first) == COUNT - 1
    processing = TinyProcessing()
    again = build(listed, processing, survey_file=file)
    assert list(again.ids) == list(first.ids)
    assert again.identity == first.identity
    assert again.ledger.entries == first.ledger.entries
    assert processing.measured == 1  # that which was refused
    assert contents(take(again, 3)) == contents(take(first, 3))
    away.rename(missing)
    assert len(build(listed, survey_file=file)) == COUNT
    # other data, limits or processing: all anew; so where the file is damaged
    for options in ({"max_tokens": 701}, {"too_long": "shrink"}):
        processing = TinyProcessing()
        build(listed, processing, survey_file=file, **options)
        assert processing.measured >= COUNT
    processing.identity = "another"
    for _ in range(2):
        processing.measured = 0
        build(listed, processing, survey_file=file)
        assert processing.measured == COUNT
        file.write_bytes(file.read_bytes()[:100])
    with open(listed.sources[0].path, "a", encoding="utf-8") as lines:
        lines.write(f"{listed.read_text(0)}\n")
    processing.measured = 0
    build(read_conversations(listed.sources), processing, survey_file=file)
    assert processing.measured == COUNT + 1


class Ranks:
    """An exchange between threads, as all_gather_object is one between processes."""

    def __init__(self, count: int):
        self.held = [None] * count
        self.barrier = threading.Barrier(count)

    def of(self, rank: int):
        def exchange(own):
            self.held[rank] = own
            self.barrier.wait(10)
            held = list(self.held)
            self.barrier.wait(10)
            return held

        return exchange


def test_ranks_share_a_survey(tmp_path):
    listed = make_set(tmp_path / "set", COUNT, odd=(6,))
    pictures_of(listed, with_pictures(listed)[0])[0].unlink()
    alone = build(listed, max_tokens=200, too_long="drop_turns")
    file = tmp_path / "survey.npz"
    for looked in ([COUNT // 3] * 3, [0, 0, 1]):  # the second time, two at the places of what was refused
        ranks = Ranks(3)
        processings = [TinyProcessing() for _ in range(3)]
        dones = [[] for _ in range(3)]

        def survey(rank, ranks=ranks, processings=processings, dones=dones):
            def tell(done, of):
                dones[rank].append((done, of))

            return build(
                listed,
                processings[rank],
                max_tokens=200,
                too_long="drop_turns",
                survey_file=file,
                part=(rank, 3),
                exchange=ranks.of(rank),
                say=tell,
            )

        with ThreadPoolExecutor(3) as pool:
            datasets = list(pool.map(survey, range(3)))
        for dataset in datasets:
            assert dataset.identity == alone.identity
            assert list(dataset.ids) == list(alone.ids)
            assert dataset.ledger.entries == alone.ledger.entries
            for column, same in zip(dataset.sizes._columns().values(), alone.sizes._columns().values(), strict=True):
                assert (column == same).all()
        if looked[0]:
            assert [said[-1] for said in dones] == [(COUNT // 3, COUNT // 3)] * 3
        else:
            assert sum(processing.measured for processing in processings) < COUNT


def test_a_disk_that_fails_says_nothing_of_a_file(listed, monkeypatch):
    """It stops the training: left out, the conversation would be missed on some ranks only."""

    def fail(path):
        raise OSError(5, "Input/output error", path)

    dataset = build(listed)
    monkeypatch.setattr("mm_data.images.read_image", fail)
    media = next(conversation.media[0] for conversation in listed if conversation.media)
    with pytest.raises(OSError, match="Input/output error"):
        media.read_image()
    assert dataset.ledger.counts == {}


def test_what_goes_wrong_on_one_rank_is_raised_by_all(listed):
    class Broken(TinyProcessing):
        def measure(self, conversation):
            raise OSError(24, "Too many open files")

    ranks = Ranks(2)

    def survey(rank):
        processing = Broken() if rank else TinyProcessing()
        with pytest.raises(OSError, match="Too many"):
            build(listed, processing, part=(rank, 2), exchange=ranks.of(rank))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(survey, range(2)))


# --- while it is trained on


def test_a_picture_that_takes_too_long_is_named(listed):
    index = with_pictures(listed)[0]
    stuck = str(pictures_of(listed, index)[0])
    forever = threading.Event()

    class Slow(TinyProcessing):
        def _pixels(self, media, grid):
            if media.path == stuck:
                forever.wait(30)
            return super()._pixels(media, grid)

    began = time.perf_counter()
    dataset = build(listed, Slow(), decode_timeout=0.2)
    with pytest.raises(ValueError, match=f"{re.escape(listed.ids[index])} is not decoded after 0.2 seconds: .*{stuck}"):
        take(dataset, 8, workers=2)
    assert time.perf_counter() - began < 10
    forever.set()


def test_a_picture_that_has_another_size_than_it_had_is_named(listed, tmp_path):
    index, file = with_pictures(listed)[0], tmp_path / "survey.npz"
    dataset = build(listed, survey_file=file)
    save_png(pictures_of(listed, index)[0], 60, 61)
    with pytest.raises(ValueError, match=f"{re.escape(listed.ids[index])} was changed while it was in use: .* tokens"):
        take(dataset, 8)
    # The next run has the same survey, and says how to be rid of it.
    with pytest.raises(ValueError, match=f"delete {re.escape(str(file))}, so that all are looked at again"):
        take(build(listed, survey_file=file), 8)
    file.unlink()
    take(again := build(listed, survey_file=file), 8)
    assert again.identity == dataset.identity


def test_plans_are_made_ahead_and_fail_at_their_step(listed):
    """While a step is trained on, the next is planned and decoded; what is wrong with a later one is raised there."""
    wrong = Order([0] * COUNT, STEP, 3).step(2)[0].index
    planned = threading.Event()

    class Odd(TinyProcessing):
        def encode(self, conversation):
            if conversation.id in next_ids:
                planned.set()
            return super().encode(conversation)

        def measure(self, conversation):
            if conversation.id == listed.ids[wrong]:
                raise OSError(5, "Input/output error")
            return super().measure(conversation)

    next_ids = {listed.ids[pick.index] for pick in Order([0] * COUNT, STEP, 3).step(1)}
    dataset = build(listed, Odd(), survey=False)
    steps = iter(build_loader(dataset, global_batch=STEP, seed=3, num_workers=1))
    assert next(steps).index == 0
    assert planned.wait(10)  # nobody asked for it yet
    assert next(steps).index == 1
    with pytest.raises(OSError, match="Input/output error"):
        next(steps)


def test_nothing_grows_with_the_steps(listed):
    dataset = build(listed)
    loader = build_loader(dataset, global_batch=STEP, num_workers=2)
    made = []
    batch = dataset.batch
    dataset.batch = lambda *arguments: made.append(1) or batch(*arguments)
    steps = iter(loader)
    for _ in range(3):
        taken = next(steps)
    time.sleep(0.3)
    # beyond what was taken: two steps at most, or two packs for each thread
    assert len(made) <= 3 * len(taken.micro) + max(2 * len(taken.micro), 4) + 2
    steps.close()
    own = [thread for thread in threading.enumerate() if thread.name.startswith(("mm_data loader", "mm_data planner"))]
    for thread in own:
        thread.join(5)
    assert not any(thread.is_alive() for thread in own)


def test_a_step_that_cannot_be_split_is_refused(listed):
    with pytest.raises(
        ValueError, match=r"global_batch=8 cannot be split over 3 .* ranks: .* multiple of 3, e.g. 6 or 9"
    ):
        build_loader(build(listed), global_batch=8, dp_size=3)
    build_loader(build(listed), global_batch=8, micro_batch=3)  # a plan takes its place


# --- weights


def test_weights_of_sets(tmp_path):
    """In an epoch of 10 + 15 + 10 places, a set of 10, one of 10 with weight 1.5, and one of 20 with weight 0.5."""
    listed = make_set(tmp_path / "set", 40, ((10, 1.0), (10, 1.5), (20, 0.5)))
    dataset = build(listed)
    assert dataset.sets == [(10, 1.0), (10, 1.5), (20, 0.5)]
    steps = shown(take(dataset, 14, global_batch=5))
    for epoch in range(2):
        counts = Counter(
            listed.find_id(id_) // 10 for step in steps[7 * epoch : 7 * epoch + 7] for id_, _ in step.elements()
        )
        assert (counts[0], counts[1], counts[2] + counts[3]) == (10, 15, 10)
    total = Counter(id_ for step in steps for id_, _ in step.elements())
    assert total == Counter({id_: (2, 3, 1, 1)[i // 10] for i, id_ in enumerate(listed.ids)})


def test_one_who_cannot_be_used_takes_no_place(tmp_path):
    listed = make_set(tmp_path / "set", 12, ((4, 1.0), (4, 3.0), (4, 1.0)), odd=(0, 5, 8, 9, 10, 11))
    dataset = build(listed)
    assert dataset.sets == [(3, 1.0), (3, 3.0)]
    total = Counter(id_ for step in shown(take(dataset, 4, global_batch=3)) for id_, _ in step.elements())
    assert total == Counter({listed.ids[i]: times for i, times in ((1, 1), (2, 1), (3, 1), (4, 3), (6, 3), (7, 3))})
