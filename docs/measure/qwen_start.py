"""A start of Qwen2.5-VL 72B without its weights and without memory: names, shapes, and what one of many ranks reads.

    python docs/measure/qwen_start.py           # the 72B, of 64 ranks; half a minute
    python docs/measure/qwen_start.py 3b 2

A folder as on the hub, in files of 4 GB that are sparse on the disk (zeros take no room), is opened as mm_train does.
Every name and shape of it is compared with the model's on the meta device. Then the rows that the first rank keeps
under FSDP are read, tensor by tensor, and forgotten.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm_convert import open_checkpoint
from mm_convert.families.qwen2_5_vl import QWEN2_5_VL as TABLE
from mm_models import build, plan
from mm_models.families import find

SHARD = 4e9


def write_sparse(folder: Path, model: Any) -> int:
    """Files with the right headers and nothing but holes behind them. Returns the bytes of the weights."""
    files: list[list[tuple[str, Any]]] = [[]]
    size = total = 0
    for name, parameter in model.named_parameters():
        if size + 2 * parameter.numel() > SHARD:
            files.append([])
            size = 0
        files[-1].append((name, parameter))
        size += 2 * parameter.numel()
        total += 2 * parameter.numel()
    places = {}
    for number, tensors in enumerate(files, 1):
        file, header, offset = f"model-{number:05}-of-{len(files):05}.safetensors", {}, 0
        for name, parameter in tensors:
            end = offset + 2 * parameter.numel()
            header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, end]}
            offset, places[name] = end, file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + offset)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    said = TABLE.write_config["transformers"](asdict(model.config))
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    return total


def main(size: str = "72b", ranks: str = "64") -> None:
    name, began = f"qwen2.5-vl-{size}", time.perf_counter()
    model = build(name, "meta")
    plan(model).check(model)
    tower = sum(parameter.numel() for parameter in model.visual.parameters())
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{name} on meta: {len(model.state_dict())} tensors, {count:,} parameters, {tower:,} of them in the tower; "
        f"{time.perf_counter() - began:.1f} s"
    )
    with tempfile.TemporaryDirectory() as folder:
        total = write_sparse(Path(folder), model)
        disk = sum(file.stat().st_blocks * 512 for file in Path(folder).iterdir())
        began = time.perf_counter()
        checkpoint = open_checkpoint(Path(folder))
        wanted = asdict(model.config)
        assert type(model.config)(**{field: checkpoint.config[field] for field in wanted}) == model.config
        assert find(name)[0].checkpoints == (checkpoint.family,), checkpoint.family
        shapes = {tensor: tuple(checkpoint[tensor].shape) for tensor in checkpoint}
        assert shapes == {tensor: tuple(p.shape) for tensor, p in model.named_parameters()}
        print(
            f"{total / 1e9:.1f} GB of weights in {len(checkpoint.shards)} files ({disk / 1e6:.1f} MB on "
            f"the disk): {len(shapes)} names and shapes alike; {time.perf_counter() - began:.1f} s"
        )
        began, read = time.perf_counter(), 0
        for tensor in model.state_dict():
            whole = checkpoint[tensor]
            rows = whole[: -(-whole.shape[0] // int(ranks))].clone()  # a slice of a mapped file alone is not read
            read += rows.numel() * rows.element_size()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"one of {ranks} ranks reads {read / 1e9:.2f} GB in {time.perf_counter() - began:.1f} s; peak {used:.2f} "
            "GiB, most of it pages of files"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
