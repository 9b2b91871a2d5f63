"""What the first hour on a GPU must settle, in eight minutes at most.

    python docs/measure/gpu.py [--out gpu] [--parts steps,qwen] [--wheels DIR] [--tiny]

    about      the machine: versions, kernels that load, rates of a matrix product and of a copy
    exactness  every attention kernel against float64, and the cases in which cuDNN is known to be wrong
    kernels    TFLOP/s of every attention kernel, forward and backward, at 32,760 tokens and heads of 128
    steps      training steps of Wan2.1-1.3B at 81 x 480 x 832, ours and diffusers': seconds, peak memory, MFU
    compiled   the same with compiled layers
    qwen       a step of Qwen2.5-VL-3B on a pack, and transformers' class on the same conversations
    estimate   what was predicted for the steps that were measured
    encoders   Wan's VAE and a text encoder as large as UMT5-XXL
    parity     our models on this device against the CPU, in float32
    training   a run of mm_train, stopped and continued

Every part is a process with a time limit of its own; a case that fails or hangs costs only itself. Each case is a line
of OUT/gpu.jsonl as soon as it ends, and a second call makes those that are missing. OUT/table.md is for docs/log.md.

It needs torch 2.11 to 2.15, transformers and safetensors. What else there is to carry is collected by
`gpu_wheels.py DIR` beside this file. A case whose packages are not here is named as not run.
--tiny makes everything so small that a CPU can do it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

PARTS = {  # seconds, the most important first: eight minutes together
    "about": 25,
    "exactness": 35,
    "kernels": 40,
    "steps": 115,
    "compiled": 95,
    "qwen": 55,
    "estimate": 20,
    "encoders": 50,
    "parity": 15,
    "training": 30,
}
TOKENS = {"heads": 12, "width": 128, "length": 32_760}  # Wan2.1-1.3B at 81 frames of 480 x 832
LATENTS = (1, 16, 21, 60, 104)
TINY = {"dim": 96, "ffn_dim": 192, "num_heads": 2, "num_layers": 2, "text_dim": 32}
TINY_LATENTS = (1, 16, 3, 8, 10)
TINY_VAE = (1, 16, 2, 4, 4)  # latents of 5 x 32 x 32
LOADED = {"flash3": "FA3", "flash4": "FA4"}
ROOT = Path(__file__).parent.parent.parent  # of a checkout; a copy may lie in any folder


@dataclass(frozen=True)
class Step:
    """A way to train the model. attention: "torch" is whatever torch prefers; but_attention: so many layers alone."""

    attention: str = "auto"
    recompute: str = "none"
    offload: str = "none"
    diffusers: bool = False
    compiled: bool = False
    but_attention: int = 0

    @property
    def memory(self) -> Any:
        from mm_parallel import MemoryConfig

        return MemoryConfig(recompute=self.recompute, but_attention=self.but_attention, offload=self.offload)


STEPS = {  # nothing recomputed is predicted to take 93 GiB, all but attention in 20 of 30 layers 48
    "ours, all but attention recomputed": Step(recompute="but_attention"),
    "ours, the same in 20 of 30 layers": Step(but_attention=20),
    "diffusers, all recomputed": Step(attention="torch", recompute="full", diffusers=True),
    "ours, all recomputed": Step(recompute="full"),
    "ours, all but attention recomputed, flash": Step(attention="flash", recompute="but_attention"),
    "ours, all but attention recomputed, attention on the host": Step(recompute="but_attention", offload="attention"),
    "diffusers, nothing recomputed": Step(attention="torch", diffusers=True),
    "ours, nothing recomputed": Step(),
    "ours, all recomputed, inputs on the host": Step(recompute="full", offload="inputs"),
}
COMPILED = {
    "ours, all but attention recomputed, compiled": Step(recompute="but_attention", compiled=True),
    "ours, the same in 20 of 30 layers, compiled": Step(but_attention=20, compiled=True),
    "diffusers, all recomputed, compiled": Step("torch", "full", diffusers=True, compiled=True),
    "ours, nothing recomputed, compiled": Step(compiled=True),
    "diffusers, nothing recomputed, compiled": Step(attention="torch", diffusers=True, compiled=True),
    "ours, all but attention recomputed, flash, compiled": Step("flash", "but_attention", compiled=True),
    "ours, all recomputed, compiled": Step(recompute="full", compiled=True),
}


# ---- what the machine is ---------------------------------------------------------------------------------------------


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(tiny: bool) -> str:
    """Rows of another machine, torch or size do not count as done."""
    import torch

    name = torch.cuda.get_device_name() if device() == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}{', tiny' if tiny else ''}"


def clock(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call after a first one, on the device's own clock where it has one."""
    import torch

    run()
    seconds = []
    for _ in range(repeats):
        if device() == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return median(seconds)


def peak_gib() -> dict[str, float]:
    import torch

    return {"peak GiB": torch.cuda.max_memory_allocated() / 2**30} if device() == "cuda" else {}


@contextlib.contextmanager
def loaded(name: str) -> Iterator[None]:
    """FlashAttention 3 or 4 behind torch's ops, for a while."""
    from mm_parallel.attention import activate

    if name not in LOADED:
        yield
        return
    import torch

    activate(name, "cpu")  # what torch's own attention takes stays as it is
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def backends() -> tuple[str, ...]:
    return ("flash", "cudnn", "efficient", "flash4", "flash3") if device() == "cuda" else ("cpu", "math")


def about(tiny: bool) -> dict:
    import torch

    row = {"torch": torch.__version__, "python": sys.version.split()[0], "CUDA": torch.version.cuda}
    if device() == "cuda":
        major, minor = torch.cuda.get_device_capability()
        row |= {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
        row |= {"GiB": torch.cuda.get_device_properties(0).total_memory / 2**30}
        row |= {"cuDNN": torch.backends.cudnn.version()}
    size, dtype = (256, torch.float32) if tiny else (8192, torch.bfloat16)
    a = torch.randn(size, size, device=device(), dtype=dtype)
    row["matrix product, TFLOP/s"] = 2 * size**3 / clock(lambda: a @ a, 10) / 1e12
    big = torch.randn(1 << (20 if tiny else 29), device=device())
    row["copy, TB/s"] = 2 * 4 * big.numel() / clock(lambda: big.clone(), 5) / 1e12
    return row


def packages(tiny: bool) -> dict:
    """What is here of what the parts use, and which kernels of attention can be loaded."""
    from importlib.metadata import PackageNotFoundError, version

    from mm_parallel.attention import pick

    row: dict[str, Any] = {}
    for name in ("transformers", "peft", "safetensors", "diffusers", "einops", "av", "triton"):
        try:
            row[name] = version(name)
        except PackageNotFoundError:
            row[name] = "-"
    import torch

    for name in backends():
        try:
            with loaded(name):
                dtype = torch.bfloat16 if device() == "cuda" else torch.float32
                row[f"attention {name}"] = pick(device(), dtype, 128, heads=12, name=name)
        except ValueError as error:
            row[f"attention {name}"] = str(error)[:160]
    row["attention auto"] = pick(device(), torch.bfloat16, 128, heads=12)
    return row


def takes(backend: str, dtype: Any, width: int, kv_heads: int) -> bool:
    """Whether our op computes such heads by this kernel here, and does not refuse."""
    from mm_parallel.attention import pick

    try:
        return bool(pick(device(), dtype, width, heads=8, kv_heads=kv_heads, name=backend))
    except ValueError:
        return False


# ---- attention -------------------------------------------------------------------------------------------------------


def exactness(tiny: bool, backend: str) -> dict:
    """A kernel against attention spelled out in float64, in relative norms, the worst of some shapes.

    ring: gradients of half the keys at a time, given out and log-sum-exp of all, as a ring of ranks computes them.
    """
    import torch

    from mm_parallel.attention import attention
    from mm_parallel.attention.dispatch import backward, forward

    torch.manual_seed(0)
    worst: dict[str, float] = {}
    dtype = torch.float32 if device() == "cpu" else torch.bfloat16

    def compare(names: Sequence[str], got: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> None:
        for name, x, y in zip(names, got, right, strict=True):
            error = float((x.double() - y).norm() / y.norm())
            worst[name] = max(worst.get(name, 0.0), error) if error == error else float("inf")

    for (queries, keys), width, shared, causal, padded, segments in [
        ((384, 384), 128, 8, False, 0, None),
        ((333, 257), 128, 8, False, 0, None),
        ((333, 333), 80, 8, True, 0, None),
        ((704, 704), 64, 8, False, 0, None),
        ((333, 333), 128, 2, True, 0, None),
        ((333, 333), 128, 2, True, 0, (0, 1, 130, 333)),
        ((333, 257), 96, 8, False, 100, None),
    ]:
        with loaded(backend):
            if not takes(backend, dtype, width, shared):
                continue
        shapes = ((2, queries, 8, width), (2, keys, shared, width), (2, keys, shared, width))
        q, k, v = (torch.randn(shape, device=device(), dtype=dtype, requires_grad=True) for shape in shapes)
        mask = torch.arange(keys, device=device()) < torch.tensor([[keys - padded], [keys]], device=device())
        rest = {"mask": mask if padded else None, "segments": segments}
        with loaded(backend):
            out = attention(q, k, v, causal, backend=backend, **rest)
            dout = torch.randn_like(out)
            grads = torch.autograd.grad(out, (q, k, v), dout)
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        right = attention(*wide, causal, backend="math", **rest)
        expected = torch.autograd.grad(right, wide, dout.double())
        compare(("out", "dq", "dk", "dv"), (out, *grads), (right, *expected))
        if not (causal or padded):
            q, k, v, dout = (x.detach() for x in (q, k, v, dout))
            with loaded(backend):
                whole = forward(q, k, v, width**-0.5, False, backend)
                halves = zip(k.chunk(2, 1), v.chunk(2, 1), strict=True)
                parts = [backward(dout, q, *half, *whole, width**-0.5, False, backend) for half in halves]
            dq, dk, dv = zip(*parts, strict=True)
            compare(["ring"] * 3, (sum(x.double() for x in dq), torch.cat(dk, 1), torch.cat(dv, 1)), expected)
    return worst | {"right": max(worst.values()) < 2e-2}


def masked_gradient(tiny: bool, ours: bool) -> dict:
    """pytorch #196678: elements of dq that are not finite, with a mask at a length that is 64 mod 128."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from mm_parallel.attention import attention

    torch.manual_seed(0)
    length, width = 704, 64
    dtype = torch.float32 if device() == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, length, 8, width, device=device()) * scale for scale in (0.1, 0.1, 1.0))
    q[..., 0], k[..., 0] = 1.0, -120 * width**0.5  # each logarithm of a sum of exponentials is about -120
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    mask = torch.ones(1, length, dtype=torch.bool, device=device())
    mask[:, -1] = False
    if ours:
        out = attention(q, k, v, mask=mask, backend="auto")
    else:
        kernel = SDPBackend.CUDNN_ATTENTION if device() == "cuda" else SDPBackend.MATH
        with sdpa_kernel([kernel]):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None, None])
            out = out.transpose(1, 2)
    dq, *others = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    bad = int((~dq.isfinite()).sum())
    return {"dq not finite": bad, "others not finite": sum(int((~x.isfinite()).sum()) for x in others)} | (
        {"right": bad == 0} if ours else {}
    )


def few_heads(tiny: bool, backend: str) -> dict:
    """pytorch #193893: output with 4 heads of keys and one query, as when a model answers, against float64."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from mm_parallel.attention import attention

    torch.manual_seed(0)
    dtype = torch.float32 if device() == "cpu" else torch.bfloat16
    errors = {}
    rows = 1 if tiny else 8
    for queries in (1, 512):
        q = torch.randn(rows, queries, 28, 128, device=device(), dtype=dtype)
        k, v = (torch.randn(rows, 512, 4, 128, device=device(), dtype=dtype) for _ in range(2))
        if backend == "auto":
            out = attention(q, k, v)
        else:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION if device() == "cuda" else SDPBackend.MATH]):
                out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
                out = out.transpose(1, 2)
        right = attention(q.double(), k.double(), v.double(), backend="math")
        errors[f"{queries} queries"] = float((out.double() - right).norm() / right.norm())
    return errors | ({"right": max(errors.values()) < 2e-2} if backend == "auto" else {})


def kernel(tiny: bool, backend: str) -> dict:
    """TFLOP/s of forward and backward at the length of a 480p clip."""
    import torch
    import torch.nn.functional as F

    from mm_parallel.attention import attention

    heads, width, length = (2, 32, 256) if tiny else TOKENS.values()
    dtype = torch.float32 if device() == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, length, heads, width, device=device(), dtype=dtype, requires_grad=True) for _ in range(3))

    def run() -> torch.Tensor:
        if backend == "torch":
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return attention(q, k, v, backend=backend)

    repeats = 3 if backend in ("efficient", "math") else 5
    flops = 4 * length * length * heads * width
    with loaded(backend):
        with torch.no_grad():
            started = time.perf_counter()
            run()
            if device() == "cuda":
                torch.cuda.synchronize()
            first = time.perf_counter() - started
            forward = clock(run, repeats)
        out = run()
        dout = torch.randn_like(out)
        backward = clock(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), repeats)
    both = {"forward, TFLOP/s": flops / forward / 1e12, "backward, TFLOP/s": 2.5 * flops / backward / 1e12}
    return both | {"first call, s": first}


# ---- steps of Wan ----------------------------------------------------------------------------------------------------


def fill(model: Any) -> None:
    """Values as a trained model has them, roughly: no projection is zero, so that every gradient is computed.

    By name: two models whose parameters have the same names, but for prefixes, are the same.
    """
    import torch

    generator = torch.Generator(device())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ones = "norm" in name and name.endswith("weight")
            generator.manual_seed(zlib.crc32(name.replace("language_model.", "").replace("model.", "").encode()))
            values = torch.randn(parameter.shape, generator=generator, device=device())
            parameter.fill_(1.0) if ones else parameter.copy_(values * 0.02)


def wan(tiny: bool) -> tuple[Any, tuple[int, ...]]:
    """The model on the meta device, and the shape of its latents."""
    from mm_models import build

    if tiny:
        return build("wan-tiny", device="meta", **TINY), TINY_LATENTS
    return build("wan2.1-t2v-1.3b", device="meta"), LATENTS


def diffusers_wan(config: Any, recompute: str, compiled: bool) -> Any:
    import torch
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.dim // config.num_heads,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            text_dim=config.text_dim,
        )
    if recompute == "full":
        model.enable_gradient_checkpointing()
    model.to_empty(device=device())
    old = model.rope  # its tables are buffers, made on the meta device above
    model.rope = WanRotaryPosEmbed(old.attention_head_dim, old.patch_size, old.max_seq_len).to(device())
    if compiled:
        for block in model.blocks:
            block.compile()
    return model


def step(tiny: bool, name: str) -> dict:
    """A training step: float32 masters, bf16 products, AdamW, clipping; the same loop for both models."""
    import torch

    from mm_models import plan
    from mm_parallel import parallelize
    from mm_parallel.device import peak_flops

    how = (STEPS | COMPILED)[name]
    model, shape = wan(tiny)
    config = model.config
    flops = family_flops(shape, config)
    attention = how.attention if device() == "cuda" else "auto"
    if how.diffusers:
        model = diffusers_wan(config, how.recompute, how.compiled)
        fill(model)
        context = lambda: torch.autocast(device(), torch.bfloat16)  # noqa: E731
        predict = lambda video, t, text: model(video, t, text, return_dict=False)[0]  # noqa: E731
    else:
        model.compute_dtype = torch.bfloat16
        memory = replace(how.memory, but_attention=min(how.but_attention, len(model.blocks)))
        parallelize(model, plan(model), memory=memory, attention=attention, compile=how.compiled)
        model.to_empty(device=device())
        fill(model)
        context, predict = contextlib.nullcontext, model
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    generator = torch.Generator(device()).manual_seed(1)
    video, target = (torch.randn(shape, device=device(), generator=generator) for _ in range(2))
    text = torch.randn(1, config.text_tokens, config.text_dim, device=device(), generator=generator)
    t = torch.full((1,), 500.0, device=device())
    seconds, losses = [], []
    for _ in range(2 if tiny else 3):
        started = time.perf_counter()
        optimizer.zero_grad()
        with context():
            out = predict(video, t, text)
        loss = (out.float() - target).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append((float(loss.detach()), float(norm)))  # waits for the device
        seconds.append(time.perf_counter() - started)
    row = {"seconds": min(seconds[1:]), "first step": seconds[0], "loss": losses[0][0], "norm": losses[0][1]}
    peak = peak_flops(torch.device(device()), torch.bfloat16)
    return row | peak_gib() | ({"MFU %": 100 * flops / row["seconds"] / peak} if peak else {})


def example(config: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """The model's arguments, on the meta device."""
    import torch

    with torch.device("meta"):
        text = torch.empty(shape[0], config.text_tokens, config.text_dim)
        return {"video": torch.empty(shape), "t": torch.empty(shape[0]), "text": text}


def family_flops(shape: tuple[int, ...], config: Any) -> float:
    """FLOPs of training on one sample, as mm_train counts them: nothing that is recomputed."""
    from mm_models.wan.cost import train_flops

    frames, height, width = shape[2:]
    return train_flops(config, frames * height * width // 4)


# ---- Qwen2.5-VL ------------------------------------------------------------------------------------------------------


def qwen(tiny: bool, whose: str) -> dict:
    """A step on eight conversations of 512 tokens with an image each: ours packs them, transformers' takes rows.

    The tower is frozen, as in the guide; every layer of the language model is recomputed.
    """
    import torch

    from mm_models import build, plan
    from mm_models.layers import Sequence
    from mm_models.qwen2_5_vl import positions
    from mm_models.qwen2_5_vl.cost import Work, forward_flops
    from mm_parallel import MemoryConfig, parallelize
    from mm_parallel.device import peak_flops

    ours = whose == "ours"
    rows, text, grid = (2, 24, (1, 8, 8)) if tiny else (8, 366, (1, 24, 24))
    name = "qwen2.5-vl-tiny" if tiny else "qwen2.5-vl-3b"
    model = build(name, device="meta")
    config = model.config
    patches, tokens = grid[0] * grid[1] * grid[2], grid[0] * grid[1] * grid[2] // config.merged
    row = [config.vision_start_token, *[config.image_token] * tokens, config.vision_end_token, *range(text)]
    ids = torch.tensor([row] * rows)
    labels = torch.full_like(ids, -100)
    labels[:, -text // 2 :] = ids[:, -text // 2 :]
    grids = (grid,) * rows
    places = positions(ids, grids, config=config)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows * patches, config.patch_dim, generator=generator).to(device())
    if ours:
        model.compute_dtype = torch.bfloat16
        model.visual.requires_grad_(False).to(torch.bfloat16)
        parallelize(model, plan(model), memory=MemoryConfig(recompute="full"))
        model.to_empty(device=device())
    else:
        sys.path.insert(0, str(Path(__file__).parent))
        from qwen_step import transformers_model

        with torch.device(device()):
            model = transformers_model(config)
        model.model.visual.requires_grad_(False)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fill(model)
    model.train()
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    count, ends = int((following != -100).sum()), tuple(range(0, ids.numel() + 1, ids.shape[1]))
    if ours:
        packed = {
            "input_ids": ids.reshape(1, -1).to(device()),
            "position_ids": places.reshape(3, 1, -1).to(device()),
            "pixel_values": pixels,
            "grid_thw": grids,
            "sequence": Sequence(ids.numel(), causal=True, segments=ends),
            "labels": following.reshape(1, -1).to(device()),
        }
        loss = lambda: model(**packed).sum() / count  # noqa: E731
    else:
        batch = {"input_ids": ids, "position_ids": places, "labels": labels, "image_grid_thw": torch.tensor(grids)}
        batch = {key: value.to(device()) for key, value in batch.items()} | {"pixel_values": pixels}

        def loss() -> torch.Tensor:
            with torch.autocast(device(), torch.bfloat16):
                return model(**batch, use_cache=False).loss

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    seconds, losses = [], []
    for _ in range(2 if tiny else 3):
        started = time.perf_counter()
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(value.detach()))
        seconds.append(time.perf_counter() - started)
    best = min(seconds[1:])
    found = {"seconds": best, "first step": seconds[0], "loss": losses[0], "tokens/s": ids.numel() / best}
    pairs = rows * ids.shape[1] ** 2 / 2
    once = forward_flops(config, Work(ids.numel(), pairs, rows * patches, rows * patches**2, count))
    tower = once.tower + once.tower_attention  # frozen: forward alone
    peak = peak_flops(torch.device(device()), torch.bfloat16)
    mfu = {"MFU %": 100 * (3 * sum(once) - 2 * tower) / best / peak} if peak else {}
    return found | peak_gib() | mfu


# ---- encoders --------------------------------------------------------------------------------------------------------


def vae(tiny: bool, dtype: str) -> dict:
    """Encoding and decoding of one clip by diffusers' VAE of Wan2.1, random weights."""
    import torch
    from diffusers import AutoencoderKLWan

    sizes = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} if tiny else {}
    model = AutoencoderKLWan(**sizes).eval().requires_grad_(False).to(device(), getattr(torch, dtype))
    shape = (1, 3, 5, 32, 32) if tiny else (1, 3, 81, 480, 832)
    video = torch.rand(shape, device=device(), dtype=getattr(torch, dtype))
    latents = torch.randn(TINY_VAE if tiny else LATENTS, device=device(), dtype=getattr(torch, dtype))
    with torch.no_grad():
        encode = clock(lambda: model.encode(video), 1)
        row = {"encode, s": encode} | peak_gib()
        decode = clock(lambda: model.decode(latents), 1)
    return row | {"decode, s": decode}


def text_encoder(tiny: bool) -> dict:
    """An encoder as large as UMT5-XXL, random weights, bf16: seconds for 512 tokens, of one prompt and of eight."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256_384}
    small = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    config = UMT5Config(**(small if tiny else sizes), feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        model = UMT5EncoderModel(config).to(torch.bfloat16)
    model = model.to_empty(device=device()).eval().requires_grad_(False)
    fill(model)
    length, row = (16 if tiny else 512), {}
    for prompts in (1, 8):
        ids = torch.randint(0, config.vocab_size, (prompts, length), device=device())
        with torch.no_grad():
            row[f"{prompts} x {length} tokens, s"] = clock(lambda ids=ids: model(ids), 3)
    return row | peak_gib() | {"parameters, M": sum(p.numel() for p in model.parameters()) / 1e6}


# ---- what was predicted, and whether it is right ---------------------------------------------------------------------


def estimate(tiny: bool, out: str, name: str) -> dict:
    """Peak memory and seconds as mm_parallel predicts them before a run, beside what was measured here.

    On a device that its table does not know there are no seconds; on a CPU they are those of an H100.
    """
    import torch

    from mm_models import plan
    from mm_parallel import ParallelConfig
    from mm_parallel.devices import find_device, recognize
    from mm_parallel.estimate import Units, estimate_memory
    from mm_parallel.estimate.roofline import Clock

    how = (STEPS | COMPILED)[name]
    model, shape = wan(tiny)
    model.compute_dtype = torch.bfloat16
    own, layout = plan(model), ParallelConfig().resolve(1)
    memory = replace(how.memory, but_attention=min(how.but_attention, len(model.blocks)))
    units = Units(model, own, torch.bfloat16, example(model.config, shape), lambda y: y.square())
    (rank,) = estimate_memory(model, own, layout, memory, torch.bfloat16, {}, units=units)
    known = recognize(torch.cuda.get_device_name()) if device() == "cuda" else find_device("h100")
    guessed = {"GiB": rank.peak / 2**30}
    if known is not None:
        clock = Clock(known, torch.bfloat16, attention=how.attention, compiled=how.compiled)
        time = clock.time(units, layout, memory, 1, family_flops(shape, model.config))
        guessed |= {"s": time.total}
    measured = {row["name"]: row for row in read(Path(out), machine(tiny))}.get(name, {})
    row = {}
    for unit, key in (("GiB", "peak GiB"), ("s", "seconds")):
        row |= {f"estimated {unit}": guessed.get(unit), f"measured {unit}": measured.get(key)}
    return row | ({"kernels": ", ".join(time.kernels)} if known else {})


def parity(tiny: bool) -> dict:
    """Our Wan on the device against the same on the CPU, float32: output, and the worst gradient, in relative norms."""
    import torch

    from mm_models import build, plan
    from mm_parallel import parallelize

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model = build("wan-tiny", **TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)  # a fresh head is zero, and so would all be that is compared
    parallelize(model, plan(model))
    inputs = {"video": torch.randn(2, 16, 3, 8, 10), "t": torch.tensor([500.0, 20.0]), "text": torch.randn(2, 9, 32)}
    results = []
    for where in ("cpu", device()):
        model.to(where).zero_grad()
        out = model(**{name: x.to(where) for name, x in inputs.items()})
        out.square().mean().backward()
        results.append([out.detach().cpu(), *(p.grad.to("cpu", copy=True) for p in model.parameters())])
    errors = [float((b - a).norm() / a.norm().clamp(min=1e-12)) for a, b in zip(*results, strict=True)]
    return {"output": errors[0], "worst gradient": max(errors[1:]), "right": max(errors) < 1e-3}


def training(tiny: bool, out: str) -> dict:
    """A real run of mm_train on random features, interrupted by its end, and continued: what it prints of itself."""
    import tensorboard  # noqa: F401  mm_train writes its files; where it is missing, nothing is begun
    import torch

    from mm_data import FeatureCache

    folder = Path(out) / "training"
    shape, text = ((16, 2, 4, 6), (3, 32)) if tiny else ((16, 5, 60, 104), (40, 4096))
    if not (folder / "features").exists():
        with FeatureCache(folder / "features") as cache:
            for i in range(4):
                tensors = {"latents": torch.randn(shape), "text.0": torch.randn(text)}
                cache.put(f"{i:064d}", tensors, {"id": f"clip{i}.mp4"})
            cache.put_empty_text(torch.randn(1, text[1]))
            cache.finish()
    model = ["--model", "wan-tiny", "--architecture", json.dumps(TINY)]
    if not tiny:
        model = ["--model", "wan2.1-t2v-1.3b", "--architecture", json.dumps({"num_layers": 4})]  # quicker to save
    command = [
        sys.executable, "-m", "mm_train", *model, "--weights", "random", "--data.features", str(folder / "features"),
        "--output", str(folder / "run"), "--data.global_batch", "1", "--data.micro_batch", "1", "--data.workers", "0",
        "--memory.recompute", "but_attention", "--checkpoint.every", "100",
    ]  # fmt: skip
    for steps in ("4", "6"):
        done = subprocess.run([*command, "--steps", steps], capture_output=True, text=True, encoding="utf-8")
        print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
        if done.returncode:
            raise RuntimeError(f"mm_train ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    last = rows[-1]
    return {k: last.get(k) for k in ("step", "loss", "seconds", "mfu", "memory_gib")} | {"steps": len(rows)}


# ---- parts, processes, resuming --------------------------------------------------------------------------------------


def cases(part: str, out: str) -> dict[str, tuple[Callable[..., dict], tuple]]:
    """The cases of a part by name, the most important first: a function, and its arguments behind `tiny`."""
    if part == "about":
        return {"machine": (about, ()), "packages": (packages, ())}
    if part == "exactness":
        known = {
            "masked, 64 mod 128: cuDNN": (masked_gradient, (False,)),
            "masked, 64 mod 128: ours": (masked_gradient, (True,)),
            "4 heads of keys: cuDNN": (few_heads, ("cudnn",)),
            "4 heads of keys: ours": (few_heads, ("auto",)),
        }
        own = {f"exactness, {name}": (exactness, (name,)) for name in backends()}
        carried = {f"exactness, {name}": own.pop(f"exactness, {name}") for name in LOADED if name in backends()}
        return own | known | carried  # the last ones compile for seconds, each shape
    if part == "kernels":
        return {f"kernel {name}": (kernel, (name,)) for name in ("torch", *backends())}
    if part == "qwen":
        return {f"Qwen2.5-VL-3B, {whose}": (qwen, (whose,)) for whose in ("ours", "transformers")}
    if part == "estimate":
        ours = [name for name, how in (STEPS | COMPILED).items() if not how.diffusers]
        return {f"estimate: {name}": (estimate, (out, name)) for name in ours}
    if part == "encoders":
        known = {f"VAE, {dtype}": (vae, (dtype,)) for dtype in ("bfloat16", "float32")}
        return {"text encoder": (text_encoder, ()), **known}
    if part in ("parity", "training"):
        return {"parity": (parity, ())} if part == "parity" else {"training": (training, (out,))}
    return {name: (step, (name,)) for name in (STEPS if part == "steps" else COMPILED)}


def read(out: Path, where: str) -> list[dict]:
    """The rows of this machine; of each case the last."""
    file = out / "gpu.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return list({row["name"]: row for row in map(json.loads, lines) if row["machine"] == where}.values())


def is_done(row: dict) -> bool:
    """Too little memory stays so; what else went wrong, or had no package, is tried again."""
    return "error" not in row and not row.get("not run", "").startswith("needs")


def write(out: Path, row: dict) -> None:
    with (out / "gpu.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    told = {k: v for k, v in row.items() if k not in ("machine", "part", "name")}
    said = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items())
    print(f"  {row['name']}: {', '.join(said)}", flush=True)


def excuse(error: Exception) -> str:
    """Why a case is not run here, where that is no mistake; else empty."""
    import torch

    missing = error if isinstance(error, ImportError) else error.__cause__  # of a kernel that cannot be loaded
    said = (str(error).splitlines() or [""])[0][:160]
    if isinstance(missing, ImportError):
        return f"needs {missing.name or missing}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {said}"
    refused = any(words in said for words in ("No available kernel", "No viable backend"))  # of CUDA, and of all others
    return f"torch refuses it: {said}" if refused else ""


def work(part: str, names: list[str], out: Path, tiny: bool) -> None:
    """In a process of its own: some cases of a part. OUT/running has the one that is being made."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), 8))
    where, todo = machine(tiny), cases(part, str(out))
    for name in names:
        (out / "running").write_text(name, encoding="utf-8")
        if device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
        function, arguments = todo[name]
        row, broken = {"machine": where, "part": part, "name": name}, False
        try:
            row |= function(tiny, *arguments)
        except Exception as error:
            if why := excuse(error):
                row["not run"] = why
            else:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {error}"[:500]
                broken = "CUDA" in row["error"]  # such an error stays in the process
        write(out, row)
        if broken:
            sys.exit(1)
        if part == "compiled":
            torch._dynamo.reset()
        gc.collect()
        if device() == "cuda":
            torch.cuda.empty_cache()


def attempt(part: str, args: argparse.Namespace, limit: float) -> None:
    """All that is missing of a part, within so many seconds; after a crash the rest goes on in a new process."""
    started, out = time.perf_counter(), Path(args.out)
    tried: set[str] = set()
    while True:
        where = ask(args)
        done = {row["name"] for row in read(out, where) if is_done(row)} | tried
        names = [name for name in list_cases(part, args) if name not in done]
        left = limit - (time.perf_counter() - started)
        if not names:
            return
        if left < 1:
            print(f"  no time left for {', '.join(names)}", flush=True)
            return
        (out / "running").unlink(missing_ok=True)
        command = [*self_command(args), "--child", part, "--cases", json.dumps(names)]
        with (out / f"{part}.log").open("a", encoding="utf-8") as log:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
            code = follow(child, left)
        running = out / "running"
        name = running.read_text(encoding="utf-8") if running.exists() else names[0]
        if code == 0:
            tried |= set(names)
        elif name not in {row["name"] for row in read(out, where)} - done:
            why = f"no result within {left:.0f} s" if code is None else f"the process ended with {code}"
            write(out, {"machine": where, "part": part, "name": name, "error": f"{why}: see {part}.log"})
        tried.add(name)


def follow(child: subprocess.Popen, seconds: float) -> int | None:
    """Passes on what a process says. Its code, or None where the time was up: then it is ended, with all it started."""
    import threading

    timer = threading.Timer(seconds, end, (child,))
    timer.start()
    for line in child.stdout:
        print(line, end="", flush=True)
    code = child.wait()
    late = not timer.is_alive()
    timer.cancel()
    return None if late else code


def end(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


_asked: dict[str, Any] = {}


def ask(args: argparse.Namespace) -> str:
    """The machine's name. Asked in a process of its own, so that this one holds no device."""
    if not _asked:
        done = subprocess.run([*self_command(args), "--child", ""], capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            sys.exit(f"gpu.py: torch or our packages cannot be used here:\n{done.stderr[-2000:]}")
        _asked.update(json.loads(done.stdout.splitlines()[-1]))
    return _asked["machine"]


def list_cases(part: str, args: argparse.Namespace) -> list[str]:
    ask(args)
    return _asked["cases"][part]


def self_command(args: argparse.Namespace) -> list[str]:
    wheels = ["--wheels", args.wheels] if args.wheels else []
    return [sys.executable, __file__, "--out", args.out, *wheels, *(["--tiny"] if args.tiny else [])]


def find_packages(wheels: str | None, out: Path) -> None:
    """Puts our packages on the path, from beside this file or from wheels, and what else the wheels hold.

    In the environment as well, for programs that are started from here.
    """
    folders = [str(folder) for kind in ("libs", "apps") for folder in sorted((ROOT / kind).glob("*/src"))]
    if wheels:
        folder = out / "packages"
        for wheel in sorted(Path(wheels).glob("*.whl")):
            inside = folder / f"{wheel.stem}-{wheel.stat().st_mtime_ns}"  # another, where the wheel was made anew
            if not inside.exists():
                part = inside.with_name(f"{inside.name}.part")
                with zipfile.ZipFile(wheel) as packed:
                    packed.extractall(part)
                part.rename(inside)
            folders.append(str(inside))
    sys.path += folders  # behind what is installed
    there = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (there, *folders)))


def table(rows: list[dict]) -> str:
    """What was measured, for docs/log.md: a table for each part."""
    lines = []
    for part in PARTS:
        own = [row for row in rows if row["part"] == part]
        keys = [k for row in own for k in row if k not in ("machine", "part", "name", "error", "not run")]
        keys = list(dict.fromkeys(keys))
        made = [row for row in own if any(key in row for key in keys)]
        if made and part != "about":
            lines += [f"\n| {part} | {' | '.join(keys)} |", f"|---|{'--:|' * len(keys)}"]
            lines += [f"| {row['name']} | {' | '.join(show(row.get(key)) for key in keys)} |" for row in made]
        elif made:
            lines += ["", *(f"- {key}: {show(value)}" for row in made for key, value in row.items() if key in keys)]
        missing = [(row["name"], row.get("error") or row["not run"]) for row in own if row not in made]
        lines += [""] * bool(missing) + [f"- not run: {name}: {why}" for name, why in missing]
    return "\n".join(lines).strip() + "\n"


def show(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu", help="folder of results; those that are there are not made again")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the parts, in their order")
    parser.add_argument("--wheels", help="folder of wheels of what is not installed, see gpu_wheels.py")
    parser.add_argument("--tiny", action="store_true", help="everything small: to try the script itself on a CPU")
    parser.add_argument("--budget", type=float, help=f"seconds for all parts ({sum(PARTS.values())})")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    find_packages(args.wheels, out)
    if args.child is not None:
        if args.child:
            work(args.child, json.loads(args.cases), out, args.tiny)
        else:
            print(json.dumps({"machine": machine(args.tiny), "cases": {part: list(cases(part, "")) for part in PARTS}}))
        return 0
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    started = time.perf_counter()
    limits = {part: seconds * (8 if args.tiny else 1) for part, seconds in PARTS.items()}  # a CPU, which others use
    budget = sum(limits.values()) if args.budget is None else args.budget
    print(ask(args), flush=True)
    for part in (part for part in PARTS if part in parts):
        limit = min(limits[part], budget - (time.perf_counter() - started))
        print(f"{part}: at most {max(limit, 0):.0f} s", flush=True)
        began = time.perf_counter()
        attempt(part, args, limit)
        print(f"{part}: took {time.perf_counter() - began:.0f} s", flush=True)
    rows = read(out, ask(args))
    (out / "table.md").write_text(f"{ask(args)}\n\n{table(rows)}", encoding="utf-8")
    print(f"\n{table(rows)}", flush=True)
    wrong = [row["name"] for row in rows if "error" in row or row.get("right") is False]
    if wrong:
        print(f"wrong, or failed: {'; '.join(wrong)}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
