"""The net under a change of the house: short runs of every task, whose numbers must stay the same to the last bit.

    python docs/measure/net.py inputs/ before.json      in the checkout before; makes the inputs where there are none
    python docs/measure/net.py inputs/ after.json       in the checkout after
    python docs/measure/net.py before.json after.json   compares: exit code 1 and the first difference of each run

Only command lines are used, so that both checkouts may look as they like inside. A few minutes on two cores.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = {"dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_dim": 8}
CLIP = 257
TASKS = {  # flags; what a sample holds besides latents and text: channels (or tokens and width)
    "t2v": ([], {}),
    "ti2v": (["--objective.task", "ti2v"], {}),
    "i2v": (["--model", "wan-tiny-i2v"], {"condition": 16, "image": (CLIP, 32)}),
    "flf2v": (["--model", "wan-tiny-i2v"], {"condition_both": 16, "image": (2 * CLIP, 32)}),
    "vace": (["--model", "wan-tiny-vace"], {"control": 32, "control_mask": 64}),
}
SHAPES = {
    "flf2v": SMALL | {"image_tokens": 2 * CLIP},
    "vace": SMALL | {"vace_layers": [0, 1]},
}
GEOMETRY = ["--geometry.num_frames", "5", "--geometry.max_height", "32", "--geometry.max_width", "48"]


def make_inputs(root: Path) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from mm_data import FeatureCache, write_video
    from mm_models.wan.testing import write_encoders

    for task, (_, conditions) in TASKS.items():
        random = torch.Generator().manual_seed(0)
        with FeatureCache(root / "features" / task) as cache:
            for i in range(12):
                latents = torch.randn(16, 2, *((4, 6) if i % 3 else (6, 4)), generator=random)
                tensors = {"latents": latents}
                tensors |= {f"text.{k}": torch.randn(3 + i % 4, 8, generator=random) for k in range(1 + i % 2)}
                for name, size in conditions.items():
                    shape = size if isinstance(size, tuple) else (size, *latents.shape[1:])
                    tensors[name] = torch.randn(shape, generator=random)
                cache.put(f"{i:064d}", tensors, {"id": f"clip{i}.mp4"})
            cache.put_empty_text(torch.randn(1, 8, generator=random))
            cache.finish()
    write_encoders(root / "encoders", text_dim=8, image_dim=32)
    clips, controlled = [], []
    for i in range(6):
        colours = np.random.default_rng(i).integers(0, 255, (9, 4, 6, 3), dtype=np.uint8)
        frames = colours.repeat(8, axis=1).repeat(8, axis=2)
        write_video(root / f"{i}.mp4", frames, fps=8)
        Image.fromarray(frames[0]).save(root / f"{i}.png")
        caption = ["a", ["b", "zwei"], "c", "d", ["e", "fünf"], "f"][i]
        clips.append({"path": f"{i}.mp4", "cap": caption})
        source = {"src_video": f"{(i + 1) % 6}.mp4", "src_video_mask": f"{(i + 2) % 6}.mp4"} if i % 2 else {}
        references = {"src_ref_images": [f"{k}.png" for k in range(i % 3)]} if i % 3 else {}
        controlled.append({"video": f"{i}.mp4", "cap": caption, **source, **references})
    (root / "data.json").write_text(json.dumps(clips), encoding="utf-8")
    (root / "controlled.json").write_text(json.dumps(controlled), encoding="utf-8")
    # the presets' text is 64 wide
    write_encoders(root / "encoders64", text_dim=64, image_dim=32)


def train_flags(root: Path, task: str, *more: str) -> list[str]:
    flags, _ = TASKS[task]
    model = [] if "--model" in flags else ["--model", "wan-tiny"]
    features = root / "features" / task
    return [
        *(*model, *flags, "--weights", "random", "--dtype", "float32", "--architecture"),
        *(json.dumps(SHAPES.get(task, SMALL)), "--data.features", str(features), "--data.workers", "0"),
        *("--data.global_batch", "4", "--data.micro_batch", "2", "--optim.lr", "1e-2", "--steps", "3"),
        *("--validation.features", str(features), "--validation.every", "2"),
        *more,
    ]


def training_runs(root: Path, base: str) -> dict[str, tuple[int, list[str]]]:
    """Name -> (ranks, flags)."""
    runs: dict[str, tuple[int, list[str]]] = {task: (1, train_flags(root, task)) for task in TASKS}
    t2v, vace = (lambda *more: train_flags(root, "t2v", *more)), (lambda *more: train_flags(root, "vace", *more))
    two = ["--data.micro_batch", "1"]
    runs["everything"] = 1, t2v("--data.text_dropout", "0.3", "--optim.ema", "0.9", "--dtype", "bfloat16")
    runs["lora"] = 1, t2v("--weights", base, "--lora.rank", "4", "--lora.dropout", "0.1")
    runs["high"] = 1, t2v("--model", "wan-tiny-a14b", "--expert", "high", "--weights", base)
    runs["low"] = 1, t2v("--model", "wan-tiny-a14b", "--expert", "low", "--weights", base)
    runs["vace-on-wan"] = 1, vace("--weights", base, "--trained", '["vace_*"]')
    layouts = {
        "shards": ["--parallel.dp_shard", "2", *two],
        "copies": ["--parallel.dp_replicate", "2", *two],
        "ulysses": ["--parallel.cp", "2", "--memory.recompute", "but_attention", "--memory.offload", "attention"],
        "ring": ["--parallel.ring", "2", "--memory.recompute", "full", "--memory.offload", "inputs"],
        "tensor": ["--parallel.tp", "2"],
        "pipeline": ["--parallel.pp_layers", "[1,1]", *two],
        "exact": ["--parallel.cp", "2", "--parallel.exact", "true"],
    }
    runs |= {f"t2v {name}": (2, t2v(*flags)) for name, flags in layouts.items()}
    for name in ("shards", "ulysses", "pipeline"):
        runs[f"vace {name}"] = 2, vace(*layouts[name])
    data = ["--data.features", "null", "--data.geometry.num_frames", "5", "--data.geometry.max_height", "32"]
    data += ["--data.encoders", str(root / "encoders"), "--data.manifest", str(root / "data.json")]
    data += ["--data.geometry.max_width", "48", "--validation.features", "null", "--data.text_dropout", "0.3"]
    for task in ("t2v", "i2v", "vace"):
        listed = ["--data.manifest", str(root / "controlled.json")] if task == "vace" else []
        runs[f"{task} on line"] = 1, train_flags(root, task, *data, *listed, "--data.encode_every", "2")
    runs["t2v on line, shared"] = 2, t2v(*data, "--parallel.cp", "2")
    videos = ["--sample.encoders", str(root / "encoders"), "--sample.steps", "2", "--sample.frames", "5"]
    videos += ["--sample.height", "32", "--sample.width", "48", "--sample.every", "3"]
    videos += ["--sample.guidance", "5", "--sample.flow_shift", "3", "--sample.negative_prompt", ""]
    runs["t2v with samples"] = 1, t2v(*videos, "--sample.prompts", '["a cat"]', "--sample.from_validation", "1")
    runs["vace with samples"] = 1, vace(*videos, "--sample.from_validation", "1")
    return runs


def digest_videos(folder: Path) -> dict[str, str]:
    from mm_data import read_video

    return {
        str(path.relative_to(folder)): hashlib.sha256(bytes(read_video(path).frames.tobytes())).hexdigest()
        for path in sorted(folder.rglob("*.mp4"))
    }


def run(ranks: int, module: str, argv: list[str]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run([sys.executable, *torchrun, "-m", module, *argv], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(argv)}\n{done.stderr[-3000:]}")


def read_run(output: Path) -> dict:
    rows = [
        json.loads(line)
        for path in sorted(output.rglob("metrics.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    numbers = {name: [row[name].hex() for row in rows if name in row] for name in ("loss", "grad_norm")}
    numbers["validation_loss"] = [row["validation_loss"].hex() for row in rows if "validation_loss" in row]
    return numbers | digest_videos(output)


def digest_features(folder: Path) -> str:
    from mm_data import FeatureDataset

    digest, data = hashlib.sha256(), FeatureDataset(folder)
    for record in sorted(data.records, key=lambda record: record.id):
        for name, tensor in sorted(record.load().items()):
            digest.update(f"{record.id} {name} {tuple(tensor.shape)}".encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()


def measure(root: Path, only: str = "") -> dict[str, dict]:
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        run(1, "mm_train", [*train_flags(root, "t2v"), "--output", str(base)])
        weights = str(base / "weights")
        for name, (ranks, flags) in training_runs(root, weights).items():
            if only in name:
                output = Path(scratch) / name.replace(" ", "-").replace(",", "")
                run(ranks, "mm_train", [*flags, "--output", str(output)])
                found[name] = read_run(output)
                print(name, found[name]["loss"][-1], flush=True)
        models = {"t2v": "wan-tiny", "ti2v": "wan-tiny", "i2v": "wan-tiny-i2v", "vace": "wan-tiny-vace"}
        for task, model in models.items():  # no tiny preset for flf2v; its conditions are those of i2v, twice
            if only in f"extract {task}":
                manifest = root / ("controlled.json" if task == "vace" else "data.json")
                flags = ["--model", model, "--encoders", str(root / "encoders64"), "--data.manifest", str(manifest)]
                output = Path(scratch) / f"features-{task}"
                run(1, "mm_train.extract", [*flags, "--output", str(output), "--task", task, *GEOMETRY])
                found[f"extract {task}"] = {"features": digest_features(output)}
                print("extract", task, flush=True)
        for task in ("t2v", "ti2v", "v2v", "i2v", "vace"):
            if only in f"infer {task}":
                found[f"infer {task}"] = infer(root, Path(scratch), weights, task)
                print("infer", task, flush=True)
    return found


def infer(root: Path, scratch: Path, base: str, task: str) -> dict:
    weights = base
    if task in ("i2v", "vace"):
        weights = str(scratch / task / "weights")
        if not Path(weights).exists():
            run(1, "mm_train", [*train_flags(root, task), "--output", str(scratch / task)])
    given = {"ti2v": ["--image"], "i2v": ["--image"], "v2v": ["--video"], "vace": ["--video"]}.get(task, [])
    files = [str(root / ("0.png" if given == ["--image"] else "0.mp4"))] if given else []
    flags = ["--weights", weights, "--encoders", str(root / "encoders"), "--prompt", "a cat", *given, *files]
    flags += ["--task", task, "--steps", "3", "--frames", "5", "--height", "32", "--width", "48", "--guidance", "3"]
    output = scratch / f"infer-{task}"
    run(1, "mm_infer", [*flags, "--output", str(output)])
    return digest_videos(output)


def compare(before: dict, after: dict) -> int:
    wrong = 0
    for name in before:
        if name not in after:
            print(f"missing: {name}")
            wrong += 1
        elif before[name] != after[name]:
            differing = [key for key in before[name] if before[name][key] != after[name].get(key)]
            print(f"DIFFERS: {name}: {', '.join(differing)}")
            for key in differing[:1]:
                print(f"   {before[name][key]}\n   {after[name].get(key)}")
            wrong += 1
    print(f"{len(before) - wrong} of {len(before)} runs are the same to the last bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    first, second, *rest = sys.argv[1:]
    if first.endswith(".json"):
        sys.exit(compare(*(json.loads(Path(file).read_text(encoding="utf-8")) for file in (first, second))))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not Path(first).exists():
        make_inputs(Path(first))
    Path(second).write_text(json.dumps(measure(Path(first).absolute(), *rest), indent=1), encoding="utf-8")
