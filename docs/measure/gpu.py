"""What one hour on a GPU must settle, in about eight minutes: kernels, steps of the 1.3B, the VAE, and a real run.

    python docs/measure/gpu.py [--out results] [--parts kernels,steps] [--tiny]

Every measurement is a process of its own with a time limit, and a line in OUT/gpu.jsonl as soon as it ends: one that
fails or hangs costs only itself, and a second call goes on where the first stopped. At the end a table is printed.
--tiny makes everything small enough for a CPU, so that the script itself can be tried anywhere.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from statistics import median

TOKENS = {"heads": 12, "width": 128, "length": 32_760}  # Wan2.1-1.3B at 81 frames of 480x832
LATENTS = (1, 16, 21, 60, 104)
TINY = {"dim": 96, "ffn_dim": 192, "num_heads": 2, "num_layers": 2, "text_dim": 32}

STEPS = {  # model, attention kernel of our named op (None: torch's own choice), recompute, offload, compiled
    "ours, nothing recomputed": ("ours", None, "none", "none", False),
    "ours, all but attention recomputed, flash": ("ours", "flash", "but_attention", "none", False),
    "ours, all but attention recomputed, cudnn": ("ours", "cudnn", "but_attention", "none", False),
    "ours, the same, attention on the host": ("ours", "cudnn", "but_attention", "attention", False),
    "ours, all recomputed": ("ours", None, "full", "none", False),
    "ours, all recomputed, inputs on the host": ("ours", None, "full", "inputs", False),
    "diffusers, nothing recomputed": ("diffusers", None, "none", "none", False),
    "diffusers, all recomputed": ("diffusers", None, "full", "none", False),
    "ours, nothing recomputed, layers compiled": ("ours", None, "none", "none", True),
    "diffusers, nothing recomputed, layers compiled": ("diffusers", None, "none", "none", True),
    "ours, all but attention recomputed, cudnn, 3 buckets": ("ours", "cudnn", "but_attention", "none", False),
}


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def clock(run, repeats: int) -> float:
    """Median seconds of a call, on the device's own clock where it has one."""
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


def about(tiny: bool) -> dict:
    import torch

    row = {"torch": torch.__version__, "device": device()}
    if device() == "cuda":
        row |= {"name": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        row["matrix product, TFLOP/s"] = 2 * 8192**3 / clock(lambda: a @ a, 10) / 1e12
        big = torch.randn(1 << 29, device="cuda")
        row["copy, TB/s"] = 2 * 4 * big.numel() / clock(lambda: big.clone(), 5) / 1e12
    return row


def exactness(tiny: bool, backend: str) -> dict:
    """A kernel against attention spelled out in float64, in relative norms; lengths that are no round numbers."""
    import torch

    from mm_parallel.attention import attention

    torch.manual_seed(0)
    worst = {}
    dtype = torch.float32 if device() == "cpu" else torch.bfloat16
    for (lq, lk), width, causal, padded in [
        ((384, 384), 128, False, 0), ((333, 257), 128, False, 0), ((333, 333), 80, True, 0), ((192, 192), 64, False, 0),
        ((333, 257), 96, False, 100),
    ]:  # fmt: skip
        q, k, v = (torch.randn(2, n, 4, width, device=device(), dtype=dtype, requires_grad=True) for n in (lq, lk, lk))
        ends = torch.tensor([[lk - padded], [lk]], device=device())
        mask = torch.arange(lk, device=device()) < ends if padded else None
        out = attention(q, k, v, causal, backend=backend, mask=mask)
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), dout)
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        right = attention(*wide, causal, backend="math", mask=mask)
        expected = torch.autograd.grad(right, wide, dout.double())
        pairs = zip(("out", "dq", "dk", "dv"), (out, *grads), (right, *expected), strict=True)
        for name, a, b in pairs:
            error = float((a.double() - b).norm() / b.norm())
            worst[name] = max(worst.get(name, 0.0), error) if error == error else float("nan")
    return worst


def kernel(tiny: bool, backend: str) -> dict:
    """TFLOP/s of forward and backward at the length of a 480p clip."""
    import torch
    import torch.nn.functional as F

    from mm_parallel.attention import attention

    heads, width, length = (2, 32, 256) if tiny else TOKENS.values()
    dtype = torch.float32 if device() == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, length, heads, width, device=device(), dtype=dtype, requires_grad=True) for _ in range(3))

    def plain(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    run = plain if backend == "torch's choice" else lambda *qkv: attention(*qkv, backend=backend)
    with torch.no_grad():
        forward = clock(lambda: run(q, k, v), 5)
    out = run(q, k, v)
    dout = torch.randn_like(out)
    backward = clock(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), 5)
    flops = 4 * length * length * heads * width
    return {"forward, TFLOP/s": flops / forward / 1e12, "backward, TFLOP/s": 2.5 * flops / backward / 1e12}


def parity(tiny: bool) -> dict:
    """Our Wan on the device against the same on the CPU, float32: output, and the worst gradient, in relative norms."""
    import torch

    from mm_models import build

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model = build("wan-tiny", **TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)  # a fresh head is zero, and so would all be that is compared
    inputs = {"video": torch.randn(2, 16, 3, 8, 10), "t": torch.tensor([500.0, 20.0]), "text": torch.randn(2, 9, 32)}
    results = []
    for where in ("cpu", device()):
        model.to(where).zero_grad()
        out = model(**{name: x.to(where) for name, x in inputs.items()})
        out.square().mean().backward()
        results.append([out.detach().cpu(), *(p.grad.to("cpu", copy=True) for p in model.parameters())])
    errors = [float((b - a).norm() / a.norm().clamp(min=1e-12)) for a, b in zip(*results, strict=True)]
    return {"output": errors[0], "worst gradient": max(errors[1:])}


def step(tiny: bool, case: str) -> dict:
    """Seconds, peak memory and MFU of a training step: float32 masters, bf16 products, AdamW, clipping."""
    import torch

    from mm_models import build, plan
    from mm_models.wan import WanConfig
    from mm_models.wan.cost import train_flops
    from mm_parallel import MemoryConfig, attention, parallelize
    from mm_parallel.device import peak_flops

    whose, backend, recompute, offload, compiled = STEPS[case]
    fields = TINY if tiny else {}
    name = "wan-tiny" if tiny else "wan2.1-t2v-1.3b"
    shapes = [(1, 16, 3, 8, 10)] if tiny else [LATENTS]
    if "buckets" in case:
        shapes += [(b, c, f, w, h) for b, c, f, h, w in shapes] + [(b, c, 1, h, w) for b, c, f, h, w in shapes]
    model = build(name, device="meta", **fields)
    config: WanConfig = model.config
    if whose == "diffusers":
        from diffusers import WanTransformer3DModel

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
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            ones = "norm" in parameter_name and parameter_name.endswith("weight")
            parameter.fill_(1.0) if ones else parameter.normal_(std=0.02)
    if whose == "diffusers":
        from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

        old = model.rope  # its tables are buffers, made on the meta device above
        model.rope = WanRotaryPosEmbed(old.attention_head_dim, old.patch_size, old.max_seq_len).to(device())
        context = lambda: torch.autocast(device(), torch.bfloat16)  # noqa: E731
        predict = lambda video, t, text: model(video, t, text, return_dict=False)[0]  # noqa: E731
        blocks = model.blocks
    else:
        model.compute_dtype = torch.bfloat16
        if backend and device() == "cuda":
            core = lambda q, k, v, sequence: attention.attention(q, k, v, sequence.causal, backend=backend)  # noqa: E731
        else:
            core = None
        parallelize(model, plan(model), memory=MemoryConfig(recompute=recompute, offload=offload))
        if core:
            model.core = core
        context, predict, blocks = contextlib.nullcontext, model, model.blocks
    if compiled:
        for block in blocks:
            block.compile()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    generator = torch.Generator(device()).manual_seed(1)
    data = [
        (
            torch.randn(shape, device=device(), generator=generator),
            torch.randn(shape, device=device(), generator=generator),
        )
        for shape in shapes
    ]
    text = torch.randn(1, config.text_tokens, config.text_dim, device=device(), generator=generator)
    t = torch.full((1,), 500.0, device=device())
    times, losses = [], []
    rounds = 2 if tiny else 4
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(rounds * len(shapes)):
        video, target = data[number % len(shapes)]
        started = time.perf_counter()
        optimizer.zero_grad()
        with context():
            out = predict(video, t, text)
        loss = (out.float() - target).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append((float(loss.detach()), float(norm)))
        times.append(time.perf_counter() - started)
    seconds = median(times[len(shapes) :: len(shapes)])  # of the first bucket, without the first round
    tokens = shapes[0][2] * shapes[0][3] * shapes[0][4] // 4
    row = {"seconds": seconds, "first step": times[0], "loss": losses[0][0], "norm": losses[0][1]}
    if device() == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        peak = peak_flops(torch.device("cuda"), torch.bfloat16)
        row["MFU %"] = 100 * train_flops(config, tokens) / seconds / peak if peak else None
    return row


def vae(tiny: bool, dtype: str) -> dict:
    """Encoding and decoding of one clip by diffusers' VAE of Wan2.1, random weights."""
    import torch
    from diffusers import AutoencoderKLWan

    sizes = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} if tiny else {}
    model = AutoencoderKLWan(**sizes).eval().requires_grad_(False).to(device(), getattr(torch, dtype))
    shape = (1, 3, 5, 32, 32) if tiny else (1, 3, 81, 480, 832)
    video = torch.rand(shape, device=device(), dtype=getattr(torch, dtype))
    with torch.no_grad():
        latents = model.encode(video).latent_dist.mode()
        encode = clock(lambda: model.encode(video), 1)
        decode = clock(lambda: model.decode(latents), 1)
    row = {"encode, s": encode, "decode, s": decode}
    if device() == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def training(tiny: bool, out: str) -> dict:
    """A real run of mm_train on random features, interrupted by its end, and continued: what it prints of itself."""
    import torch

    from mm_data import FeatureCache

    folder = Path(out) / "training"
    shape, text = ((16, 2, 4, 6), (3, 32)) if tiny else (LATENTS[1:], (40, 4096))
    if not (folder / "features").exists():
        with FeatureCache(folder / "features") as cache:
            for i in range(4):
                tensors = {"latents": torch.randn(shape), "text.0": torch.randn(text)}
                cache.put(f"{i:064d}", tensors, {"id": f"clip{i}.mp4"})
            cache.put_empty_text(torch.randn(1, text[1]))
            cache.finish()
    model = ["--model", "wan-tiny", "--architecture", json.dumps(TINY)] if tiny else ["--model", "wan2.1-t2v-1.3b"]
    command = [
        sys.executable, "-m", "mm_train", *model, "--weights", "random", "--data.features", str(folder / "features"),
        "--output", str(folder / "run"), "--data.global_batch", "1", "--data.micro_batch", "1", "--data.workers", "0",
        "--memory.recompute", "but_attention", "--checkpoint.every", "100",
    ]  # fmt: skip
    for steps in ("4", "6"):
        done = subprocess.run([*command, "--steps", steps], capture_output=True, text=True, encoding="utf-8")
        print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
        if done.returncode:
            raise RuntimeError(f"mm_train ended with {done.returncode}")
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    last = rows[-1]
    return {k: last.get(k) for k in ("step", "loss", "seconds", "mfu", "memory_gib")} | {"steps": len(rows)}


def jobs(out: str) -> dict[str, tuple]:
    """Every measurement by name: (part, seconds it may take, function, arguments)."""
    named = {"about": ("about", 60, about, ())}
    named["parity"] = ("parity", 60, parity, ())
    backends = ("flash", "cudnn", "efficient") if device() == "cuda" else ("cpu",)
    named |= {f"exactness {name}": ("kernels", 60, exactness, (name,)) for name in backends}
    named |= {f"kernel {name}": ("kernels", 60, kernel, (name,)) for name in ("torch's choice", *backends)}
    named |= {case: ("steps", 120, step, (case,)) for case in STEPS}
    named |= {f"vae {dtype}": ("vae", 90, vae, (dtype,)) for dtype in ("bfloat16", "float32")}
    return named | {"training": ("training", 240, training, (out,))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu")
    parser.add_argument("--parts", default="about,parity,kernels,steps,training,vae")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all; what does not fit is left out")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    todo = jobs(args.out)
    if args.only:
        _, _, run, arguments = todo[args.only]
        print("RESULT", json.dumps(run(args.tiny, *arguments)))
        return 0
    Path(args.out).mkdir(parents=True, exist_ok=True)
    file = Path(args.out) / "gpu.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    done = {row["name"] for row in rows if "error" not in row}
    started, failed = time.perf_counter(), []
    parts = args.parts.split(",")
    known = list(dict.fromkeys(of for of, *_ in todo.values()))
    if unknown := set(parts) - set(known):
        parser.error(f"--parts {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    for part in parts:
        for name, (of, limit, *_) in todo.items():
            left = args.budget - (time.perf_counter() - started)
            if of != part or name in done or left < 10:
                continue
            row = {"name": name} | isolated(args, name, min(limit, left))
            if "error" in row:
                failed.append(name)
            with file.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            print(
                " | ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()), flush=True
            )
    return int(bool(failed))


def isolated(args: argparse.Namespace, name: str, limit: float) -> dict:
    command = [sys.executable, __file__, "--out", args.out, *(["--tiny"] if args.tiny else []), "--only", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit:.0f} s"}
    except OSError:
        return {"error": traceback.format_exc()}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"error": (done.stdout + done.stderr)[-1800:]}


if __name__ == "__main__":
    sys.exit(main())
