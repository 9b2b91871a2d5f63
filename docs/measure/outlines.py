"""What a pipeline asks of the meta device: once for a model, for each micro-batch, and for each new length.

    python docs/measure/outlines.py            # Qwen2.5-VL-7B in four stages

Milliseconds of one call each.
"""

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch

from mm_models import build, plan
from mm_models.layers import Sequence
from mm_parallel.pipeline.outline import begin, shape, skeleton, trace


def timed(what: str, make: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    made = make()
    print(f"  {what}: {1000 * (time.perf_counter() - start):.0f} ms")
    return made


def main() -> None:
    model = build("qwen2.5-vl-7b", device="meta")
    bones = skeleton(model, plan(model), None, None, trained=False)
    signature = inspect.signature(bones.stem)
    for tokens, images in ((4096, 1), (4104, 4), (8192, 16)):
        meta = {"dtype": torch.long, "device": "meta"}
        call = signature.bind(
            input_ids=torch.empty(1, tokens, **meta),
            position_ids=torch.empty(3, 1, tokens, **meta),
            pixel_values=torch.empty(images * 1024, 1176, device="meta"),
            grid_thw=((1, 32, 32),) * images,
            sequence=Sequence(tokens, True, tuple(range(0, tokens + 1, tokens // 8))),
            labels=torch.empty(1, tokens, **meta),
        )
        print(f"{tokens} tokens, {images} images of 32 x 32 patches")
        begun = timed("each micro-batch", lambda call=call: begin(bones, plan(model), call))
        entries = timed("once, all layers", lambda call=call: trace(bones, [0, 7, 14, 21], call))
        timed("each new length", lambda entries=entries, begun=begun: shape(bones, entries, begun))


main()
