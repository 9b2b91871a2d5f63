"""Our training step against diffusers' `WanTransformer3DModel` in the same loop: seconds and peak memory.

    python docs/measure/step.py            # all cases; a few minutes on two cores, which should be idle
    python docs/measure/step.py VACE       # those whose name has the word
    python docs/measure/step.py --compile  # and both with their layers compiled

Each measurement is a process of its own, so that its peak memory is its own; the models take turns, and the best of
their turns count, so that a disturbance hits none alone.
"""

import json
import resource
import subprocess
import sys
import time
from statistics import median

CASES = {  # fields of WanConfig, latents B C F H W, steps per turn
    "tiny, 1.7M, 16 x 48 tokens": (
        {"dim": 160, "ffn_dim": 480, "num_heads": 5, "num_layers": 4, "text_dim": 64},
        (16, 16, 3, 8, 8),
        12,
    ),
    "100M, 1 x 640 tokens": (
        {"dim": 768, "ffn_dim": 3072, "num_heads": 12, "num_layers": 10, "text_dim": 512},
        (1, 16, 10, 16, 16),
        5,
    ),
    "VACE, control trained on a frozen 100M, 1 x 640 tokens": (
        {
            "dim": 768,
            "ffn_dim": 3072,
            "num_heads": 12,
            "num_layers": 10,
            "text_dim": 512,
            "vace_layers": (0, 2, 4, 6, 8),
        },
        (1, 16, 10, 16, 16),
        5,
    ),
    "first frame clean (a timestep per token), 1 x 2560 tokens": (
        {"dim": 384, "ffn_dim": 1536, "num_heads": 6, "num_layers": 10, "text_dim": 512},
        (1, 16, 10, 32, 32),
        5,
    ),
}


def measure(case: str, name: str) -> dict[str, float]:
    import torch

    ours, compiled = name.startswith("ours"), name.endswith("compiled")
    fields, shape, steps = CASES[case]
    torch.manual_seed(0)
    if ours:
        from mm_models.wan import WanConfig, WanModel

        model = WanModel(WanConfig(**fields))
        predict = model
        if compiled:
            from mm_models import plan
            from mm_parallel import parallelize

            parallelize(model, plan(model), compile=True)
    else:
        from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

        control = {"vace_layers": list(fields["vace_layers"])} if "vace_layers" in fields else {}
        model = (WanVACETransformer3DModel if control else WanTransformer3DModel)(
            **control,
            num_attention_heads=fields["num_heads"],
            attention_head_dim=fields["dim"] // fields["num_heads"],
            ffn_dim=fields["ffn_dim"],
            num_layers=fields["num_layers"],
            text_dim=fields["text_dim"],
        )
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)

        def predict(video, t, text, **control):
            return model(video, t, text, **{f"{k}_hidden_states": v for k, v in control.items()}, return_dict=False)[0]

    control = {}
    if "vace_layers" in fields:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("vace_")
        control["control"] = torch.randn(shape[0], 96, *shape[2:])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    video, text = torch.randn(shape), torch.randn(shape[0], 512, fields["text_dim"])
    t, target = torch.rand(shape[0]) * 1000, torch.randn(shape)
    if case.startswith("first frame"):
        t = t[:, None].repeat(1, shape[2] * shape[3] * shape[4] // 4)
        t[:, : shape[3] * shape[4] // 4] = 0
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        optimizer.zero_grad()
        (predict(video, t, text, **control) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": median(seconds[1:]),  # the first one warms up
        "first": seconds[0],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
    }


def main(*words: str) -> None:
    names = ["ours", "diffusers"] + ["ours compiled", "diffusers compiled"] * ("--compile" in words)
    words = tuple(word for word in words if word != "--compile")
    for case in (case for case in CASES if all(word in case for word in words)):
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(3):
            for name, results in turns.items():
                command = [sys.executable, __file__, case, name]
                results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        best = {name: {k: min(r[k] for r in results) for k in results[0]} for name, results in turns.items()}
        a, b = best["ours"], best["diffusers"]
        print(f"{case} ({a['parameters']:.1f}M and {b['parameters']:.1f}M parameters)")
        for name, own in best.items():
            print(
                f"  {name}: {own['seconds']:.3f} s, {own['peak']:.2f} GiB, the first step {own['first']:.1f} s; of "
                f"diffusers' {own['seconds'] / b['seconds']:.2f} in time, {own['peak'] / b['peak']:.2f} in peak memory",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] in CASES:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main(*sys.argv[1:])
