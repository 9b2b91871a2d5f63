"""Packed against padded batches of a mixture like LLaVA-Instruct: label tokens a second of the same Qwen2.5-VL.

    python docs/measure/qwen_packs.py             # some minutes on two cores, which should be idle
    python docs/measure/qwen_packs.py --step 32   # conversations of a step

Three ways train on the same conversations, in one process and in turns:

- packed: our model, on packs as training makes them (`mm_data.packing`), 4,096 tokens at most;
- padded, our model: batches of 8 as they come, padded on the right to their longest;
- padded, transformers: its class in a plain loop on the same batches.

A step is the sum over its label tokens over their number, all batches accumulated, so the losses must be the same. The
text of a conversation is log-normal around 150 tokens, one in 20 has 1,350; nine in ten have an image of 576 patches,
which is 144 tokens and two marks. Half of the text has a label. Nothing is read from files: this is the model alone.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from qwen_step import transformers_model
from torch import Tensor, nn

from mm_data.packing import plan
from mm_data.processing import Size
from mm_models import build
from mm_models.families import family_of
from mm_models.layers import Sequence
from mm_models.qwen2_5_vl import positions
from mm_parallel.device import device as find_device

SHAPE = {
    "dim": 320,
    "ffn_dim": 1280,
    "num_layers": 10,
    "num_heads": 5,
    "num_kv_heads": 1,
    "mrope_section": (8, 12, 12),
    "vocab_size": 8192,
    "vision_dim": 160,
    "vision_ffn_dim": 432,
    "vision_layers": 8,
    "vision_heads": 4,
    "full_attention_layers": (3, 7),
}
GRID = (1, 24, 24)
MAX_TOKENS = 4096
ROWS = 8


class Talk(NamedTuple):
    """A conversation: tokens, what each must predict (-100: nothing), positions 3 L, its image or none."""

    ids: Tensor
    labels: Tensor
    places: Tensor
    patches: Tensor
    grids: tuple[tuple[int, int, int], ...]


def make(count: int, config: Any) -> list[Talk]:
    random, torch_random = np.random.default_rng(0), torch.Generator().manual_seed(0)
    talks = []
    for _ in range(count):
        text = 1350 if random.random() < 0.05 else int(np.clip(random.lognormal(np.log(150), 0.6), 16, 1350))
        grids = (GRID,) if random.random() < 0.9 else ()
        image = [config.vision_start_token, *[config.image_token] * 144, config.vision_end_token] if grids else []
        words = random.integers(0, 256, text)
        ids = torch.tensor([*image, *words.tolist()])
        labels = torch.full_like(ids, -100)
        labels[-1 - text // 2 : -1] = ids[-(text // 2) :]
        patches = torch.randn(576 * len(grids), config.patch_dim, generator=torch_random)
        talks.append(Talk(ids, labels, positions(ids[None], grids, config=config)[:, 0], patches, grids))
    return talks


def pack(talks: list[Talk], weigh: Any) -> list[dict[str, Any]]:
    """The arguments of our model for each pack."""
    sizes = [Size(len(t.ids), len(t.patches), int((t.labels != -100).sum()), len(t.patches) ** 2) for t in talks]
    made = []
    for picks in plan(sizes, 1, MAX_TOKENS, 4 * MAX_TOKENS, weigh)[0]:
        chosen = [talks[i] for i in picks]
        ends = np.cumsum([len(talk.ids) for talk in chosen]).tolist()
        made.append(
            {
                "input_ids": torch.cat([talk.ids for talk in chosen])[None],
                "position_ids": torch.cat([talk.places for talk in chosen], 1)[:, None],
                "pixel_values": torch.cat([talk.patches for talk in chosen]),
                "grid_thw": tuple(grid for talk in chosen for grid in talk.grids),
                "sequence": Sequence(ends[-1], causal=True, segments=(0, *ends)),
                "labels": torch.cat([talk.labels for talk in chosen])[None],
            }
        )
    return made


def pad(talks: list[Talk]) -> list[dict[str, Any]]:
    """The arguments of our model for each batch; of padding, tokens are 0 and labels -100."""
    made = []
    for first in range(0, len(talks), ROWS):
        chosen = talks[first : first + ROWS]
        longest = max(len(talk.ids) for talk in chosen)

        def fill(row: Tensor, value: int, longest: int = longest) -> Tensor:
            return nn.functional.pad(row, (0, longest - row.shape[-1]), value=value)

        made.append(
            {
                "input_ids": torch.stack([fill(talk.ids, 0) for talk in chosen]),
                "position_ids": torch.stack([fill(talk.places, 0) for talk in chosen], 1),
                "pixel_values": torch.cat([talk.patches for talk in chosen]),
                "grid_thw": tuple(grid for talk in chosen for grid in talk.grids),
                "labels": torch.stack([fill(talk.labels, -100) for talk in chosen]),
                "lengths": [len(talk.ids) for talk in chosen],
            }
        )
    return made


def losses_of_ours(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(**{name: value for name, value in batch.items() if name != "lengths"}).sum()


def losses_of_transformers(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Its own loss, which it takes the mean of, by the number of labels."""
    labels = batch["labels"]
    mask = torch.arange(labels.shape[1], device=labels.device) < torch.tensor(batch["lengths"])[:, None].to(labels)
    found = model(
        input_ids=batch["input_ids"],
        attention_mask=mask.long(),
        position_ids=batch["position_ids"],
        labels=nn.functional.pad(labels[:, :-1], (1, 0), value=-100),
        pixel_values=batch["pixel_values"],
        image_grid_thw=torch.tensor(batch["grid_thw"], device=labels.device),
        use_cache=False,
    )
    return found.loss * (labels != -100).sum()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2)
    asked = parser.parse_args()
    device = find_device()
    clock = time.process_time if device.type == "cpu" else time.perf_counter  # others use this machine, too
    talks = make(asked.step, build("qwen2.5-vl-tiny", "meta", **SHAPE).config)
    for frozen in (True, False):
        torch.manual_seed(0)
        ours = build("qwen2.5-vl-tiny", **SHAPE)
        theirs = transformers_model(ours.config)
        copied = {name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else
                  name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: value
                  for name, value in ours.state_dict().items()}  # fmt: skip
        theirs.load_state_dict(copied)
        for model, tower in ((ours, ours.visual), (theirs, theirs.model.visual)):
            model.to(device)
            tower.requires_grad_(not frozen)
        weigh = family_of(ours.config).cost(ours).weigh
        ways = {
            "packed": (ours, losses_of_ours, pack(talks, weigh)),
            "padded, our model": (ours, losses_of_ours, pad(talks)),
            "padded, transformers": (theirs, losses_of_transformers, pad(talks)),
        }
        count = sum(int((talk.labels != -100).sum()) for talk in talks)
        real = sum(len(talk.ids) for talk in talks)
        parameters = sum(p.numel() for p in ours.parameters()) / 1e6
        print(
            f"{parameters:.1f}M parameters, tower {'frozen' if frozen else 'trained'}; {len(talks)} conversations, "
            f"{real:,} tokens, {count:,} of them with a label"
        )
        best, said = dict.fromkeys(ways, float("inf")), {}
        for _ in range(asked.turns + 1):  # the first warms up
            for name, (model, losses, batches) in ways.items():
                model.zero_grad()
                moved = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()} for b in batches]
                started, total = clock(), 0.0
                for batch in moved:
                    loss = losses(model, batch) / count
                    loss.backward()
                    total += loss.item()
                best[name], said[name] = min(best[name], clock() - started), total
        assert max(said.values()) - min(said.values()) < 1e-4, said
        for name, (_, _, batches) in ways.items():
            rows = sum(b["input_ids"].numel() for b in batches)
            print(
                f"  {name}: {len(batches)} forwards, {1 - real / rows:.0%} padding, {best[name]:.2f} s, "
                f"{count / best[name]:,.0f} label tokens a second, "
                f"{best['padded, transformers'] / best[name]:.2f} x transformers; loss {said[name]:.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
