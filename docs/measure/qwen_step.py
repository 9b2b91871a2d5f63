"""Our training step of a Qwen2.5-VL against transformers' class in the same plain loop: seconds and peak memory.

    python docs/measure/qwen_step.py            # all; some minutes on two cores, which should be idle
    python docs/measure/qwen_step.py tiny       # cases whose name has the word

Rows are equally long, and both models are given them as one batch: nothing is packed, and nothing is padding. Each
measurement is a process of its own, so that its peak memory is its own; the two models take turns, and the best step
of all turns counts, so that a disturbance hits neither alone. Seconds are those of the CPU; on a GPU they are those of
the wall, and the peak is that of its memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

TINY = {"vocab_size": 512}
SMALL = {
    "dim": 640,
    "ffn_dim": 2560,
    "num_layers": 10,
    "num_heads": 10,
    "num_kv_heads": 2,
    "mrope_section": (8, 12, 12),
    "vocab_size": 24064,
    "vision_dim": 512,
    "vision_ffn_dim": 1368,
    "vision_layers": 8,
    "vision_heads": 8,
    "full_attention_layers": (3, 7),
}


@dataclass(frozen=True)
class Case:
    fields: dict[str, Any]
    rows: int
    text: int
    """Tokens of text of a row; half of them have a label."""
    grids: tuple[tuple[int, int, int], ...]
    """Images and videos of a row."""
    steps: int
    dtype: str = "float32"
    frozen: bool = False
    """Whether the tower and the merger are, as in the guide."""


IMAGES = ((1, 18, 26), (1, 24, 16))  # of 252 x 364 and 336 x 224 pixels; the first has small windows at its edges
CASES = {
    "tiny, 8 rows of 64 tokens and an image": Case(TINY, 8, 64, ((1, 8, 8),), 12),
    "tiny, in bfloat16": Case(TINY, 8, 64, ((1, 8, 8),), 12, "bfloat16"),
    "tiny, a row of 32 tokens and 24 images of 6 sizes": Case(
        TINY, 1, 32, tuple((1, 4 + 2 * (i % 6), 12) for i in range(24)), 12
    ),
    "100M, a row of 1024 tokens and four images": Case(SMALL, 1, 1024, IMAGES * 2, 3),
    "100M, the same with a frozen tower": Case(SMALL, 1, 1024, IMAGES * 2, 3, frozen=True),
    "100M, a row of 1500 tokens without images, with a frozen tower": Case(SMALL, 1, 1500, (), 3, frozen=True),
}


def measure(name: str, ours: bool) -> dict[str, float]:
    import torch

    from mm_models import build
    from mm_models.qwen2_5_vl import positions
    from mm_parallel.device import device as find_device

    case, device = CASES[name], find_device()
    torch.manual_seed(0)
    config = build("qwen2.5-vl-tiny", "meta", **case.fields).config
    model = build("qwen2.5-vl-tiny", **case.fields) if ours else transformers_model(config)
    model.to(device)
    tower = model.visual if ours else model.model.visual
    tower.requires_grad_(not case.frozen)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    row = torch.randint(0, 256, (case.text,)).tolist()
    for frames, rows, columns in case.grids:
        token = config.image_token if frames == 1 else config.video_token
        row += [config.vision_start_token, *[token] * (frames * rows * columns // 4), config.vision_end_token]
    ids = torch.tensor([row] * case.rows)
    labels = torch.full_like(ids, -100)
    labels[:, case.text // 2 : case.text] = ids[:, case.text // 2 : case.text]
    grids = case.grids * case.rows
    places = positions(ids, grids, config=config).to(device)
    patches = torch.randn(sum(f * h * w for f, h, w in grids), config.patch_dim, device=device)
    count, ids, labels = int((labels != -100).sum()), ids.to(device), labels.to(device)
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    grid_thw = torch.tensor(grids, device=device)

    dtype = getattr(torch, case.dtype)
    if ours:
        model.compute_dtype = dtype

    def loss() -> torch.Tensor:
        if ours:
            return model(ids, places, patches, grids, labels=following).sum() / count
        images = {"pixel_values": patches, "image_grid_thw": grid_thw} if grids else {}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(input_ids=ids, position_ids=places, labels=labels, use_cache=False, **images).loss

    clock = time.process_time if device.type == "cpu" else time.perf_counter  # others use this machine, too
    seconds, losses = [], []
    for _ in range(case.steps):
        started = clock()
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(value.item())
        seconds.append(clock() - started)
    assert losses[-1] < losses[0], losses
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": min(seconds[1:]),  # the first one warms up
        "peak": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else used,
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
    }


def transformers_model(config: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    c = config
    text = {
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "vocab_size": c.vocab_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(c.mrope_section)},
    }
    vision = {
        "depth": c.vision_layers,
        "hidden_size": c.vision_dim,
        "intermediate_size": c.vision_ffn_dim,
        "num_heads": c.vision_heads,
        "out_hidden_size": c.dim,
        "fullatt_block_indexes": list(c.full_attention_layers),
        "tokens_per_second": 2,
    }
    tokens = {"image_token_id": c.image_token, "video_token_id": c.video_token}
    tokens |= {"vision_start_token_id": c.vision_start_token, "vision_end_token_id": c.vision_end_token}
    whole = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=c.tied, **tokens)
    return Qwen2_5_VLForConditionalGeneration(whole).train()


def compare(name: str) -> None:
    turns: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    for _ in range(2):
        for model, results in turns.items():
            command = [sys.executable, __file__, name, model]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    best = {model: {k: min(r[k] for r in results) for k in results[0]} for model, results in turns.items()}
    a, b = best["ours"], best["transformers"]
    print(
        f"{name} ({a['parameters']:.1f}M and {b['parameters']:.1f}M parameters): ours {a['seconds']:.3f} s, "
        f"{a['peak']:.2f} GiB; transformers {b['seconds']:.3f} s, {b['peak']:.2f} GiB; ratio "
        f"{a['seconds'] / b['seconds']:.2f} in time, {a['peak'] / b['peak']:.2f} in peak memory",
        flush=True,
    )


def main(word: str = "") -> None:
    for name in CASES:
        if word in name:
            compare(name)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(measure(sys.argv[1], sys.argv[2] == "ours")))
    else:
        main(*sys.argv[1:])
