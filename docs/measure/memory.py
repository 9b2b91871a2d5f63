"""Does memory grow? Bytes of resident memory that each turn adds, once the first ones are over.

    python docs/measure/memory.py DEMO [TURNS]     # DEMO: what `hatch run demo` wrote, for its clips and encoders

Reading samples of features, decoding clips, steps on features, steps on raw clips, and saves of a checkpoint. What the
allocator keeps for itself is given back before each look; what is left is lost.
"""

import ctypes
import gc
import itertools
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from mm_data import FeatureDataset, Geometry, VideoDataset, build_loader, read_manifest
from mm_train.extract import Data, ExtractConfig, extract
from mm_train.recipe import load_config
from mm_train.run import prepare

GEOMETRY = {"num_frames": 9, "max_height": 64, "max_width": 64}


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def measure(name: str, turns: int, make: Callable[[], Iterator]) -> None:
    """Twice: what is lost by every turn is lost in both halves, what is only late in the first."""
    items = make()
    seen = []
    for part in (turns // 4, turns, turns):
        for _ in itertools.islice(items, part):
            pass
        seen.append(resident())
    first, second = ((after - before) / turns for before, after in itertools.pairwise(seen))
    print(f"{name}: {first:,.0f} and {second:,.0f} bytes a turn, in {turns:,} turns each", flush=True)


def steps(config, save: bool) -> Iterator[None]:
    """The steps of a run; `save`: each saves a checkpoint."""
    from mm_parallel import clip_grad_norm, finish_gradients, forward_backward

    with ExitStack() as held, prepare(config, held) as run:
        for batch in run.batches():
            run.set_rate()
            losses = forward_backward(run.model, len(batch), batch.inputs, batch.losses, batch.total, run.mesh)
            loss = run.start_loss(losses)
            finish_gradients(run.parameters, run.mesh)
            norm = clip_grad_norm(run.parameters, run.max_norm, run.mesh)
            step = run.outcome(batch, losses, run.update(loss(), norm))
            run.optimizer.zero_grad(set_to_none=True)
            run.report(step)
            if save:
                run.save_if_due(step)
                run.checkpoints.wait()
            yield


def main(demo: Path, turns: int) -> None:
    manifest, encoders = demo / "clips/data.txt", demo / "encoders"
    clips = VideoDataset(read_manifest(manifest), Geometry(**GEOMETRY))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        geometry = Geometry(**GEOMETRY)
        extract(ExtractConfig("wan-tiny", encoders, output / "features", Data(manifest), geometry=geometry))
        features = FeatureDataset(output / "features")
        measure("samples of features", 10 * turns, lambda: iter(build_loader(features, global_batch=1)))
        measure("clips", turns, lambda: (clips[i % len(clips)] for i in itertools.count()))
        common = ["--model", "wan-tiny", "--weights", "random", "--dtype", "float32", "--steps", str(10 * turns)]
        common += ["--architecture", f'{{"text_dim": {features[0]["text"][0].shape[1]}, "num_layers": 2}}']
        common += ["--data.global_batch", "2"]
        cached = [*common, "--data.features", str(output / "features")]
        raw = [*common, "--data.manifest", str(manifest), "--data.encoders", str(encoders)]
        raw += [word for name, value in GEOMETRY.items() for word in (f"--data.geometry.{name}", str(value))]
        for name, argv, save in (
            ("steps on features", cached, False),
            ("steps on raw clips", raw, False),
            ("steps on features with a save", [*cached, "--checkpoint.every", "1"], True),
        ):
            config = load_config([*argv, "--output", str(output / name.replace(" ", "-"))])
            measure(name, turns, lambda config=config, save=save: steps(config, save))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
