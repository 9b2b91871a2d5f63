"""What the roofline says of Wan2.1 on one H100: MFU by kernel of attention and by what layers recompute.

    python docs/measure/roofline.py

No device is asked: kernels are counted on the meta device, speeds are those of `mm_parallel/devices.toml`.
"""

import torch

from mm_models import build, plan
from mm_models.families import family_of
from mm_parallel import MemoryConfig, ParallelConfig
from mm_parallel.devices import find_device
from mm_parallel.estimate import Units
from mm_parallel.estimate.roofline import Clock

VIDEO = (1, 16, 21, 60, 104)  # latents of 81 frames of 480 x 832: 32,760 tokens


def main() -> None:
    layout = ParallelConfig(dp_shard=2).resolve(2)  # weights come in bf16
    for name in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b"):
        model = build(name, device="meta")
        model.compute_dtype = torch.bfloat16
        video, t, text = (torch.empty(shape, device="meta") for shape in (VIDEO, (1,), (1, 512, model.config.text_dim)))
        units = Units(model, plan(model), torch.bfloat16, {"video": video, "t": t, "text": text})
        _, flops = family_of(model.config).cost(model)({"latents": video})
        for compiled in (False, True):
            for kernel in ("flash", "cudnn", "flash3"):
                clock = Clock(find_device("h100"), torch.bfloat16, attention=kernel, compiled=compiled)
                words = ("none", "but_attention", "full")
                steps = [clock.time(units, layout, MemoryConfig(word), 1, 2 * flops) for word in words]
                said = " / ".join(f"{100 * step.mfu:.0f}" for step in steps)
                parts = f"{steps[0].gemm:.2f} + {steps[0].attention:.2f} + {steps[0].memory:.2f} s"
                print(f"{name} {'compiled' if compiled else 'eager':8} {kernel:6} MFU {said} %, {parts}")


if __name__ == "__main__":
    main()
