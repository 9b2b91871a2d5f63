"""The table of docs/one-card.md: what a LoRA needs on one card, by estimate. Nothing is measured on a card.

    python docs/measure/one_card.py [--models wan2.1-t2v-14b,…]

For each model, its usual sizes, and each card: the first of `WAYS` that fits.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from mm_parallel.devices import find_device
from mm_train.estimate.config import EstimateConfig
from mm_train.estimate.estimate import Estimate, Subject
from mm_train.estimate.workload import find_samples
from mm_train.recipe import load_config

SPARE = 1.0
"""GiB that a card keeps free: what CUDA itself takes, and gaps between tensors, are in no estimate."""
HOST = 64.0
"""GiB of the host, which offloaded inputs and waiting layers may fill to three quarters."""
PACK = 4096
"""Tokens of a conversation, which is a pack."""
ALL = -1
FULL = {"recompute": "full", "offload": "inputs"}
WAYS: tuple[dict[str, Any], ...] = (
    {"recompute": "none"},
    {"recompute": "but_attention"},
    {"recompute": "full"},
    FULL,
    FULL | {"host_layers": ALL},
    FULL | {"base": "int8"},
    FULL | {"base": "nf4"},
    FULL | {"base": "nf4", "host_layers": ALL},
)
"""From the fastest to the smallest; first those that change no bit of the base."""


class Card(NamedTuple):
    memory: float
    """GiB that torch can use."""
    device: str
    """Whose seconds are told; "" where none of such a card is in the table."""


CARDS = {
    12: Card(11.5, ""),
    16: Card(15.5, ""),
    24: Card(23.5, "rtx-4090"),
    48: Card(44.4, "l40s"),
    80: Card(79.2, "h100"),
}
MODELS: dict[str, tuple[tuple[int, int, int] | None, ...]] = {
    "wan2.1-t2v-1.3b": ((81, 480, 832),),
    "wan2.1-t2v-14b": ((81, 480, 832), (49, 480, 832), (33, 320, 576)),
    "vace-14b": ((81, 480, 832), (49, 480, 832), (33, 320, 576)),
    "wan2.2-ti2v-5b": ((121, 704, 1280), (49, 704, 1280)),
    "qwen2.5-vl-7b": (None,),
    "qwen2.5-vl-32b": (None,),
}
"""By preset, sizes of clips (frames, height, width) from the usual one down; None: packs of conversations."""


def look(model: str, size: tuple[int, int, int] | None) -> Iterator[tuple[int, str]]:
    """(card, row of the table) for each card on which it fits."""
    words = ["--model", model, "--recipe", f"{model}-lora", "--data.global_batch", "1", "--memory.recompute", "none"]
    if size is None:
        words += ["--size.conversation", str(PACK), "--data.max_tokens", str(PACK)]
    else:
        words += [
            x for name, n in zip(("frames", "height", "width"), size, strict=True) for x in (f"--size.{name}", str(n))
        ]
    config = load_config(words, EstimateConfig)
    subject = Subject(config, find_samples(config, config.size))
    layers = sum(1 for _ in subject.model.layers)
    found: dict[int, Estimate] = {}
    for gigabytes, card in CARDS.items():
        for number, way in enumerate(WAYS):
            memory = {name: layers if value == ALL else value for name, value in way.items()}
            asked = replace(config, memory=replace(config.memory, **memory))
            if number not in found:
                found[number] = subject.estimate(asked, 1)
            one = found[number]
            peak, host = one.peak / 2**30, max(rank.host for rank in one.memory) / 2**30
            if peak + SPARE > card.memory or host > 0.75 * HOST:
                continue
            seconds = ""
            if card.device:
                seconds = f"{subject.estimate(asked, 1, find_device(card.device)).seconds:,.1f} ({card.device})"
            flags = ", ".join(f"{name} {value}" for name, value in memory.items())
            what = "x".join(map(str, size)) if size else f"{PACK:,} tokens"
            yield gigabytes, f"| {model} | {what} | {gigabytes} | {flags} | {peak:.1f} | {host:.1f} | {seconds} |"
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    print("| model | size | card, GB | `--memory.` | peak, GiB | host, GiB | s/step, one sample |")
    print("|---|---|--:|---|--:|--:|--:|")
    for model in parser.parse_args().models.split(","):
        missing = set(CARDS)
        for size in MODELS[model]:
            for card, row in look(model, size):
                if card in missing:
                    print(row, flush=True)
                    missing.discard(card)
            if not missing:
                break
        for card in sorted(missing):
            print(f"| {model} | | {card} | does not fit | | | |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
