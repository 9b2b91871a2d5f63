"""Every family of mm_models, cut in every way: the numbers of one device. A new family is one more entry."""

import os
from collections.abc import Callable
from itertools import accumulate
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_models import build, plan
from mm_models.families import FAMILIES, family_of
from mm_models.layers import Sequence
from mm_models.lora import LoRAConfig, add_lora
from mm_models.qwen2_5_vl import positions
from mm_parallel.testing import spawn
from mm_parallel.testing.equivalence import SAMPLES, Case, Subject, check, every_case

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
                "grid_thw": torch.tensor(grids, dtype=torch.long).reshape(-1, 3),
            }
        )
    return {"conversations": drawn}


def pack(batch: dict, samples: slice, weight: Tensor) -> tuple[dict, Callable[[Tensor], Tensor]]:
    """Conversations in one row, padded as a pipeline needs it, with the summed losses of their tokens."""
    own = batch["conversations"][samples]
    lengths = [len(one["labels"]) for one in own]
    padding = LONGEST * len(own) - sum(lengths)
    rows = {name: torch.cat([one[name] for one in own], -1) for name in ("input_ids", "labels", "position_ids")}
    rows = {name: F.pad(row, (0, padding), value=-100 * (name == "labels")) for name, row in rows.items()}
    ends = tuple(accumulate([*lengths, padding], initial=0))
    inputs = {
        "input_ids": rows["input_ids"][None],
        "labels": rows["labels"][None],
        "position_ids": rows["position_ids"][:, None],
        "pixel_values": torch.cat([one["pixel_values"] for one in own]),
        "grid_thw": torch.cat([one["grid_thw"] for one in own]),
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
    "qwen2.5-vl-tied": Subject(qwen_tied, plan, conversations, pack),
    "qwen2.5-vl-lora": Subject(qwen_lora, plan, conversations, pack),
}
SEED = int(os.environ.get("RANDOM_SEED", 0))


def cases_of(number: int, all_of: int, larger: int) -> dict[int, list[Case]]:
    """Of the subject with that number. A scheduled workflow asks for many more `larger` sets, others each time."""
    return every_case(SEED + number, int(os.environ.get("RANDOM_LAYOUTS", larger)), all_of)


def without_pipeline(cases: dict[int, list[Case]]) -> dict[int, list[Case]]:
    """The tied head is on the first stage, and on the last; that is refused."""
    left = {world: [case for case in own if case.parallel.pp == 1] for world, own in cases.items()}
    return {world: own for world, own in left.items() if own}


CASES = {
    "wan": cases_of(1, all_of=1, larger=2),  # every pair is tried on the toy ladder
    "wan-image": cases_of(2, all_of=0, larger=2),
    "wan-lora": cases_of(3, all_of=1, larger=1),
    "wan-per-token": cases_of(4, all_of=0, larger=1),
    "vace": cases_of(5, all_of=1, larger=2),
    "vace-on-frozen": cases_of(6, all_of=0, larger=2),
    "opensoraplan": cases_of(7, all_of=0, larger=1),
    "opensoraplan-masked": cases_of(8, all_of=1, larger=2),
    "qwen2.5-vl": cases_of(9, all_of=1, larger=3),
    "qwen2.5-vl-tied": without_pipeline(cases_of(10, all_of=0, larger=3)),
    "qwen2.5-vl-lora": cases_of(11, all_of=0, larger=2),
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


def test_every_family_is_cut():
    built = {family_of(subject.build().config).name for subject in SUBJECTS.values()}
    assert built == {family.name for family in FAMILIES}
    assert CASES.keys() == SUBJECTS.keys()
