"""Extraction against the sum of its parts: decoding, encoding video, encoding text, writing; each alone, then together.

    python docs/measure/extract.py DEMO       # DEMO: what `hatch run demo` wrote, for its clips and encoders

Decoding runs in a worker process while the VAE encodes, so together should take less than the sum, and not much more
than the largest part.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from mm_data import FeatureCache, Geometry, VideoDataset, read_manifest
from mm_models.encoders import TextEncoder
from mm_models.wan.vae import WanVAE
from mm_train.extract import Data, ExtractConfig, extract

BATCH = 8


def main(demo: Path) -> None:
    torch.set_num_threads(1)  # one core encodes, the other decodes
    geometry = Geometry(num_frames=9, max_height=64, max_width=64)
    manifest, encoders = demo / "clips/data.txt", demo / "encoders"
    samples = read_manifest(manifest)
    seconds = {}

    def timed(name: str, work) -> object:
        started = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - started
        return result

    dataset = VideoDataset(samples, geometry)
    vae, text = WanVAE(encoders), TextEncoder(encoders, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder) / "parts")
        plan = timed("hash", lambda: cache.find_work(samples, geometry, "x"))
        clips = timed("decode", lambda: [dataset[i] for i in range(len(dataset))])
        videos = [torch.stack([c["video"] for c in clips[i : i + BATCH]]) for i in range(0, len(clips), BATCH)]
        latents = timed("video", lambda: [one for batch in videos for one in vae.encode(batch)])
        texts = timed("text", lambda: [text.encode(list(clip["captions"])) for clip in clips])

        def write() -> None:
            for clip, one, encoded in zip(clips, latents, texts, strict=True):
                cache.put(plan.keys[clip["id"]], {"latents": one, "text.0": encoded[0]}, clip["meta"])
            cache.finish(plan)

        timed("write", write)
        total = sum(seconds.values())
        config = ExtractConfig(
            model="wan-tiny",
            encoders=encoders,
            output=Path(folder) / "together",
            data=Data(manifest, workers=1),
            geometry=geometry,
            batch=BATCH,
            dtype="float32",
        )
        timed("together", lambda: extract(config))
    parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    print(f"{len(samples)} clips, seconds: {parts}; sum {total:.2f}, together / sum {seconds['together'] / total:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
