"""The positions of tokens by the makers' rule, against the rule told in another way: token by token."""

import math
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from mm_models import preset
from mm_models.qwen2_5_vl import Qwen25VLConfig, positions
from mm_models.qwen2_5_vl.mrope import SharedTime

TINY = preset("qwen2.5-vl-tiny")
IMAGE, VIDEO = TINY.image_token, TINY.video_token


def tell(ids: list[int], grids: list[tuple[int, int, int]], seconds: list[float], config: Qwen25VLConfig):
    """Text stands one behind the largest position so far. A token of an image or a video stands at its time, row and
    column, counted from one behind the largest position before the first of them.
    """
    grids, seconds = iter(grids), iter(seconds)
    largest, left, places = -1, 0, []
    for token in ids:
        if token not in (config.image_token, config.video_token):
            largest += 1
            places.append((largest, largest, largest))
            continue
        if not left:
            frames, rows, columns = next(grids)
            rows, columns = rows // config.spatial_merge_size, columns // config.spatial_merge_size
            left, begin = frames * rows * columns, largest + 1
            second = next(seconds) if token == config.video_token else 0.0
        number = frames * rows * columns - left
        frame, rest = divmod(number, rows * columns)
        row, column = divmod(rest, columns)
        place = (begin + math.floor(frame * second * config.tokens_per_second), begin + row, begin + column)
        places.append(place)
        largest = max(largest, *place)
        left -= 1
    return torch.tensor(places).reshape(-1, 3).T


@pytest.mark.parametrize("seed", range(20))
def test_random_conversations(seed):
    draw = random.Random(seed)
    config = replace(TINY, tokens_per_second=draw.choice([2, 2, 1, 4, 2.5]))
    ids, grids, seconds = [], [], []
    for _ in range(draw.randint(0, 6)):
        ids += [draw.randrange(256) for _ in range(draw.randint(0, 5))]
        video = draw.random() < 0.5
        grid = (draw.randint(1, 6) if video else 1, 2 * draw.randint(1, 7), 2 * draw.randint(1, 7))
        ids += [config.vision_start_token, *[VIDEO if video else IMAGE] * (math.prod(grid) // 4)]
        ids += [config.vision_end_token]
        grids.append(grid)
        seconds += [draw.randint(65, 300) / 128] if video else []  # exact, so that rounding is no matter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SharedTime)
        found = positions(torch.tensor(ids), grids, seconds, config=config)
        assert torch.equal(found, tell(ids, grids, seconds, config))
        assert (found.dtype, found.device.type) == (torch.long, "cpu")
        # one row of a batch like one conversation, numbers for all grids like those for videos
        rows = torch.tensor([ids, [1] * len(ids), ids])
        batch = positions(rows, torch.tensor(grids * 2).reshape(-1, 3), seconds * 2, config=config)
    text = torch.arange(len(ids)).expand(3, -1)
    assert torch.equal(batch, torch.stack((found, text, found), 1))


def test_text_after_a_long_video():
    """Eight grids of 8 x 8 patches, a second apart: times up to 3 + 14, so text goes on at 18. transformers 5: at 7."""
    ids = [1, 2, TINY.vision_start_token, *[VIDEO] * 128, TINY.vision_end_token, 3]
    found = positions([ids], [(8, 8, 8)], [1.0], config=TINY)
    assert found[:, 0, -2:].tolist() == [[18, 19]] * 3
    assert found[0, 0, 3:-2:16].tolist() == [3, 5, 7, 9, 11, 13, 15, 17]
    assert found[1:, 0, 3:-2].max() == 6


def test_the_makers_examples():
    """An image as a square of rows and columns; a video of 3 grids of 4 x 4 patches, 2 s apart, at 13, 17 and 21."""
    ids = [5, IMAGE, IMAGE, IMAGE, IMAGE, 6]
    expected = [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    assert positions(np.array(ids), np.array([[1, 4, 4]]), config=TINY).tolist() == expected
    ids = [*range(13), *[VIDEO] * 12, 1]
    found = positions(ids, [(3, 4, 4)], [2.0], config=TINY)
    assert found[0, 13:25:4].tolist() == [13, 17, 21]
    assert found[:, -1].tolist() == [22, 22, 22]


def test_the_rate_is_a_number_with_a_fraction():
    """Frames 0.3 s apart stand at 0, 0.6, 1.2, … positions: the library of 2025 cut the seconds to a whole number."""
    found = positions([VIDEO] * 5, [(5, 2, 2)], [0.3 * 2], config=TINY)
    assert found[0].tolist() == [0, 1, 2, 3, 4]
    found = positions([VIDEO] * 4, [(4, 2, 2)], [2 / 1.2], config=TINY)  # 1.2 frames a second, two to a grid
    assert found[0].tolist() == [0, 3, 6, 10]


def test_released_models_need_no_configuration():
    found = positions([1, 151652, 151655, 151653, 151652, 151656, 151656, 151653], [(1, 2, 2), (2, 2, 2)], [1.5])
    assert found[0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9]


def test_grids_that_share_a_time():
    """At 8 frames a second two of four grids stand at one time. It is said once, also for other videos."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default", SharedTime)
        for _ in range(3):
            found = positions([VIDEO] * 4, [(4, 2, 2)], [0.25], config=TINY)
        positions([VIDEO] * 5, [(5, 2, 2)], [0.2], config=TINY)
        positions([VIDEO] * 4, [(4, 2, 2)], [0.5], config=TINY)
        positions([VIDEO], [(1, 2, 2)], [0.01], config=TINY)
    assert found[0].tolist() == [0, 0, 1, 1]
    assert [str(one.message) for one in said] == [
        "frames of a video are so close that two pairs of them share a position in time, which has 2 a second: sample "
        "at most 4 frames a second"
    ]
    with pytest.warns(SharedTime):
        positions([VIDEO] * 4, [(4, 2, 2)], [0.499], config=TINY)


@pytest.mark.parametrize(
    ("ids", "grids", "seconds", "said"),
    [
        ([1, IMAGE], [], None, "tokens of another image or video from token 1 on, but grid_thw has 0 rows only"),
        ([1], [(1, 2, 2)], None, "grid_thw has 1 rows, but there are tokens of 0 images"),
        (
            [IMAGE] * 3,
            [(1, 4, 4)],
            None,
            r"3 tokens 268 from token 0 on, but grid_thw\[0\] is \(1, 4, 4\), and makes 4",
        ),
        ([IMAGE, IMAGE, VIDEO, IMAGE], [(1, 4, 4)], None, "row 0 has 2 tokens 268 from token 0 on"),
        ([IMAGE], [(1, 3, 2)], None, r"grid_thw\[0\] is \(1, 3, 2\), but must be three numbers of at least 1"),
        ([IMAGE], [(1, 2)], None, r"grid_thw\[0\] is \(1, 2\)"),
        ([IMAGE], 7, None, "grid_thw is 7, but must be M 3"),
        ([VIDEO], [(1, 2, 2)], None, "seconds_per_grid has 0 numbers, but there are 1 videos"),
        ([VIDEO, 1, IMAGE], [(1, 2, 2)] * 2, [1, 1, 1], "3 numbers, but there are 1 videos, and 2 rows of grid_thw"),
        ([VIDEO], [(1, 2, 2)], [0], r"seconds_per_grid of grid_thw\[0\], a video, is 0.0, but must be above 0"),
        ([VIDEO], [(1, 2, 2)], [float("nan")], "is nan, but must be above 0"),
    ],
)
def test_what_does_not_fit_is_named(ids, grids, seconds, said):
    with pytest.raises(ValueError, match=said):
        positions(ids, grids, seconds, config=TINY)
