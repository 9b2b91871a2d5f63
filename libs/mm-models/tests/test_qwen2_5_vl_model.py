"""Qwen2.5-VL beyond parity: windows, one tower a step, packs without image or token, what does not fit."""

from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm_models import build, preset
from mm_models.layers import RMSNorm, Sequence, core
from mm_models.lora import LoRAConfig, add_lora
from mm_models.qwen2_5_vl.layers import GatedSilu, turn
from mm_models.qwen2_5_vl.start import initial
from mm_models.qwen2_5_vl.vision import attend, put_calls
from mm_models.qwen2_5_vl.windows import MOST_CALLS, lay_out

TINY = preset("qwen2.5-vl-tiny")
GRIDS = {
    "none": (),
    "one": ((1, 10, 6),),
    "whole windows": ((1, 16, 8),),
    "a video": ((3, 6, 12),),
    "many": tuple((1 + i % 2, 2 + 2 * (i * 5 % 11), 2 + 2 * (i * 7 % 13)) for i in range(20)),
}


def owners(grids, window: int | None) -> Tensor:
    """Of each patch in its given order, the window or frame to which it belongs; told patch by patch."""
    keys = []
    for number, (frames, rows, columns) in enumerate(grids):
        for frame in range(frames):
            for row in range(0, rows, 2):
                for column in range(0, columns, 2):
                    inside = (row // 2 // window, column // 2 // window) if window else ()
                    keys += [(number, frame, *inside)] * 4
    names = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([names[key] for key in keys])


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_attention_within_windows_and_frames(grids, window):
    """Equals attention over all patches with a mask, in a few calls, however many images there are."""
    layout = lay_out(grids, 2, window)
    patches = sum(np.prod(grid) for grid in grids)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(patches, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    order = (torch.from_numpy(layout.order)[:, None] * 4 + torch.arange(4)).flatten()
    for grouping, own in ((layout.windows, owners(grids, window)), (layout.frames, owners(grids, None))):
        calls = []

        def count(*args, into=calls):
            into.append(args)
            return core(*args)

        found = torch.empty_like(q)
        found[order] = attend(q[order], k[order], v[order], put_calls(grouping, q.device), count)
        if patches:
            together = own[:, None] == own
            exact = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=together)
            assert torch.allclose(found, exact.transpose(0, 1), rtol=0, atol=1e-12)
        assert len(calls) <= MOST_CALLS
        sizes = own.unique(return_counts=True)[1].unique() if patches else []
        assert len(calls) == min(MOST_CALLS, len(sizes))
        assert all(len(call) == 4 for call in calls) or len(sizes) > MOST_CALLS, "masks only where sizes share a call"


def test_places_and_the_way_back():
    layout = lay_out(GRIDS["many"], 2, 2)
    assert (layout.order[layout.back] == np.arange(len(layout.order))).all()
    places = [
        (row + i, column + j)
        for frames, rows, columns in GRIDS["many"]
        for _ in range(frames)
        for row in range(0, rows, 2)
        for column in range(0, columns, 2)
        for i in range(2)
        for j in range(2)
    ]
    assert (layout.places.reshape(-1, 4, 2)[layout.back].reshape(-1, 2) == places).all()
    whole = lay_out(((1, 16, 8),), 2, 4)  # the frame is one stretch already: nothing moves
    assert whole.frames.order is None
    assert [group[:2] for group in whole.windows.groups] == [(2, 64)]


def test_sizes_that_share_a_call_waste_little():
    """Of 200 frames of random sizes four calls compute less than twice the squares."""
    sides = np.random.default_rng(0).integers(2, 40, (200, 2)) * 2
    groups = lay_out(tuple((1, int(h), int(w)) for h, w in sides), 2, 4).frames.groups
    assert len(groups) == MOST_CALLS
    assert sum(group.patches for group in groups) == sides.prod(1).sum()
    assert sum(g.count * g.size**2 for g in groups) < 1.7 * (sides.prod(1) ** 2).sum()


def test_turn():
    x = torch.randn(5, 2, 8)
    angles = torch.randn(5, 4)
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones(5, 4), angles)[:, None]
    found = turn(x, torch.stack((angles.cos(), angles.sin())))
    assert torch.allclose(found, torch.cat((turned.real, turned.imag), -1), atol=1e-6)
    assert turn(x.bfloat16(), torch.stack((angles.cos(), angles.sin()))).dtype == torch.bfloat16


def kept(step) -> int:
    """Bytes that autograd keeps for the backward of what `step` returns, parameters left out."""
    sizes = {}

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            sizes[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(sizes.values())


def test_layers_with_a_backward_of_their_own():
    """The gradients of torch's own, and less kept for them."""
    a, b = (torch.randn(4, 5, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(GatedSilu.apply, (a, b))
    norm = RMSNorm(16, 1e-6, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(a), F.rms_norm(a, (16,), norm.weight, 1e-6), rtol=1e-15, atol=0)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)), (a, norm.weight)
    )
    x = torch.randn(1024, 16, dtype=torch.bfloat16, requires_grad=True)
    assert kept(lambda: norm.float()(x)) == 1024 * (16 * 2 + 4)
    assert kept(lambda: GatedSilu.apply(x, x + 1)) == 2 * x.nbytes
    assert norm(x[:0]).shape == (0, 16)


PARTS = (3, (1, 4, 6), (2, 2, 4), 4, (1, 2, 2), (3, 6, 4), 2)


def count_runs(model) -> dict[str, int]:
    """Counts from now on how often the tower, its first layer and its attention run."""
    runs = {"tower": 0, "layer": 0, "attention": 0}

    def add(name, *_):
        runs[name] += 1

    model.visual.register_forward_pre_hook(partial(add, "tower"))
    model.visual.blocks[0].register_forward_pre_hook(partial(add, "layer"))

    def attention(*args):
        add("attention")
        return core(*args)

    model.visual.core = attention
    return runs


@pytest.mark.parametrize("parts", [PARTS, (5,), ((1, 2, 2), *([(1, 4, 4)] * 30), 3)])
def test_the_tower_runs_once(parts, tiny_chat, talk):
    """With images and videos together, and without any; its attention is called a few times a layer."""
    model = tiny_chat()
    runs = count_runs(model)
    one = talk(model.config, *parts)
    model(**one.inputs, labels=one.labels).sum().backward()
    assert (runs["tower"], runs["layer"]) == (1, 1)
    assert runs["attention"] <= MOST_CALLS * model.config.vision_layers


@pytest.mark.parametrize("without", [{"pixel_values": None, "grid_thw": None}, {"pixel_values": torch.zeros(0, 96)}])
def test_without_images_gradients_of_the_tower_are_zero(without, tiny_chat, talk):
    """Zero, and not None: so ranks with and without images reduce the same gradients."""
    model = tiny_chat()
    one = talk(model.config, 6)
    model(**one.inputs | without, labels=one.labels).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() != name.startswith("visual."), name


def test_a_frozen_tower_keeps_nothing(tiny_chat, talk):
    """Nothing of it is saved for the backward: with the merger no more than an embedding, without it the merger's."""
    model = tiny_chat()
    one = talk(model.config, *PARTS)
    grids = one.grid_thw

    def saved() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            features = model.visual(one.pixel_values, grids)
        return sum(sizes) if features.requires_grad else 0

    whole = saved()
    model.visual.patch_embed.requires_grad_(False)
    model.visual.blocks.requires_grad_(False)
    merger = saved()
    assert 0 < merger < whole / 5
    model.visual.merger.requires_grad_(False)
    assert saved() == 0
    model(**one.inputs, labels=one.labels).sum().backward()
    assert all((p.grad is None) == name.startswith("visual.") for name, p in model.named_parameters())


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("segments", [None, (0,), (0, 0)])
def test_an_empty_pack(segments, labels, tiny_chat):
    """No token, no patch: the model runs, forward and backward, and every gradient is zero."""
    model = tiny_chat()
    runs = count_runs(model)
    nothing = torch.zeros(1, 0, dtype=torch.long)
    sequence = segments and Sequence(0, causal=True, segments=segments)
    more = {"labels": nothing} if labels else {}
    out = model(nothing, nothing.expand(3, 1, 0), torch.zeros(0, 96), torch.zeros(0, 3), sequence, **more)
    assert out.shape == ((1, 0) if labels else (1, 0, model.config.vocab_size))
    out.sum().backward()
    assert runs["tower"] == 1
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_neighbour_in_the_pack_changes_nothing(tiny_chat, talk):
    """Not a bit of the others' losses, in a pack of equal lengths."""
    model = tiny_chat()
    talks = [talk(model.config, 4, (1, 4, 6), 3, seed=seed) for seed in range(4)]

    def losses(*numbers: int) -> Tensor:
        chosen = [talks[number] for number in numbers]
        length = talks[0].input_ids.shape[1]
        return model(
            torch.cat([one.input_ids for one in chosen], 1),
            torch.cat([one.position_ids for one in chosen], 2),
            torch.cat([one.pixel_values for one in chosen]),
            tuple(grid for one in chosen for grid in one.grid_thw),
            Sequence(3 * length, causal=True, segments=tuple(range(0, 3 * length + 1, length))),
            torch.cat([one.labels for one in chosen], 1),
        ).view(3, length)

    one, other = losses(0, 1, 2), losses(0, 3, 2)
    assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert not torch.equal(one[1], other[1])


def test_every_input_matters(tiny_chat, talk):
    model = tiny_chat()
    one = talk(model.config, *PARTS)
    expected = model(**one.inputs)
    changed = {
        "input_ids": one.input_ids.where(one.input_ids >= 256, 0),
        "position_ids": torch.zeros_like(one.position_ids),
        "pixel_values": torch.zeros_like(one.pixel_values),
    }
    changed |= {str(axis): one.position_ids.index_fill(0, torch.tensor(axis), 0) for axis in range(3)}
    for name, value in changed.items():
        key = "position_ids" if name.isdigit() else name
        assert not torch.allclose(model(**one.inputs | {key: value}), expected, atol=1e-3), name
    turned = tuple((frames, columns, rows) for frames, rows, columns in one.grid_thw)
    assert not torch.allclose(model(**one.inputs | {"grid_thw": turned}), expected, atol=1e-3)
    assert torch.equal(model(**one.inputs | {"grid_thw": torch.tensor(one.grid_thw)}), expected)


def test_nothing_after_a_token_matters(tiny_chat, talk):
    model = tiny_chat()
    one = talk(model.config, *PARTS)
    changed = one.input_ids.clone()
    changed[0, -1] = 7
    assert torch.equal(model(**one.inputs)[:, :-1], model(**one.inputs | {"input_ids": changed})[:, :-1])


@pytest.mark.parametrize("grids", ["facts", "a tensor"])
def test_shapes_without_values(grids, tiny_chat, talk):
    """On the meta device, where a pipeline asks what crosses between its stages."""
    model = tiny_chat()
    one = talk(model.config, *PARTS)
    tensors = {name: x.to("meta") for name, x in one.inputs.items() if isinstance(x, Tensor)}
    grid_thw = one.grid_thw if grids == "facts" else torch.tensor(one.grid_thw, device="meta")
    stream = model.to("meta").stem(**tensors, grid_thw=grid_thw, labels=one.labels.to("meta"))
    length = one.input_ids.shape[1]
    assert stream.x.shape == (1, length, 48)
    assert (stream.rope.shape, stream.labels.shape) == ((2, 1, length, 4), (1, length))
    assert model.layer(1, stream).x.shape == stream.x.shape


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"input_ids": torch.zeros(4, dtype=torch.long)},
            r"input_ids has shape \(4,\) of torch.int64, but must be B L",
        ),
        ({"input_ids": torch.zeros(1, 15)}, "of torch.float32, but must be B L, whole numbers"),
        ({"position_ids": torch.zeros(1, 15, dtype=torch.long)}, r"position_ids has .* must be \(3, 1, 15\)"),
        ({"labels": torch.zeros(1, 14, dtype=torch.long)}, r"labels has shape \(1, 14\) .* must be \(1, 15\)"),
        ({"pixel_values": torch.zeros(24, 97)}, "pixel_values has shape .* must be N 96, patches of 3 channels, 2 fra"),
        ({"pixel_values": torch.zeros(20, 96)}, "pixel_values has 20 patches, but the 1 rows of grid_thw make 24"),
        ({"pixel_values": None}, "pixel_values has 0 patches, but the 1 rows of grid_thw make 24"),
        ({"grid_thw": ((1, 4, 5),)}, r"grid_thw\[0\] is \(1, 4, 5\)"),
        ({"grid_thw": ((1, 4, 4),), "pixel_values": torch.zeros(16, 96)}, "has 6 tokens of images .* makes 4 features"),
        ({"sequence": Sequence(14, causal=True)}, "sequence has 14 tokens in segments that go from 0 to 14"),
        ({"sequence": Sequence(15, True, (0, 4, 12))}, "from 0 to 12, but input_ids has 15 tokens in a row"),
    ],
)
def test_what_does_not_fit_is_named(change, said, tiny_chat, talk):
    model = tiny_chat()
    one = talk(model.config, 3, (1, 4, 6), 4)
    with pytest.raises(ValueError, match=said):
        model(**one.inputs | {"labels": one.labels} | change)


@pytest.mark.parametrize("field", [field.name for field in fields(TINY)])
def test_a_field_that_cannot_be_is_named(field):
    for value in ("x", -1, [1.5], {}, float("nan"), ["a"], None, [True, 2, 3]):
        with pytest.raises(ValueError, match=f"^{field}"):
            replace(TINY, **{field: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_heads": 7}, "dim 64 over 7 heads"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3, but must divide num_heads, 4"),
        ({"mrope_section": (2, 3, 4)}, "must be three numbers whose sum is 8: half the 16 channels of a head"),
        ({"mrope_section": (4, 4)}, "must be three numbers"),
        ({"vision_heads": 5}, "vision_dim 64 over 5 heads"),
        ({"full_attention_layers": (3, 1)}, "must be layers of the tower"),
        ({"full_attention_layers": (4,)}, r"must be layers of the tower \(0 … 3\)"),
        ({"window_size": 100}, "window_size is 100, but must be a multiple of 28"),
        ({"image_token": 288}, "image_token is 288, but the vocabulary ends at 287"),
        ({"video_token": TINY.image_token}, "are both 268, but must differ"),
    ],
)
def test_sizes_that_do_not_fit_each_other(change, said):
    with pytest.raises(ValueError, match=said):
        replace(TINY, **change)
    assert replace(TINY, mrope_section=[2, 3, 3]) == TINY


def test_adapters(tiny_chat, talk):
    """On linears of any part; at the head one would not be computed, so it is refused."""
    pytest.importorskip("peft")
    model = add_lora(tiny_chat(), LoRAConfig(2, targets=("q_proj", "mlp.up_proj", "attn.qkv", "merger.mlp.2")))
    one = talk(model.config, *PARTS)
    model(**one.inputs, labels=one.labels).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * (2 + 5 + 3 + 1)
    assert all(".lora_" in name for name in trained)
    with pytest.raises(ValueError, match="the model multiplies by its weight itself"):
        add_lora(tiny_chat(), LoRAConfig(2, targets=("lm_head",)))


def test_from_scratch():
    model = build("qwen2.5-vl-tiny")
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            assert abs(weight.std() - 0.02) < 2e-3, name
    draw = initial("model.layers.0.mlp.up_proj.weight", (4, 3), 7)
    assert torch.equal(draw, initial("model.layers.0.mlp.up_proj.weight", (4, 3), 7))
    assert not torch.equal(draw, initial("model.layers.1.mlp.up_proj.weight", (4, 3), 7))
