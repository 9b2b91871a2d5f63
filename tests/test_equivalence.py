"""Every family of mm_models, cut in every way: the numbers of one device. A new family is one more entry."""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from math import prod

import peft  # noqa: F401 (here, so that ranks are forked with it)
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mm_models import build, plan
from mm_models.families import FAMILIES, family_of
from mm_models.layers import Sequence
from mm_models.lora import LoRAConfig, add_lora
from mm_models.qwen2_5_vl import positions
from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    Pipeline,
    clip_grad_norm,
    data_rank,
    finish_gradients,
    forward_backward,
    make_mesh,
    parallelize,
)
from mm_parallel.estimate import Units
from mm_parallel.estimate.collectives import count_sends
from mm_parallel.estimate.kernels import FORMULAS
from mm_parallel.mesh import AXES, rank_in
from mm_parallel.testing import assert_same_grads, gradients, spawn
from mm_parallel.testing.equivalence import SAMPLES, Case, Subject, check, combine, every_case
from mm_parallel.testing.sent import by_axes, count_sent

WAN = {"dim": 48, "ffn_dim": 80, "num_heads": 4, "num_layers": 4, "text_dim": 16, "text_tokens": 8}
OPENSORAPLAN = {"dim": 48, "ffn_dim": 80, "num_heads": 4, "num_layers": 4, "text_dim": 16}
QWEN = {"dim": 32, "ffn_dim": 48, "mrope_section": (2, 1, 1), "patch_size": 2, "window_size": 8}
QWEN |= {"vision_dim": 32, "vision_ffn_dim": 24, "vision_layers": 2, "full_attention_layers": (1,)}
IMAGE = {"in_channels": 36, "image_dim": 24, "image_tokens": 257}


def filled(model: nn.Module) -> nn.Module:
    """Not the published initialisation, whose zeros would hide gradients."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.15 * values + name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight"))
    return model


def wan() -> nn.Module:
    return filled(build("wan-tiny", dtype=torch.float64, **WAN))


def wan_image() -> nn.Module:
    return filled(build("wan-tiny", dtype=torch.float64, **WAN, **IMAGE))


def vace() -> nn.Module:
    """Layer 2 has no control block."""
    return filled(build("wan-tiny-vace", dtype=torch.float64, **WAN, vace_layers=(0, 1, 3)))


def vace_on_frozen() -> nn.Module:
    model = vace()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("vace_")
    return model


def wan_lora() -> nn.Module:
    return filled(add_lora(build("wan-tiny", dtype=torch.float64, **WAN), LoRAConfig(rank=3, alpha=6)))


def opensoraplan() -> nn.Module:
    return filled(build("opensoraplan-tiny", dtype=torch.float64, **OPENSORAPLAN))


def qwen() -> nn.Module:
    return filled(build("qwen2.5-vl-tiny", dtype=torch.float64, **QWEN))


def qwen_tied() -> nn.Module:
    return filled(build("qwen2.5-vl-tiny", dtype=torch.float64, **QWEN, tied=True))


def qwen_lora() -> nn.Module:
    """Adapters in the language model; all else is frozen, the vision tower too."""
    return filled(add_lora(qwen(), LoRAConfig(rank=3, alpha=6)))


def videos(**more: tuple[int, ...]) -> dict[str, Tensor]:
    """3 x 3 x 1 tokens: no number of ranks divides them."""
    channels = 36 if "image" in more else 16
    shapes = {"video": (channels, 3, 6, 2), "text": (5, 16), "target": (16, 3, 6, 2), **more}
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: torch.randn((SAMPLES, *shape), generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    return drawn | {"t": torch.linspace(3, 999, SAMPLES)}


def images() -> dict[str, Tensor]:
    return videos(image=(257, 24))


def controlled() -> dict[str, Tensor]:
    return videos(control=(96, 3, 6, 2))


def small_videos() -> dict[str, Tensor]:
    """3 x 3 x 1 tokens of four channels, and text without a mask."""
    batch = videos()
    return batch | {name: batch[name][:, :4].contiguous() for name in ("video", "target")}


def padded_videos() -> dict[str, Tensor]:
    """Each sample has text and a video of another size, some of which only a part of the ranks holds."""
    batch = small_videos()
    text, video = torch.ones(SAMPLES, 5).bool(), torch.ones(SAMPLES, 3, 6, 2).bool()
    for sample in range(SAMPLES):
        text[sample, 1 + sample % 5 :] = False
        video[sample, 1 + sample % 3 :] = False
        video[sample, :, 6 - sample % 5 :] = False
    return batch | {"text_mask": text, "video_mask": video}


def from_first_frame() -> dict[str, Tensor]:
    """A timestep per token: the three of the first latent frame are clean."""
    batch = videos()
    t = batch["t"][:, None].repeat(1, 9)
    t[:, :3] = 0
    return batch | {"t": t}


GRIDS = [[(1, 4, 4)], [], [(1, 2, 6), (1, 4, 2)], [(2, 4, 4)], [], [(1, 4, 8)], [], []]  # of each conversation
TEXT = (5, 9, 3, 2, 7, 2, 6, 4)  # tokens besides
LONGEST = 12
ROWS = ("input_ids", "labels", "position_ids")


def conversations() -> dict:
    """Text and images, a video in the fourth. The fifth has no labels, and the last two, which are a pack where
    conversations go by twos, no image.
    """
    config, generator = qwen().config, torch.Generator().manual_seed(1)
    drawn = []
    for number, (grids, text) in enumerate(zip(GRIDS, TEXT, strict=True)):
        ids = torch.randint(256, (text,), generator=generator)
        for grid in grids:  # between two words
            token = config.video_token if grid[0] > 1 else config.image_token
            ids = torch.cat((ids[:1], torch.full((prod(grid) // 4,), token), ids[1:]))
        labels = torch.cat((ids[1:], torch.tensor([config.eos_token])))
        labels[(labels >= config.image_token) | (torch.rand(len(ids), generator=generator) < 0.2)] = -100
        drawn.append(
            {
                "input_ids": ids,
                "labels": torch.full_like(labels, -100) if number == 4 else labels,
                "position_ids": positions(ids, grids, [0.5] * (number == 3), config=config),
                "pixel_values": torch.randn(sum(map(prod, grids)), 24, generator=generator, dtype=torch.float64),
                "grid_thw": tuple(grids),
            }
        )
    return {"conversations": drawn}


def pack(batch: dict, samples: slice, weight: Tensor) -> tuple[dict, Callable[[Tensor], Tensor]]:
    """Conversations in one row, padded as a pipeline needs it, with the summed losses of their tokens."""
    own, nothing = batch["conversations"][samples], batch["conversations"][0]
    lengths = [len(one["labels"]) for one in own]
    padding = LONGEST * len(own) - sum(lengths)
    parts = {name: [nothing[name][..., :0], *(one[name] for one in own)] for name in ROWS}
    whole = {name: torch.cat(part, -1) for name, part in parts.items()}
    whole |= {name: F.pad(whole[name], (0, padding), value=-100 * (name == "labels")) for name in ROWS}
    ends = tuple(accumulate([*lengths, padding] if own else [], initial=0))
    inputs = {
        "pixel_values": torch.cat([nothing["pixel_values"][:0], *(one["pixel_values"] for one in own)]),
        "grid_thw": tuple(grid for one in own for grid in one["grid_thw"]),
        "input_ids": whole["input_ids"][None],
        "labels": whole["labels"][None],
        "position_ids": whole["position_ids"][:, None],
        "sequence": Sequence(ends[-1], causal=True, segments=ends),
    }
    counts = torch.cat([weight, weight.new_zeros(1)]).repeat_interleave(torch.tensor([*lengths, padding]))
    return inputs, lambda output: (counts * output).sum(1)


SUBJECTS = {
    "wan": Subject(wan, plan, videos),
    "wan-image": Subject(wan_image, plan, images),
    "wan-lora": Subject(wan_lora, plan, videos),
    "wan-per-token": Subject(wan, plan, from_first_frame),
    "vace": Subject(vace, plan, controlled),
    "vace-on-frozen": Subject(vace_on_frozen, plan, controlled),
    "opensoraplan": Subject(opensoraplan, plan, small_videos),
    "opensoraplan-masked": Subject(opensoraplan, plan, padded_videos),
    "qwen2.5-vl": Subject(qwen, plan, conversations, pack),
    "qwen2.5-vl-layouts": Subject(qwen, plan, conversations, pack),
    "qwen2.5-vl-tied": Subject(qwen_tied, plan, conversations, pack),
    "qwen2.5-vl-lora": Subject(qwen_lora, plan, conversations, pack),
}
SEED = int(os.environ.get("RANDOM_SEED", 0))


def cases_of(number: int, all_of: int, larger: int) -> dict[int, list[Case]]:
    """Of the subject with that number. A scheduled workflow asks for many more `larger` sets, others each time."""
    return every_case(SEED + number, int(os.environ.get("RANDOM_LAYOUTS", larger)), all_of)


def chosen(*sets: str) -> dict[int, list[Case]]:
    """Cases with these features."""
    by_ranks: dict[int, list[Case]] = {}
    for names in sets:
        case = combine(names.split("+"))
        by_ranks.setdefault(case.ranks, []).append(case)
    return by_ranks


CASES = {
    "wan": cases_of(1, all_of=1, larger=2),  # every pair is tried on the toy ladder
    "wan-image": cases_of(2, all_of=0, larger=2),
    "wan-lora": cases_of(3, all_of=1, larger=1),
    "wan-per-token": cases_of(4, all_of=0, larger=1),
    "vace": cases_of(5, all_of=1, larger=2),
    "vace-on-frozen": cases_of(6, all_of=0, larger=2),
    "opensoraplan": cases_of(7, all_of=0, larger=1),
    "opensoraplan-masked": cases_of(8, all_of=1, larger=2),
    "qwen2.5-vl": cases_of(9, all_of=1, larger=2),
    "qwen2.5-vl-layouts": chosen("ring+ulysses+but-attention", "copies+tensor+recompute", "zero-bubble+ulysses"),
    "qwen2.5-vl-tied": chosen("ulysses+tensor+recompute", "shards+tensor+accumulate"),  # a pipeline refuses it
    "qwen2.5-vl-lora": chosen("shards+tensor", "ring+shards+offload-attention", "virtual+shards+recompute"),
}
CHUNK = 10


def compare(rank: int, world: int, name: str, cases: list[Case]) -> None:
    check(rank, world, SUBJECTS[name], cases)


@pytest.mark.parametrize(
    ("name", "world", "first"),
    [
        (name, world, first)
        for name, by_ranks in CASES.items()
        for world, cases in sorted(by_ranks.items())
        for first in range(0, len(cases), CHUNK)
    ],
)
def test_as_on_one_device(name, world, first):
    cases = CASES[name][world][first : first + CHUNK]
    if world == 1:
        check(0, 1, SUBJECTS[name], cases)
    else:
        spawn(world, compare, name, cases, timeout=180)


COMPILED = {  # operations as traced; layouts of the toy ladder are in mm-parallel's test_compile.py
    "wan-lora": ["shards+but-attention"],
    "vace-on-frozen": ["ring+offload-attention"],
    "qwen2.5-vl": ["tensor+but-attention"],
    "wan-image": ["recompute"],
    "wan-per-token": ["but-attention"],
}
INDUCTOR = ("wan", "opensoraplan-masked", "qwen2.5-vl")  # a family each, as it takes many seconds of a compiler


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_as_on_one_device(name):
    ((world, cases),) = chosen(*COMPILED[name]).items()
    cases = [replace(case, compile="aot_eager", steps=1) for case in cases]
    if world == 1:
        torch._dynamo.reset()
        check(0, 1, SUBJECTS[name], cases)
    else:
        spawn(world, compare, name, cases, timeout=180)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Kernels of this session, and none that lie there from before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.mark.parametrize("name", INDUCTOR)
def test_kernels_give_every_gradient(name, kernels):
    if name != "qwen2.5-vl" and torch.__version__ < "2.13":
        pytest.skip("an older Inductor takes the attention of diffusion in float64 for float32, and ends with an error")
    check(0, 1, SUBJECTS[name], [Case(name, compile=True, steps=1)])


def test_every_family_is_cut():
    built = {family_of(subject.build().config).name for subject in SUBJECTS.values()}
    assert built == {family.name for family in FAMILIES}
    assert CASES.keys() == SUBJECTS.keys()


def uneven(rank: int, world: int, layouts: list[tuple[dict, MemoryConfig, bool]]) -> None:
    """In the first micro-batch one data rank has no conversation, in the second one has no image."""
    batch, weight = conversations(), torch.linspace(1, 2, SAMPLES, dtype=torch.float64)
    packs = [[pack(batch, part, weight[part]) for part in (slice(0, 3), slice(3, 3))]]
    packs += [[pack(batch, part, weight[part]) for part in (slice(6, 8), slice(3, 6))]]
    for layout, memory, frozen in layouts:
        mesh = make_mesh(ParallelConfig(**layout), "cpu")
        index, _ = data_rank(mesh)
        single, model = qwen(), qwen()
        for one in (single, model):
            one.visual.requires_grad_(not frozen)
        parallelize(model, plan(model), mesh, ParallelConfig(**layout), memory)
        for inputs, losses in packs[0] + packs[1]:
            (losses(single(**inputs)).sum() / 7).backward()
        own = [both[index] for both in packs]
        found = forward_backward(model, 2, lambda i, own=own: own[i][0], lambda y, i, own=own: own[i][1](y), 7, mesh)
        assert index == 0 or float(found[0]) == 0
        finish_gradients(model, mesh)
        assert_same_grads(gradients(model), gradients(single), 1e-10)


@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (
            2,
            [
                ({}, MemoryConfig(), False),
                ({}, MemoryConfig("but_attention", offload="attention", prefetch=2), True),
                ({"dp_shard": 1, "dp_replicate": 2}, MemoryConfig("full", offload="inputs"), False),
                ({}, MemoryConfig(2, but_attention=1, reshard=False), False),
            ],
        ),
        (
            4,
            [
                ({"tp": 2}, MemoryConfig("full"), False),
                ({"ring": 2}, MemoryConfig("but_attention"), False),
                ({"ulysses": 2}, MemoryConfig("full", offload="inputs"), True),
            ],
        ),
    ],
)
def test_ranks_without_conversations_or_images(world, layouts):
    spawn(world, uneven, layouts)


def refused(rank: int, world: int) -> None:
    for make, parallel, message in (
        (qwen, ParallelConfig(tp=4), "2 key-value heads cannot be cut over tp=4: for this model tp can be 1, 2"),
        (
            qwen_tied,
            ParallelConfig(pp_layers=(1, 1, 1, 1)),
            "a tied head: model.embed_tokens is used by the first",
        ),
    ):
        model, mesh = make(), make_mesh(parallel, "cpu")
        cut = Pipeline if parallel.pp > 1 else parallelize
        with pytest.raises(ValueError, match=message):
            cut(model, plan(model), mesh, parallel)


def test_what_a_plan_forbids_is_refused_with_numbers():
    spawn(4, refused)


def first_samples(name: str, count: int) -> tuple[dict, Callable[[Tensor], Tensor]]:
    """A micro-batch, in which every token has a label: what is estimated without values takes them so."""
    batch = SUBJECTS[name].batch()
    for one in batch.get("conversations", ()):
        one["labels"] = one["labels"].clamp(min=0)
    inputs, losses = SUBJECTS[name].take(batch, slice(0, count), torch.ones(count, dtype=torch.float64))
    if "labels" in inputs:
        inputs["labels"] = inputs["labels"].clamp(min=0)
    return inputs, losses


def traced(name: str, count: int) -> Units:
    """Its units, without values."""
    model = SUBJECTS[name].build().to("meta")
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), first_samples(name, count)[0])
    return Units(model, plan(model), None, inputs)


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != "qwen2.5-vl-layouts"])
def test_kernels_have_the_flops_that_torch_counts(name):
    model, (inputs, _) = SUBJECTS[name].build(), first_samples(name, 2)
    # plain attention leaves out the gradient of frozen keys, which no kernel does
    plain = all(parameter.requires_grad for parameter in model.parameters())
    backend, formulas = (SDPBackend.MATH, None) if plain else (SDPBackend.FLASH_ATTENTION, FORMULAS)
    with sdpa_kernel(backend), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(**inputs).square().sum().backward()
    units = traced(name, 2)
    words = {layer: "none" for layers in units.layers.values() for layer in layers}
    traces = units.trace(ParallelConfig().resolve(1), words).units.values()
    kernels = [kernel for trace in traces for kernel in (*trace.kernels, *trace.backward_kernels)]
    # plain attention keeps the scores; a kernel makes them again, the fifth product of its backward
    again = sum(k.flops for k in kernels if k.kind == "attention" and k.op.endswith("backward")) // 5
    assert again > 0
    assert sum(kernel.flops for kernel in kernels) - again * plain == counter.get_total_flops()


SENT = {  # on four ranks
    "wan-image": ["ulysses+tensor+recompute", "pipeline+shards"],
    "wan-lora": ["copies+tensor", "ring+shards+but-attention"],
    "vace-on-frozen": ["ring+ulysses+but-attention", "shards+copies+keep-gathered"],
    "opensoraplan-masked": ["ring+tensor+but-attention", "virtual+ulysses+recompute"],
    "qwen2.5-vl": ["ulysses+tensor+recompute", "zero-bubble+shards"],
    "qwen2.5-vl-lora": ["ring+ulysses+prefetch", "virtual+shards"],
}


def send(rank: int, world: int, name: str, cases: list[Case]) -> list:
    found = []
    inputs, losses = first_samples(name, 2)
    for case in cases:
        mesh = make_mesh(case.parallel, "cpu")
        model = SUBJECTS[name].build()
        cut = (plan(model), mesh, case.parallel, case.memory)
        run = Pipeline(model, *cut) if case.parallel.pp > 1 else parallelize(model, *cut)
        for _ in range(2):  # in a first step FSDP finds out what follows what
            with count_sent(mesh) as sent:
                forward_backward(run, 2, lambda _: inputs, lambda output, _: losses(output), 7, mesh)
                finish_gradients(model, mesh)
                clip_grad_norm(model, 1.0, mesh)
        found.append((rank_in(mesh, "pp"), any(rank_in(mesh, axis) for axis in AXES[1:]), sent))
    return found


@pytest.mark.parametrize("name", SENT)
def test_ranks_send_what_is_estimated(name):
    cases = chosen(*SENT[name])[4]
    ranks, units = spawn(4, send, name, cases, timeout=180), traced(name, 2)
    for case, found in zip(cases, zip(*ranks, strict=True), strict=True):
        layout = case.parallel.resolve(4)
        expected = [by_axes(sends, layout) for sends in count_sends(units, layout, case.memory, 2)]
        seen = {stage: by_axes(sent, layout) for stage, elsewhere, sent in found if not elsewhere}
        assert seen == dict(enumerate(expected)), case.name
