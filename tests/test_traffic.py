"""What a layer reads, writes and keeps besides matrix products and attention is what its formulas need: no copy more.

Counted on fake tensors by docs/measure/traffic.py, in bytes for each token and channel. With weights and activations in
bfloat16 and a residual stream in float32, an operation moves 2 or 4 for each tensor of that size that it reads or
writes. `f` is the width of the feed-forward over that of the layer, `g` that of keys over that of queries. What is left
over (numbers of each row, tables, rows of text) is less than 2 % of what is moved, and 1 of what is kept.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

MEASURE = Path(__file__).parent.parent / "docs" / "measure"

NORM, NORM_BACK = 4 + 4, 4 + 4 + 4  # of layers, in float32
CAST = 4 + 2  # to bfloat16 or back
MODULATED = NORM + CAST
RMS = 2 + (2 + 4) + (4 + 4) + CAST  # the norm; times its inverse; times weight
RMS_BACK = (2 + 4) + (4 + 2 + 4) + 4 + 4 + (4 + 4) + (4 + 2 + 4) + CAST  # scaled, times x, two sums, times weight, x
ROTATE = (2 + 4) + 2 * (2 + 1 + 2) + CAST  # times cosine; for each half, plus the other times sine
GATED, GATED_BACK = 4 + 2 + 4, (4 + 2 + 4) + 4 + (4 + 4) + CAST  # the gate's product and sum, the product of the other
ADD = 4 + 2 + 4
JOIN = 4 + 4 + 4  # of two gradients of the stream
JOIN_16 = 2 + 2 + 2  # of two gradients of activations
SUM = 2  # of rows, for the gradient of a bias


def wan(f: float) -> dict[str, float]:
    return {
        "forward": 2 * (MODULATED + RMS + ROTATE + GATED) + MODULATED + RMS + ADD + 4 * f,
        "backward": 2 * (GATED_BACK + ROTATE) + 3 * (NORM_BACK + CAST + JOIN + RMS_BACK)
        + CAST + 2 * JOIN_16 + 7 * SUM + f * (SUM + 3 * 2 + 2 * 2),  # GELU's, and its output again
        # streams; inputs of linears; q and k before the norm, q, k and v; attentions, and what is gated; f
        "kept": 3 * 4 + 3 * 2 + (2 + 3) * 2 + 2 * 2 + 2 * 2 + 2 * 2 + f * 2,
    }  # fmt: skip


def opensoraplan(f: float) -> dict[str, float]:
    return {
        "forward": 2 * (MODULATED + ROTATE + GATED) + CAST + ADD + 4 * f,
        "backward": 2 * (GATED_BACK + ROTATE + NORM_BACK + CAST) + 3 * JOIN + 2 * CAST + 2 * JOIN_16
        + 7 * SUM + f * (SUM + 3 * 2 + 2 * 2),  # GELU's, and its output again
        "kept": 2 * 4 + 3 * 2 + 3 * 2 + 2 * 2 + 2 + 2 * 2 + f * 2,
    }  # fmt: skip


def qwen(f: float, g: float) -> dict[str, float]:
    """The stream is bfloat16; silu and its product, and in the backward two products and silu again."""
    return {
        "forward": 2 * (RMS + JOIN_16) + (1 + g) * ROTATE + f * (4 + 6),
        "backward": 2 * (RMS_BACK + JOIN_16) + (1 + g) * ROTATE + 3 * JOIN_16 + (1 + 2 * g) * SUM
        + f * (6 + 6 + 4 + 6),
        "kept": 2 * 2 + 2 * 2 + (1 + 2 * g) * 2 + 2 + 3 * f * 2,
    }  # fmt: skip


def tower(f: float) -> dict[str, float]:
    """q, k and v are of one linear: v is copied, and their gradients are joined. All linears have a bias."""
    return {
        "forward": 2 * (RMS + JOIN_16) + 2 * ROTATE + (2 + 2) + f * (4 + 6),
        "backward": 2 * (RMS_BACK + JOIN_16) + 2 * ROTATE + JOIN_16 + 3 * (2 + 2) + (5 + 2 * f) * SUM
        + f * (6 + 6 + 4 + 6),
        "kept": 2 * 2 + 2 * 2 + 3 * 2 + 2 + 3 * f * 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def traffic():
    sys.path.insert(0, str(MEASURE))
    spec = importlib.util.spec_from_file_location("traffic", MEASURE / "traffic.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["traffic"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(MEASURE))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("wan", wan(8960 / 1536)),
        ("opensoraplan", opensoraplan(4)),
        ("qwen", qwen(11008 / 2048, 2 / 16)),
        ("qwen_tower", tower(3420 / 1280)),
    ],
)
def test_a_layer_moves_and_keeps_no_more_than_its_formulas(layer, expected, traffic):
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = traffic.count(getattr(traffic, layer)(True))
    moved = {"forward": found.forward, "backward": found.backward}
    for name, sums in moved.items():
        assert expected[name] <= sums.total() < 1.02 * expected[name], (name, expected[name], sums)
    assert expected["kept"] <= found.kept < expected["kept"] + 1
