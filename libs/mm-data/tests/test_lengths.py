"""Conversations that are too long: dropped, refused, shortened by whole questions, or with smaller pictures."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_data.conversations import Box, Conversation, Media, Turn, Unusable
from mm_data.lengths import Limits, fit

sys.path.insert(0, str(Path(__file__).parent))
from tiny_processing import IMAGE, MERGE, TinyProcessing, save_png, say

PROCESSING = TinyProcessing()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    sizes = [(8, 8), (16, 40), (64, 64), (30, 20)]
    return [save_png(folder / f"{i}.png", *size, i) for i, size in enumerate(sizes)]


pairs = st.lists(
    st.tuples(st.lists(st.integers(0, 3), max_size=2), st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=5
)


def converse(pictures, pairs, system) -> Conversation:
    turns = [Turn("system", ("be brief",))] if system else []
    for chosen, question, answer in pairs:
        media = [Media("image", pictures[i]) for i in chosen]
        turns += [Turn("user", (*media, "q" * question)), Turn("assistant", ("a" * answer,))]
    return Conversation("c", tuple(turns))


def is_whole(conversation) -> bool:
    """Image tokens are those of the pictures, to the last."""
    encoded = PROCESSING.encode(conversation)
    tokens = int((encoded.input_ids == IMAGE).sum())
    patches = int(encoded.grid_thw.prod(1).sum())
    return tokens * MERGE**2 == patches == len(encoded.pixel_values)


@settings(max_examples=150, deadline=None)
@given(
    pairs, st.booleans(), st.integers(4, 700), st.integers(1, 1500), st.sampled_from(["drop", "drop_turns", "shrink"])
)
def test_whatever_the_limit_pictures_stay_whole(pictures, pairs, system, max_tokens, max_patches, too_long):
    conversation = converse(pictures, pairs, system)
    limits = Limits(max_tokens, max_patches, too_long)
    whole = PROCESSING.measure(conversation)
    if too_long == "drop_turns":
        most_done = replace(conversation, turns=(*conversation.turns[: int(system)], *conversation.turns[-2:]))
    elif too_long == "shrink":
        most_done = replace(conversation, turns=cap(conversation.turns, 64))
    else:
        most_done = conversation
    if not limits.hold(PROCESSING.measure(most_done)):  # nothing that is allowed will do
        with pytest.raises(Unusable, match="too_long: takes "):
            fit(conversation, PROCESSING, limits)
        return
    fitted, size, changed = fit(conversation, PROCESSING, limits)
    assert limits.hold(size)
    assert size == PROCESSING.measure(fitted)
    assert changed == (not limits.hold(whole))
    assert is_whole(fitted)
    if not changed:
        assert fitted == conversation
    elif too_long == "drop_turns":
        head = int(system)
        kept = len(fitted.turns) - head
        assert kept % 2 == 0
        assert fitted.turns == (*conversation.turns[:head], *conversation.turns[-kept:])
        longer = Conversation("c", (*conversation.turns[:head], *conversation.turns[-kept - 2 :]))
        assert not limits.hold(PROCESSING.measure(longer))
    else:
        assert [cap(turn.parts, 1) for turn in fitted.turns] == [cap(turn.parts, 1) for turn in conversation.turns]
        (pixels,) = {media.max_pixels for media in fitted.media}
        assert not limits.hold(PROCESSING.measure(replace(conversation, turns=cap(conversation.turns, pixels + 64))))


def cap(parts, pixels):
    def one(part):
        if isinstance(part, Turn):
            return replace(part, parts=cap(part.parts, pixels))
        return replace(part, max_pixels=pixels) if isinstance(part, Media) else part

    return tuple(map(one, parts))


def test_the_largest_shrink_first(pictures):
    conversation = converse(pictures, [([0, 1, 2], 5, 5)], False)
    before = [PROCESSING._grid(media) for media in conversation.media]
    size = PROCESSING.measure(conversation)
    fitted = fit(conversation, PROCESSING, Limits(size.tokens - 1, 10**6, "shrink")).conversation
    after = [PROCESSING._grid(media) for media in fitted.media]
    assert after[:2] == before[:2]
    assert after[2] < before[2]
    # what an item itself asks for stays, where it is less
    own = replace(conversation, turns=(*cap(conversation.turns[:1], 200), *conversation.turns[1:]))
    more = replace(own, turns=(*own.turns, *say("q", "a" * 50), *converse(pictures, [([2], 5, 5)], False).turns))
    fitted = fit(more, PROCESSING, Limits(PROCESSING.measure(more).tokens - 1, 10**6, "shrink")).conversation
    assert [media.max_pixels for media in fitted.media[:3]] == [200] * 3
    assert fitted.media[3].max_pixels > 200


def test_boxes_keep_their_picture(pictures):
    """A question with a box of an older picture cannot stay without it; other boxes count their media anew."""
    media = [Media("image", path) for path in pictures[:3]]
    turns = (
        Turn("user", (media[0], "a" * 100)),
        Turn("assistant", ("b" * 100,)),
        Turn("user", (media[1], "where")),
        Turn("assistant", (Box((1, 2, 3, 4), 0),)),
        Turn("user", (media[2], "and here")),
        Turn("assistant", (Box((1, 2, 3, 4), 2),)),
    )
    conversation = Conversation("c", turns)
    without_one = PROCESSING.measure(Conversation("c", (turns[2], say("", ".")[1], *turns[4:5], say("", ".")[1])))
    fitted = fit(conversation, PROCESSING, Limits(without_one.tokens + 40, 10**6, "drop_turns"))
    assert fitted.conversation.turns == (turns[4], Turn("assistant", (Box((1, 2, 3, 4), 0),)))
    assert is_whole(fitted.conversation)


def test_a_system_turn_of_a_later_question_goes_with_it():
    turns = (Turn("system", ("s",)), *say("a" * 50, "b"), Turn("system", ("t",)), *say("c", "d"), *say("e", "f"))
    whole = Conversation("c", turns)
    size = PROCESSING.measure(whole).tokens
    assert fit(whole, PROCESSING, Limits(size - 1, 1, "drop_turns")).conversation.turns == (turns[0], *turns[3:])
    left = (turns[0], *turns[6:])
    few = PROCESSING.measure(Conversation("c", left)).tokens
    assert fit(whole, PROCESSING, Limits(few, 1, "drop_turns")).conversation.turns == left


def test_a_giant_picture_is_named_with_its_numbers(pictures):
    conversation = converse(pictures, [([0, 2], 5, 5)], False)
    with pytest.raises(Unusable) as refused:
        fit(conversation, PROCESSING, Limits(10**6, 500))
    assert refused.value.reason == "too_long"
    assert refused.value.text == (
        f"takes 1,040 patches, 500 may be; the largest of its media, {pictures[2]}, has 1,024 patches"
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [((0, 1), "max_tokens=0"), ((1, 0), "max_patches=0"), ((1, 1, "cut"), "too_long='cut' must be drop, refuse")],
)
def test_wrong_limits_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Limits(*wrong)
