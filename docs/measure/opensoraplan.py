"""The 2.77B of Open-Sora-Plan 1.2 without its weights and without a GPU: what loading takes, and what a step takes.

    python docs/measure/opensoraplan.py            # about two minutes on two cores, and 8 GB of memory
    python docs/measure/opensoraplan.py step       # without loading
    python docs/measure/opensoraplan.py load       # alone

load: a bfloat16 safetensors file of all 687 tensors, sparse on the disk (zeros take no room), is loaded by four ranks
that each keep a quarter, as mm_train does under `--parallel.dp_shard 4`. Said of each rank: resident bytes of its own
(anonymous memory) and of files (one copy for all, given back when others need room), before, at most, and after.
step: floating-point operations by formula and by torch's counter, on the meta device; bytes that the backward of one
layer keeps per token, ours and diffusers'.
"""

import json
import os
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from mm_models import build
from mm_models.families import find
from mm_models.opensoraplan import OpenSoraPlanConfig, OpenSoraPlanModel, flops

NAME = "opensoraplan-1.2"
RANKS = 4
TIMES = (("before", "before"), ("most", "at most"), ("after", "after"))


def write_sparse(folder: Path) -> Path:
    """A file with the right header and nothing but a hole behind it: all weights are zero."""
    header, offset = {}, 0
    for name, parameter in build(NAME, device="meta").named_parameters():
        end = offset + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "diffusion_pytorch_model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    print(f"{offset / 1e9:.2f} GB of weights, of which {path.stat().st_blocks * 512 / 1e6:.1f} MB are on the disk")
    return path


def resident() -> dict[str, float]:
    """MB of this process: its own, and of files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    said = {words[0].rstrip(":"): int(words[1]) * 1.024 / 1e3 for words in lines if words[0].startswith("Rss")}
    return {"own": said["RssAnon"], "files": said["RssFile"]}


class Watch(threading.Thread):
    """Looks every hundredth of a second how much there is, and keeps the most of each."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = resident(), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.most = {kind: max(size, self.most[kind]) for kind, size in resident().items()}


def load(rank: int, world: int, folder: Path, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """As `mm_train.start.build_model` does it."""
    from mm_convert import open_checkpoint
    from mm_models import plan
    from mm_parallel import MemoryConfig, ParallelConfig, load_parameters, parallelize
    from mm_parallel.mesh import make_mesh

    model = build(NAME, device="meta", dtype=dtype)
    model.compute_dtype = torch.bfloat16
    layout = ParallelConfig(dp_shard=world)
    parallelize(model, plan(model), make_mesh(layout, "cpu"), layout, MemoryConfig(), torch.bfloat16)
    before, begin, watch = resident(), time.perf_counter(), Watch()
    watch.start()
    load_parameters(model, open_checkpoint(folder), torch.device("cpu"))
    watch.over.set()
    seconds, held = time.perf_counter() - begin, {"shards": 0.0, "whole": 0.0}
    for p in model.parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        held["shards" if isinstance(p, DTensor) else "whole"] += local.numel() * local.element_size() / 1e6
    return {"before": before, "most": watch.most, "after": resident(), "held": held, "time": {"seconds": seconds}}


def measure_load() -> None:
    from mm_parallel.testing import spawn

    with tempfile.TemporaryDirectory() as folder:
        write_sparse(Path(folder))
        for dtype in (torch.bfloat16, torch.float32):
            print(f"kept in {str(dtype).removeprefix('torch.')}, MB:")
            for rank, seen in enumerate(spawn(RANKS, load, Path(folder), dtype, timeout=580)):
                own, files = (
                    ", ".join(f"{seen[when][kind]:,.0f} {word}" for when, word in TIMES) for kind in ("own", "files")
                )
                print(
                    f"  rank {rank}: own {own}, of which its shards {seen['held']['shards']:,.0f} and what every rank "
                    f"holds whole {seen['held']['whole']:,.0f}; of files {files}; {seen['time']['seconds']:.1f} s",
                    flush=True,
                )


def measure_flops() -> None:
    for name in find(NAME)[0].presets:
        model = build(name, device="meta")
        frames, rows, columns = model.config.sample_size or (8, 60, 80)
        with torch.device("meta"):
            text = torch.empty(1, model.config.text_tokens, model.config.text_dim)
            inputs = torch.empty(1, 4, frames, rows, columns), torch.empty(1), text
        with FlopCounterMode(display=False) as counter:
            out = model(*inputs)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        tokens = frames * rows * columns // 4
        print(
            f"{name}, {tokens:,} tokens: forward {flops(model.config, tokens) / 1e12:,.2f} TFLOPs by formula, "
            f"{forward / 1e12:,.2f} counted; backward {counter.get_total_flops() / 1e12:,.2f} counted",
            flush=True,
        )


def saved(model: torch.nn.Module, *args, **named) -> int:
    """Bytes that a forward keeps for its backward, parameters not counted, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*args, **named)
    return sum(storage.nbytes() for storage in kept.values())


def measure_activations() -> None:
    """By the difference of two layers and one, at two numbers of tokens: so what does not grow with them falls out."""
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    from mm_models.layers import cast_weights

    dim = OpenSoraPlanConfig().dim
    for who in ("ours", "ours, text masked", "diffusers, text masked"):
        bytes_of_a_layer = []
        for columns in (16, 32):
            sizes = []
            for layers in (1, 2):
                config = OpenSoraPlanConfig(num_layers=layers, text_dim=64)
                video, t = torch.randn(1, 4, 1, 16, columns), torch.tensor([500])
                text, mask = torch.randn(1, 512, 64), torch.arange(512)[None] < 300
                if who.startswith("ours"):
                    model = cast_weights(OpenSoraPlanModel(config), torch.bfloat16)
                    sizes.append(saved(model, video, t, text, mask if "masked" in who else None))
                    continue
                model = AllegroTransformer3DModel(num_layers=layers, caption_channels=64).bfloat16()
                rope = get_3d_rotary_pos_embed_allegro(96, ((0, 0), (8, columns // 2)), (8, columns // 2), 1)[:3]
                places = torch.cartesian_prod(*(torch.arange(n) for n in (1, 8, columns // 2))).unbind(1)
                named = {"image_rotary_emb": (rope, tuple(place[None] for place in places))}
                named |= {"encoder_attention_mask": mask.bfloat16()}
                sizes.append(saved(model, video.bfloat16(), text.bfloat16(), t, **named))
            bytes_of_a_layer.append(sizes[1] - sizes[0])
        ((fewer, more),) = pairwise(bytes_of_a_layer)
        per_token = (more - fewer) / (8 * 8)
        print(
            f"{who}: a layer keeps {per_token:,.0f} bytes a token ({per_token / dim:.1f} D); of 128 tokens, with what "
            f"is kept of 512 rows of text, {more / 128:,.0f} a token",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parts = sys.argv[1:] or ["step", "load"]
    if unknown := set(parts) - {"step", "load"}:
        raise SystemExit(f"{', '.join(unknown)}: there are step and load")
    if "step" in parts:
        measure_flops()
        measure_activations()
    if "load" in parts:
        measure_load()
