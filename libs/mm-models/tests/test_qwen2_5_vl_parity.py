"""Qwen2.5-VL against transformers' class: logits, loss and every gradient, whatever a conversation is made of.

The oracle is always told the positions: transformers 5.3 and later have another rule for what follows a video.
"""

from itertools import chain, pairwise

import pytest
import torch
from torch import Tensor

from mm_models import build
from mm_models.layers import Sequence
from mm_models.qwen2_5_vl import Qwen25VLConfig, Qwen25VLModel

transformers = pytest.importorskip("transformers")

TALKS = {
    "text": [(11,), (7,)],
    "image": [(3, (1, 10, 6), 5)],  # windows of 2 x 2 tokens: neither 5 rows nor 3 columns are whole
    "aligned": [(3, (1, 8, 4), 5)],
    "tall": [(2, (1, 22, 2), 3)],
    "video": [(2, (3, 6, 4), 6)],
    "many": [(2, (1, 4, 6), (1, 4, 6), 3, (2, 2, 4), (1, 2, 2), 2, (3, 4, 4), 4, (1, 14, 10), 1)],
    "first": [((2, 4, 2), (1, 2, 6), 4)],
    "batch": [(3, (1, 4, 6), 5), (9,), (2, (2, 2, 6), 1, (1, 2, 2), 3)],
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp(min=1e-12))


def oracle_name(name: str) -> str:
    """In memory transformers calls its tensors otherwise than in files."""
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return f"model.{name}" if name.startswith("visual.") else name


def build_oracle(c: Qwen25VLConfig):
    """transformers' model of the same shape."""
    rope = {"rope_type": "default", "rope_theta": c.rope_theta, "mrope_section": list(c.mrope_section)}
    text = {
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.eps,
        "tie_word_embeddings": c.tied,
        "rope_parameters": rope,
    }
    vision = {
        "depth": c.vision_layers,
        "hidden_size": c.vision_dim,
        "intermediate_size": c.vision_ffn_dim,
        "num_heads": c.vision_heads,
        "out_hidden_size": c.dim,
        "patch_size": c.patch_size,
        "window_size": c.window_size,
        "fullatt_block_indexes": list(c.full_attention_layers),
        "tokens_per_second": c.tokens_per_second,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=c.image_token,
        video_token_id=c.video_token,
        vision_start_token_id=c.vision_start_token,
        vision_end_token_id=c.vision_end_token,
        tie_word_embeddings=c.tied,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def oracle(model: Qwen25VLModel):
    """The same with the same weights."""
    other = build_oracle(model.config)
    weights = {oracle_name(name): weight for name, weight in model.state_dict().items()}
    absent, extra = other.load_state_dict(weights, strict=False)
    assert (absent, extra) == (["lm_head.weight"] if model.config.tied else [], [])
    other.tie_weights()
    return other


def together(talks: list) -> tuple[dict, Tensor, Tensor]:
    """Inputs of a batch, padded on the right; labels; which tokens are no padding."""
    longest = max(talk.input_ids.shape[1] for talk in talks)

    def pad(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, longest - x.shape[-1]), value=value)

    inputs = {
        "input_ids": torch.cat([pad(talk.input_ids, 0) for talk in talks]),
        "position_ids": torch.cat([pad(talk.position_ids, 1) for talk in talks], 1),
        "pixel_values": torch.cat([talk.pixel_values for talk in talks]),
        "grid_thw": tuple(grid for talk in talks for grid in talk.grid_thw),
    }
    real = torch.cat([pad(torch.ones_like(talk.input_ids), 0) for talk in talks]).bool()
    return inputs, torch.cat([pad(talk.labels, -100) for talk in talks]), real


def ask(other, inputs: dict, talks: list, real: Tensor | None = None) -> Tensor:
    """The oracle's logits. It takes images and videos apart, each in the order of their tokens."""
    grids = torch.tensor(inputs["grid_thw"], dtype=torch.long).reshape(-1, 3)
    videos = torch.tensor([video for talk in talks for video in talk.videos], dtype=torch.bool)
    of_patch = videos.repeat_interleave(grids.prod(1))
    named = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"]}
    if (~videos).any():
        named |= {"pixel_values": inputs["pixel_values"][~of_patch], "image_grid_thw": grids[~videos]}
    if videos.any():
        named |= {"pixel_values_videos": inputs["pixel_values"][of_patch], "video_grid_thw": grids[videos]}
    return other(**named, attention_mask=None if real is None else real.long(), use_cache=False).logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def assert_same_gradients(ours, other, tolerance: float) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = theirs[oracle_name(name)].grad
        if expected is None:  # the oracle leaves its tower out where there is no image
            assert name.startswith("visual."), name
            assert not parameter.grad.any(), name
        else:
            assert relative(parameter.grad, expected) < tolerance, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", TALKS)
def test_logits_loss_and_gradients(case, tied, tiny_chat, talk):
    model = tiny_chat(tied=tied)
    other = oracle(model)
    talks = [talk(model.config, *parts, seed=seed) for seed, parts in enumerate(TALKS[case])]
    inputs, labels, real = together(talks)
    expected = ask(other, inputs, talks, real)
    assert relative(model(**inputs)[real], expected[real]) < 1e-6

    losses = model(**inputs, labels=labels)
    assert (losses.shape, losses.dtype) == (labels.shape, torch.float32)
    assert not losses[labels == -100].any()
    loss, theirs = losses.sum() / (labels != -100).sum(), cross_entropy(expected, labels)
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    loss.backward()
    theirs.backward()
    assert_same_gradients(model, other, 1e-5)


def test_a_pack_is_its_samples(tiny_chat, talk):
    """Logits and gradients of a pack equal the oracle's, which is given one conversation after the other."""
    model = tiny_chat()
    other = oracle(model)
    talks = [talk(model.config, *parts, seed=seed) for seed, parts in enumerate(chain(*TALKS.values()))]
    ends = [0]
    for one in talks:
        ends.append(ends[-1] + one.input_ids.shape[1])
    inputs = {
        "input_ids": torch.cat([one.input_ids for one in talks], 1),
        "position_ids": torch.cat([one.position_ids for one in talks], 2),
        "pixel_values": torch.cat([one.pixel_values for one in talks]),
        "grid_thw": torch.tensor([grid for one in talks for grid in one.grid_thw]),
        "sequence": Sequence(ends[-1], causal=True, segments=tuple(ends)),
    }
    labels = torch.cat([one.labels for one in talks], 1)
    losses, logits = model(**inputs, labels=labels), model(**inputs)
    losses.sum().backward()
    for one, (start, stop) in zip(talks, pairwise(ends), strict=True):
        expected = ask(other, one.inputs, [one])
        assert relative(logits[:, start:stop], expected) < 1e-6
        (cross_entropy(expected, one.labels) * (one.labels != -100).sum()).backward()
    assert_same_gradients(model, other, 1e-5)


def test_in_bfloat16(tiny_chat, talk):
    """As near to float32 as the oracle in bfloat16, with masters in float32 as well as without."""
    model = tiny_chat()
    one = talk(model.config, *TALKS["many"][0])
    exact = ask(oracle(model), one.inputs, [one])
    expected = ask(oracle(model).bfloat16(), one.inputs, [one])
    model.compute_dtype = torch.bfloat16
    ours = model(**one.inputs)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) < 1.1 * relative(expected, exact) < 0.05
    losses = model(**one.inputs, labels=one.labels)
    assert losses.dtype == torch.float32
    assert torch.equal(ours, model.bfloat16()(**one.inputs))


@pytest.mark.parametrize("size", ["3b", "72b"])
def test_the_released_shapes(size):
    """Names and shapes of the smallest, whose head is tied, and of the largest, but for the number of layers."""
    model = build(f"qwen2.5-vl-{size}", "meta", num_layers=1, vision_layers=1, full_attention_layers=())
    with torch.device("meta"):
        other = build_oracle(model.config)
    shapes = {oracle_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in other.state_dict().items()}
    if size == "3b":
        assert theirs.pop("lm_head.weight") == shapes["model.language_model.embed_tokens.weight"]
    assert shapes == theirs
