"""Which layers go where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_parallel.pipeline.cut import even, ranges


def test_stages_follow_each_other_rank_by_rank():
    assert ranges(((2, 1), (1, 3)), 7) == [range(0, 2), range(2, 3), range(3, 4), range(4, 7)]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 40))
def test_an_even_split_has_every_layer_once(ranks, virtual, more):
    layers = ranks * virtual + more
    stages = even(layers, ranks, virtual)
    assert [i for part in ranges(stages, layers) for i in part] == list(range(layers))
    sizes = [size for row in stages for size in row]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("stages", "layers", "message"),
    [
        (((8, 8),), 30, r"pp_layers \[8, 8\] are 16 layers, but the model has 30: .* they are \[15, 15\]"),
        (((1, 2), (3, 1)), 8, r"pp_layers \[\[1, 2\], \[3, 1\]\] are 7 layers, .* they are \[\[2, 2\], \[2, 2\]\]"),
        (((2, 2, 1),), 2, "use at most 2 stages"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages, layers, message):
    with pytest.raises(ValueError, match=message):
        ranges(stages, layers)
