import pytest
from torch import nn

from mm_parallel import ParallelPlan
from mm_parallel.testing import TinyLadder


def test_a_star_in_layers_does_not_cross_dots():
    assert list(TinyLadder.plan.units_of(TinyLadder())) == ["blocks.0", "blocks.1", "blocks.2"]


def test_more_than_nine_layers_keep_the_order_of_the_model():
    assert list(TinyLadder.plan.units_of(TinyLadder(layers=12)))[-2:] == ["blocks.10", "blocks.11"]


def test_a_star_in_fp32_crosses_dots():
    in_fp32 = ParallelPlan(("blocks.*",), ("*.table",)).fp32_parameters(TinyLadder(layers=2))
    assert list(in_fp32) == ["blocks.0.table", "blocks.1.table"]
    assert all(isinstance(p, nn.Parameter) for p in in_fp32.values())


def test_a_misspelt_pattern_is_an_error_with_what_there_is():
    with pytest.raises(ValueError, match=r"plan.layers: no module is named like 'block\.\*'.*blocks"):
        ParallelPlan(("block.*",)).check(TinyLadder())
    with pytest.raises(ValueError, match=r"plan.keep_fp32: no parameter is named like '\*\.tables'.*table"):
        ParallelPlan(("blocks.*",), ("*.table", "*.tables")).fp32_parameters(TinyLadder())
